"""What `generate` returns and hands out, and what it lets others decide, in every backend."""

import numpy as np
import pytest

from roberta_pln import backends
from roberta_pln.generation import GenerationConfig
from roberta_pln.outputs import GenerateOutput
from tests.contract import PAD
from tests.generation.common import (
    BOS,
    COMPILED,
    EAGER,
    EOS,
    PROMPTS,
    STATES,
    VOCAB,
    array,
    decoder,
    generate,
    logits_of,
    saved,
    without_padding,
)

CLOSE = dict(rtol=0, atol=1e-12)  # float64: sums of some ten log-probabilities, each from 40 logits
INPUTS = PROMPTS["padding on every side"]
TEXTS = without_padding(INPUTS)
ALL = range(VOCAB)
DRAWS = np.random.default_rng(3).random((9, 3))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def new_tokens(found: dict[str, np.ndarray]) -> np.ndarray:
    return found["sequences"][:, INPUTS["input_ids"].shape[1] :]


# ------------------------------------------------------------- the record


def test_tokens_alone_or_a_record(backend):
    """Flax always returns a record, of which scripts for transformers read `.sequences`."""
    options = {"max_new_tokens": 4, **EAGER[backend]}
    plain = decoder(backend).generate(**INPUTS, **options)
    record = decoder(backend).generate(**INPUTS, **options, return_dict_in_generate=True, output_scores=True)
    assert isinstance(record, GenerateOutput)
    assert np.array_equal(array(plain.sequences if backend == "flax" else plain), array(record.sequences))
    assert array(record.sequences).dtype.kind == "i"
    assert isinstance(record.scores, tuple)
    assert len(record.scores) == array(record.log_probs).shape[1]


FIELDS = {
    "nothing more": ({}, ()),
    "scores": ({"output_scores": True}, ("scores",)),
    "both": ({"output_scores": True, "output_logits": True}, ("scores", "logits")),
    "beams": ({"num_beams": 3}, ("beam_indices",)),
    "beams with logits": ({"num_beams": 3, "output_logits": True}, ("logits", "beam_indices")),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields(backend, name):
    options, more = FIELDS[name]
    found = generate(decoder(backend), INPUTS, max_new_tokens=2, **options)
    assert tuple(found) == ("sequences", "sequences_scores", "log_probs", *more)


@pytest.mark.parametrize("sampled", [False, True])
def test_log_probs_are_of_the_tokens_that_came(backend, sampled):
    model = decoder(backend)
    chance = {"do_sample": True, "draws": DRAWS, "top_k": 7, "temperature": 2.0} if sampled else {}
    found = generate(model, INPUTS, max_new_tokens=9, repetition_penalty=1.5, output_scores=True, **chance)
    tokens, logs = new_tokens(found), log_softmax(found["scores"])
    rows, there = np.arange(3), np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0
    expected = np.stack([logs[step, rows, tokens[:, step]] for step in range(tokens.shape[1])], axis=1)
    np.testing.assert_allclose(found["log_probs"], np.where(there, expected, 0), **CLOSE)
    np.testing.assert_allclose(found["sequences_scores"], found["log_probs"].sum(axis=1), **CLOSE)
    assert not there.all()  # one row has ended before the others
    assert np.all(tokens[~there] == PAD)


@pytest.mark.parametrize(("penalty", "allowed"), [(0.0, ALL), (1.0, ALL), (-0.7, ALL), (2.0, ALL), (1.0, [PAD, 4, 17])])
def test_scores_of_beams_are_those_of_their_tokens(backend, penalty, allowed):
    """A call of the model on each text that is returned gives its log-probability, and so its score.

    Beams with unlike numbers of pad tokens have unlike positions, which go with them.
    """
    model, count = decoder(backend), 3
    options = {"num_beams": count, "num_return_sequences": count, "length_penalty": penalty}
    options["suppress_tokens"] = [token for token in ALL if token not in allowed]
    found = generate(model, INPUTS, max_new_tokens=6, output_logits=True, **options)
    tokens, origins = new_tokens(found), found["beam_indices"]
    texts = [np.append(TEXTS[row // count], new) for row, new in enumerate(tokens)]
    logs = log_softmax(logits_of(model, texts, 20))
    lengths = (origins >= 0).sum(axis=1)
    for row, text in enumerate(texts):
        start = len(text) - tokens.shape[1]
        each = logs[row, np.arange(start - 1, len(text) - 1), text[start:]]
        each[lengths[row] :] = 0
        np.testing.assert_allclose(found["log_probs"][row], each, **CLOSE)
        np.testing.assert_allclose(found["sequences_scores"][row], each.sum() / lengths[row] ** penalty, **CLOSE)
        assert np.all(tokens[row, lengths[row] :] == PAD)
        assert lengths[row] == tokens.shape[1] or tokens[row, lengths[row] - 1] == EOS
    assert origins.max() < 3 * count
    assert np.all((origins == -1) | (origins // count == np.arange(3).repeat(count)[:, None]))
    scores = found["sequences_scores"].reshape(3, count)
    assert np.all(np.diff(scores, axis=1) <= 0)  # the best first
    assert len({tuple(text) for text in tokens[:count]}) == count
    assert found["logits"].shape[1:] == (3 * count, VOCAB)
    assert len(set(lengths)) > 1 or PAD in allowed[:1]
    assert len(set((tokens == PAD).sum(axis=1))) > 1


def test_returned_sequences_are_those_of_their_prompt(backend):
    """Each prompt's rows follow each other, and do not depend on the other prompts."""
    model, turned = decoder(backend), {name: value[::-1].copy() for name, value in INPUTS.items()}
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    found, other = (generate(model, inputs, **options)["sequences"] for inputs in (INPUTS, turned))
    assert np.array_equal(found[:, :8], INPUTS["input_ids"].repeat(2, axis=0))
    assert np.array_equal(found.reshape(3, 2, -1)[::-1], other.reshape(3, 2, -1))
    options = {"max_new_tokens": 5, "do_sample": True}
    draws = np.random.default_rng(0).random((5, 3, 3))
    drawn = generate(model, INPUTS, **options, num_return_sequences=3, draws=draws.reshape(5, 9))["sequences"]
    for which in range(3):
        found = generate(model, INPUTS, **options, draws=draws[:, :, which])["sequences"]
        width = found.shape[1]
        assert np.array_equal(drawn[which::3, :width], found)
        assert np.all(drawn[which::3, width:] == PAD)


def test_beams_read_their_encoder_states(backend):
    """With several beams each prompt keeps its own encoder states, with and without a cache."""
    model = decoder(backend, "with an encoder")
    options = {"max_new_tokens": 5, "num_beams": 3}
    found = generate(model, {**INPUTS, **STATES}, **options)
    without = generate(model, {**INPUTS, **STATES}, use_cache=False, **options)
    assert np.array_equal(found["sequences"], without["sequences"])
    np.testing.assert_allclose(found["sequences_scores"], without["sequences_scores"], **CLOSE)
    turned = {name: value[::-1].copy() for name, value in {**INPUTS, **STATES}.items()}
    np.testing.assert_allclose(generate(model, turned, **options)["sequences_scores"], found["sequences_scores"][::-1])
    other = generate(model, {**INPUTS, **STATES, "encoder_hidden_states": -STATES["encoder_hidden_states"]}, **options)
    assert not np.allclose(other["sequences_scores"], found["sequences_scores"])


# ------------------------------------------------------------- ends


def test_nothing_comes_behind_the_last_end(backend):
    """As many columns as the longest continuation, and not more."""
    model = decoder(backend)
    found = generate(model, INPUTS, max_new_tokens=30, output_logits=True)
    tokens = new_tokens(found)
    assert tokens.shape[1] == len(found["logits"]) < 30
    assert np.all(np.any(tokens == EOS, axis=1))
    assert np.any(tokens[:, -1] == EOS)
    shorter = generate(model, INPUTS, max_new_tokens=1)
    assert np.array_equal(shorter["sequences"], found["sequences"][:, :9])
    by_length = generate(model, INPUTS, max_length=12)
    assert np.array_equal(by_length["sequences"], found["sequences"][:, :12])


def test_several_tokens_end_texts(backend):
    """Any of them, and padding is the token that was asked for."""
    model = decoder(backend)
    usual = new_tokens(generate(model, INPUTS, max_new_tokens=4, suppress_tokens=[EOS]))
    ends = sorted({int(usual[0, 1]), int(usual[1, 2]), EOS})
    options = {"max_new_tokens": 4, "eos_token_id": ends, "pad_token_id": 9}
    tokens = new_tokens(generate(model, INPUTS, suppress_tokens=[EOS], **options))
    for row in range(3):
        at = [step for step in range(4) if usual[row, step] in ends]
        steps = at[0] + 1 if at else 4
        assert np.array_equal(tokens[row, :steps], usual[row, :steps])
        assert np.all(tokens[row, steps:] == 9)
    assert np.any(tokens == 9)
    beams = generate(model, INPUTS, num_beams=3, **options)
    lengths = (beams["beam_indices"] >= 0).sum(axis=1)
    for row, length in enumerate(lengths):
        assert length == beams["beam_indices"].shape[1] or new_tokens(beams)[row, length - 1] in ends
        assert np.all(new_tokens(beams)[row, length:] == 9)


def test_a_least_length(backend):
    model = decoder(backend)
    free = new_tokens(generate(model, INPUTS, max_new_tokens=6))
    for options in ({"min_new_tokens": 5}, {"min_length": 13}):
        found = generate(model, INPUTS, max_new_tokens=6, **options)
        assert not np.any(new_tokens(found)[:, :5] == EOS)
        beams = generate(model, INPUTS, max_new_tokens=6, num_beams=3, **options)
        assert (beams["beam_indices"] >= 0).sum(axis=1).min() >= 6
    assert np.any(free[:, :5] == EOS)


# ------------------------------------------------------------- prompts


def test_texts_without_a_prompt(backend):
    """They start with the bos token, of the model or of the call, which is part of what is returned."""
    model = decoder(backend)
    told = generate(model, {"input_ids": np.full((3, 1), BOS)}, max_new_tokens=3)["sequences"]
    rows = generate(model, {"input_ids": np.zeros((3, 0), np.int64)}, max_new_tokens=3)["sequences"]
    assert np.array_equal(rows, told)
    other = generate(model, {"input_ids": np.zeros((3, 0), np.int64)}, max_new_tokens=3, bos_token_id=8)["sequences"]
    assert np.array_equal(other, generate(model, {"input_ids": np.full((3, 1), 8)}, max_new_tokens=3)["sequences"])
    one = generate(model, {}, max_new_tokens=3, **next(iter(COMPILED[backend].values())))["sequences"]
    assert np.array_equal(one, told[:1])
    reader = decoder(backend, "with an encoder")
    found = generate(reader, STATES, max_new_tokens=3)["sequences"]
    assert np.array_equal(
        found, generate(reader, {"input_ids": np.full((3, 1), BOS), **STATES}, max_new_tokens=3)["sequences"]
    )


def test_prompts_under_every_name(backend):
    """By position, as `inputs` or as `input_ids`, in lists or arrays of any integers."""
    model, how = decoder(backend), {"max_new_tokens": 3, "return_dict_in_generate": True, **EAGER[backend]}
    expected = generate(model, INPUTS, max_new_tokens=3)["sequences"]
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    for given in (ids.tolist(), ids.astype(np.int32)):
        assert np.array_equal(array(model.generate(given, attention_mask=mask > 0, **how).sequences), expected)
    assert np.array_equal(array(model.generate(inputs=ids, attention_mask=mask.tolist(), **how).sequences), expected)


def test_a_call_changes_nothing(backend):
    """The arguments, the model's settings and the model's mode are as before."""
    model = decoder(backend)
    ids, mask = INPUTS["input_ids"].copy(), INPUTS["attention_mask"].copy()
    settings, config = model.generation_config.to_dict(), model.config.to_dict()
    first = generate(model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=4, num_beams=3, use_cache=False)
    again = generate(model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=4, num_beams=3, use_cache=False)
    assert np.array_equal(first["sequences"], again["sequences"])
    assert np.array_equal(ids, INPUTS["input_ids"])
    assert np.array_equal(mask, INPUTS["attention_mask"])
    assert model.generation_config.to_dict() == settings
    assert model.config.to_dict() == config


def test_new_weights_count(backend):
    """What was compiled for the old ones computes with the new."""
    model = backends.BACKENDS[backend].model_class("ForCausalLM").from_pretrained(saved(num_hidden_layers=1))
    compiled = {"max_new_tokens": 3, **next(iter(COMPILED[backend].values()))}
    assert not np.any(new_tokens(generate(model, INPUTS, **compiled)) == 17)
    raise_bias(backend, model, 17)
    assert np.all(new_tokens(generate(model, INPUTS, **compiled)) == 17)
    model.resize_token_embeddings(50)
    raise_bias(backend, model, 45)
    before = generate(model, INPUTS, output_logits=True, **compiled)
    assert np.all(new_tokens(before) == 45)
    model.prune_heads({0: [0]})
    before, after = before["logits"], generate(model, INPUTS, output_logits=True, **compiled)["logits"]
    assert after.shape == before.shape == (3, 3, 50)
    assert not np.allclose(after, before)


def raise_bias(backend: str, model, token: int) -> None:
    """Make a token the likeliest after everything."""
    bias = model.params["lm_head"]["bias"] if backend == "flax" else model.lm_head.bias
    value = 50.0 * (np.arange(bias.shape[0]) == token)
    if backend == "flax":
        model.params = {**model.params, "lm_head": {**model.params["lm_head"], "bias": value}}
        return
    if backend == "tf":
        bias.assign(value)
        return
    import torch

    with torch.no_grad():
        bias.copy_(torch.from_numpy(value))


# ------------------------------------------------------------- streams, criteria, processors


class Listener:
    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []
        self.ended = 0

    def put(self, tokens) -> None:
        self.heard.append(tokens)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_are_handed_out_as_they_come(backend, sampled):
    """First the prompts, then the tokens of each step; the result is the same."""
    model = decoder(backend)
    options = {"max_new_tokens": 9, **({"do_sample": True, "draws": DRAWS} if sampled else {})}
    expected = generate(model, INPUTS, **options)["sequences"]
    listener, heard = Listener(), []
    assert np.array_equal(generate(model, INPUTS, streamer=listener, **options)["sequences"], expected)
    assert np.array_equal(generate(model, INPUTS, streamer=heard.append, **options)["sequences"], expected)
    assert listener.ended == 1
    for first, *steps in (listener.heard, heard):
        assert all(isinstance(tokens, np.ndarray) for tokens in (first, *steps))
        assert first.shape[0] == 3
        assert np.array_equal(first[:, -1], [text[-1] for text in TEXTS])
        assert np.array_equal(np.stack(steps, axis=1), expected[:, 8:])


def test_criteria_end_rows(backend):
    """One that says it of each row, and one that says it of all."""
    model = decoder(backend)
    options = {"max_new_tokens": 6, "suppress_tokens": [EOS]}
    usual = new_tokens(generate(model, INPUTS, **options))
    token, seen = int(usual[0, 1]), []

    def said(ids, scores):
        seen.append((array(ids).shape, array(scores).shape))
        return array(ids)[:, -1] == token

    def as_tensor(ids, scores):
        return ids[:, -1] == token

    for criterion in (said, as_tensor):
        tokens = new_tokens(generate(model, INPUTS, stopping_criteria=[criterion], **options))
        for row in range(3):
            at = np.flatnonzero(usual[row] == token)
            steps = at[0] + 1 if at.size else 6
            assert np.array_equal(tokens[row, :steps], usual[row, :steps])
            assert np.all(tokens[row, steps:] == PAD)
    assert np.any(tokens == PAD)
    assert [shape for shape, _ in seen] == [(3, seen[0][0][1] + step) for step in range(len(seen))]
    assert {shape for _, shape in seen} == {(3, VOCAB)}
    for answer in (True, np.True_):
        found = generate(model, INPUTS, stopping_criteria=[lambda ids, scores: answer], **options)  # noqa: B023
        assert np.array_equal(new_tokens(found), usual[:, :1])
    never = generate(model, INPUTS, stopping_criteria=[lambda ids, scores: False], **options)
    assert np.array_equal(new_tokens(never), usual)


def never_twice(backend: str):
    """A processor that forbids the last token to come again, and likes token 33; written in the backend."""

    def pt(ids, scores):
        scores = scores.clone()
        scores[:, 33] += 1.5
        return scores.scatter(1, ids[:, -1:], -np.inf)

    def tf(ids, scores, cur_len):
        import tensorflow as tf

        last = tf.one_hot(ids[:, cur_len - 1], VOCAB, on_value=True, off_value=False, dtype=tf.bool)
        scores = scores + 1.5 * tf.one_hot(33, VOCAB, dtype=scores.dtype)
        return tf.where(last, tf.constant(-np.inf, scores.dtype), scores)

    def flax(ids, scores, cur_len):
        import jax
        import jax.numpy as jnp

        last = jax.nn.one_hot(ids[:, cur_len - 1], VOCAB) > 0
        return jnp.where(last, -jnp.inf, scores.at[:, 33].add(1.5))

    return {"pt": pt, "tf": tf, "flax": flax}[backend]


@pytest.mark.parametrize("mode", ["greedy", "drawn", "beams"])
def test_processors_of_the_caller(backend, mode):
    """They come behind those of the options and before the warpers."""
    model = decoder(backend)
    options = {
        "greedy": {},
        "drawn": {"do_sample": True, "draws": DRAWS[:6], "top_k": 1, "temperature": 3.0},
        "beams": {"num_beams": 3},
    }[mode]
    options = {"max_new_tokens": 6, "suppress_tokens": [20], "output_scores": True, **options}
    usual = generate(model, INPUTS, output_logits=True, **options)
    found = generate(model, INPUTS, output_logits=True, logits_processor=[never_twice(backend)], **options)
    assert not np.array_equal(found["sequences"], usual["sequences"])
    tokens = new_tokens(found)
    tokens = [np.append(text, row) for text, row in zip(TEXTS, tokens, strict=True)]
    assert all(np.all((text[1:] != text[:-1])[-6:] | (text[1:] == PAD)[-6:]) for text in tokens)
    first = found["logits"][0] if mode != "beams" else log_softmax(found["logits"][0])
    first = np.where(np.arange(VOCAB) == 20, -np.inf, first + 1.5 * (np.arange(VOCAB) == 33))
    last = np.array([text[-1] for text in TEXTS]).repeat(len(first) // 3)
    first[np.arange(len(first)), last] = -np.inf
    if mode == "drawn":
        first = np.where(first == first.max(axis=-1, keepdims=True), first / 3, -np.inf)
    np.testing.assert_allclose(found["scores"][0], first, **CLOSE)


# ------------------------------------------------------------- chance


def test_seeds(backend):
    """The same seed gives the same, another one other tokens, and draws are uniform."""
    model = decoder(backend)
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "temperature": 2.0, "eos_token_id": 39}
    one, again, other = (generate(model, INPUTS, seed=seed, **options)["sequences"] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    many = {"num_return_sequences": 200, "max_new_tokens": 1, "do_sample": True, "top_k": 0}
    many |= next(iter(COMPILED[backend].values()))
    found = generate(model, INPUTS, seed=0, output_logits=True, **many)
    tokens = found["sequences"][:, -1].reshape(3, 200)
    shares = np.exp(log_softmax(found["logits"][0, ::200]))
    counts = np.stack([np.bincount(row, minlength=VOCAB) for row in tokens]) / 200
    deviation = np.sqrt(shares * (1 - shares) / 200)
    assert np.all(np.abs(counts - shares) < 5 * deviation + 0.005)  # five standard errors, of 120 shares


def test_beams_are_drawn(backend):
    model = decoder(backend)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": True, "temperature": 2.0}
    one, again, other = (generate(model, INPUTS, seed=seed, **options) for seed in (1, 1, 2))
    assert np.array_equal(one["sequences"], again["sequences"])
    assert not np.array_equal(one["sequences"], other["sequences"])


def test_the_options_of_the_model_and_of_the_call(backend):
    """An option wins over a config of the call, which stands instead of the model's."""
    model = decoder(backend)
    kept = model.generation_config
    try:
        model.generation_config = GenerationConfig(max_new_tokens=3, suppress_tokens=[EOS])
        assert new_tokens(generate(model, INPUTS)).shape == (3, 3)
        assert new_tokens(generate(model, INPUTS, max_new_tokens=2)).shape == (3, 2)
        own = GenerationConfig(max_new_tokens=5, suppress_tokens=[EOS])
        assert new_tokens(generate(model, INPUTS, generation_config=own)).shape == (3, 5)
        assert new_tokens(generate(model, INPUTS, generation_config=own, max_new_tokens=4)).shape == (3, 4)
    finally:
        model.generation_config = kept
