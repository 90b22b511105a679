"""transformers' own `generate` in PyTorch beside ours: the same tokens, scores and beams, for every mode and option.

It numbers positions 0, 1, 2, ..., which is not what its own forward does, so the models here have a position table with
rows that are all alike, and the question does not arise. It counts padding among the tokens that are there, so prompts
have none where a processor looks at these. It draws with `torch.multinomial`, which is replaced by the same rules
on the same uniform numbers. Scores are in float32 in both; their roundings, 1e-7 of numbers up to 10, decide nothing:
the two best of 40 tokens are nearer than 1e-5 in one case of 10,000, and the seeds are fixed.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from roberta_pln import checkpoint
from roberta_pln.schema import PREFIX
from tests.contract import load
from tests.generation.common import EOS, VOCAB, array, decoder_config, generate, prompts, talkative

CLOSE = dict(rtol=3e-6, atol=2e-5)  # float32: some hundred roundings of 1e-7 of numbers up to 10; some are scaled
NEW = 9
PLAIN = prompts(*[5] * 6, columns=5)
PADDED = prompts(5, 3, 1, 4, 6, 2, columns=6)
SHORT = prompts(*[1] * 6, columns=1)
OFTEN = {"input_ids": np.tile(np.array([[7, 8, 7, 8, 9, 7]]), (6, 1)) + np.arange(6)[:, None]}

GREEDY = {
    "greedy": {},
    "a repetition penalty": {"repetition_penalty": 1.7},
    "a repetition reward": {"repetition_penalty": 0.7},
    "no token twice": {"no_repeat_ngram_size": 1},
    "no pair twice": {"no_repeat_ngram_size": 2},
    "no triple twice": {"no_repeat_ngram_size": 3},
    "a bad word": {"bad_words_ids": [[17]]},
    "bad words": {"bad_words_ids": [[17, 17], [21], [2], [32, 32, 17]]},
    "a least length": {"min_length": 10, "eos_token_id": [2, 17]},
    "a least number of new tokens": {"min_new_tokens": 4, "eos_token_id": 17},
    "suppressed tokens": {"suppress_tokens": [17, 3, 2]},
    "suppressed at the beginning": {"begin_suppress_tokens": [17, 32, 21]},
    "a forced end": {"forced_eos_token_id": 2},
    "forced ends": {"forced_eos_token_id": [30, 2]},
    "several ends": {"eos_token_id": [2, 29, 21]},
    "another padding": {"pad_token_id": 3, "eos_token_id": 29},
    "all of them": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[17, 17], [21]],
        "min_new_tokens": 5,
        "forced_eos_token_id": 2,
        "suppress_tokens": [32],
        "begin_suppress_tokens": [17],
    },
}
FIRST = {
    "a forced beginning": {"forced_bos_token_id": 30},
    "a forced beginning, and suppressed behind it": {"forced_bos_token_id": 30, "begin_suppress_tokens": [17, 4]},
}

WARPERS = {
    "nothing": {"top_k": 0},
    "temperature": {"temperature": 0.6},
    "high temperature": {"temperature": 2.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "typical_p": {"typical_p": 0.6},
    "all of them": {"temperature": 1.8, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
    "with processors": {"top_p": 0.9, "repetition_penalty": 1.5, "min_new_tokens": 4, "bad_words_ids": [[17]]},
    "several of each": {"top_k": 0, "num_return_sequences": 3},
}

BEAMS = {
    "two": {"num_beams": 2},
    "five": {"num_beams": 5, "num_return_sequences": 5},
    "as soon as possible": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    "never early": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"},
    "no length penalty": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    "no length penalty, never early": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.0},
    "short ones": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": -1.0},
    "short ones, as soon as possible": {"num_beams": 3, "length_penalty": -0.5, "early_stopping": True},
    "long ones": {"num_beams": 3, "length_penalty": 2.0},
    "long ones, as soon as possible": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "long ones, never early": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "the longest": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 5.0},
    "several ends": {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": [2, 4, 23]},
    "no end": {"num_beams": 3, "eos_token_id": 35, "suppress_tokens": [35]},
    "a least length": {"num_beams": 3, "min_new_tokens": 6},
    "processors": {
        "num_beams": 3,
        "num_return_sequences": 2,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[23, 3], [4]],
        "forced_eos_token_id": 2,
    },
}
DRAWN_BEAMS = {
    "two": {"num_beams": 2, "num_return_sequences": 2},
    "hot": {"num_beams": 4, "temperature": 3.0},
    "warped": {"num_beams": 3, "num_return_sequences": 3, "top_k": 12, "top_p": 0.9, "temperature": 1.5},
    "least kept": {"num_beams": 2, "top_k": 1, "eos_token_id": [2, 4]},
    "least kept, without an end": {"num_beams": 2, "top_k": 1, "eos_token_id": None},
    "nucleus of the least": {"num_beams": 2, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.01},
    "early": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
}


@cache
def models(ending: float, **changes):
    """Ours and theirs, of the same weights, with which texts end more or less early."""
    config = decoder_config(**changes)
    tensors = talkative(config, 6, ending)
    positions = tensors[f"{PREFIX}.embeddings.position_embeddings.weight"]
    positions[:] = positions[:1]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(tensors, folder, config, "ForCausalLM")
        theirs = transformers.RobertaPreLayerNormForCausalLM.from_pretrained(Path(folder))
        return load("pt", Path(folder), "ForCausalLM", "float32"), theirs


def both(inputs: dict[str, np.ndarray], draws: np.ndarray | None = None, **options):
    """What ours and theirs return, with everything that both can."""
    endless = {"eos_token_id": None} if options.get("eos_token_id", EOS) is None else {}
    ours, theirs = models(0.0 if "num_beams" in options else -2.0, **endless)
    options = {"max_new_tokens": NEW, "output_scores": True, "output_logits": True, **options}
    chance = {} if draws is None else {"do_sample": True}
    found = generate(ours, inputs, **options, **chance, **({} if draws is None else {"draws": draws}))
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        if draws is not None:
            patch.setattr(torch, "multinomial", multinomial(draws))
        record = theirs.generate(**tensors, **options, do_sample=draws is not None, return_dict_in_generate=True)
    kept = ("sequences", "sequences_scores", "scores", "logits", "beam_indices")
    expected = {
        name: np.stack([array(item) for item in record[name]])
        if isinstance(record[name], tuple)
        else array(record[name])
        for name in kept
        if name in record
    }
    return found, expected


def multinomial(draws: np.ndarray):
    """`torch.multinomial` from given draws: where the summed probabilities pass one, or a race without replacement."""
    steps = iter(torch.from_numpy(draws).float())

    def drawn(probabilities, num_samples):
        uniform = next(steps)
        if num_samples > 1:
            return (probabilities / -torch.log1p(-uniform)).topk(num_samples).indices
        summed = probabilities.cumsum(dim=-1)
        return (summed <= uniform[:, None] * summed[:, -1:]).sum(dim=-1, keepdim=True)

    return drawn


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], **options) -> None:
    """Tokens and origins alike, numbers close; what rows that have ended would have scored is nobody's business."""
    assert np.array_equal(found["sequences"], expected["sequences"])
    ends = options.get("eos_token_id", EOS)
    tokens = found["sequences"][:, -found["log_probs"].shape[1] :]
    if "beam_indices" in expected:
        assert np.array_equal(found["beam_indices"], expected["beam_indices"])
        np.testing.assert_allclose(found["sequences_scores"], expected["sequences_scores"], **CLOSE)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name])
        for step, (left, right) in enumerate(zip(found[name], expected[name], strict=True)):
            if "beam_indices" in expected:
                rows = slice(None, None, options["num_beams"]) if step == 0 else slice(0)  # one beam runs at first
            else:
                rows = ~np.isin(tokens[:, :step], ends).any(axis=1)
            np.testing.assert_allclose(left[rows], right[rows], **CLOSE)


def draws_for(rows: int, beams: int = 1, seed: int = 0) -> np.ndarray:
    """Uniform numbers, the same in float32."""
    shape = (NEW, rows, beams * VOCAB) if beams > 1 else (NEW, rows)
    return np.random.default_rng(seed).random(shape, np.float32).astype(np.float64)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy(name):
    options = GREEDY[name]
    for inputs in (PLAIN, OFTEN):
        found, expected = both(inputs, **options)
        same(found, expected, **options)
    if name != "greedy":  # the option changes something
        assert not np.array_equal(found["sequences"], both(OFTEN)[0]["sequences"])


@pytest.mark.parametrize("name", FIRST)
def test_a_forced_beginning(name):
    for beams in (1, 2):
        options = {**FIRST[name], "num_beams": beams}
        found, expected = both(SHORT, **options)
        same(found, expected, **options)
        assert np.all(found["sequences"][:, 1] == 30)
        assert np.all(both(PLAIN, **options)[0]["sequences"][:, 5] != 30)


@pytest.mark.parametrize("name", WARPERS)
def test_sampling(name):
    options = WARPERS[name]
    for inputs in (PLAIN, OFTEN) if "repetition_penalty" in options else (PLAIN, PADDED):
        draws = draws_for(6 * options.get("num_return_sequences", 1))
        found, expected = both(inputs, draws, **options)
        same(found, expected, **options)
    cut = np.isinf(found["scores"][0]).any()
    assert cut == (name not in ("nothing", "temperature", "high temperature", "several of each"))


@pytest.mark.parametrize("name", BEAMS)
def test_beams(name):
    options = BEAMS[name]
    for inputs in (PLAIN, PADDED):
        if "repetition_penalty" in options:
            inputs = OFTEN
        found, expected = both(inputs, **options)
        same(found, expected, **options)


@pytest.mark.parametrize("name", DRAWN_BEAMS)
def test_drawn_beams(name):
    options = DRAWN_BEAMS[name]
    for seed, inputs in enumerate((PLAIN, PADDED)):
        found, expected = both(inputs, draws_for(6, options["num_beams"], seed), **options)
        same(found, expected, **options)


def test_beams_differ_by_their_settings():
    """The control: the cases above do not all end the same way."""
    settings = ("as soon as possible", "never early", "short ones", "long ones", "long ones, as soon as possible")
    settings = (*settings, "long ones, never early")
    texts = {
        both(PADDED, **{**BEAMS[name], "num_beams": 3, "num_return_sequences": 1})[0]["sequences"].tobytes()
        for name in settings
    }
    assert len(texts) >= 4


def test_without_a_prompt():
    options = {"num_beams": 2}
    same(*both({"input_ids": np.array([[0]])}, **options), **options)
    ours, theirs = models(0.0)
    alone = theirs.generate(max_new_tokens=NEW)
    assert np.array_equal(array(ours.generate(max_new_tokens=NEW)), array(alone))


def test_another_rule_is_seen():
    """The control: other draws, and other options."""
    found, expected = both(PLAIN, draws_for(6), top_k=0)
    other, _ = both(PLAIN, draws_for(6, seed=1), top_k=0)
    with pytest.raises(AssertionError):
        same(other, expected)
    with pytest.raises(AssertionError):
        same(found, both(PLAIN, draws_for(6), top_k=5)[1])
