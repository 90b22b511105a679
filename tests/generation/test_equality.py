"""The three backends give the same texts in float64, token for token, for every mode and option.

Chance is handed in as uniform numbers. Scores may differ by roundings: within 1e-12, for sums of some hundred products
of numbers up to 10, each with a rounding of 1e-16. Two tokens are as near as that in one of 10^10 steps.
"""

import numpy as np
import pytest

from roberta_pln import backends
from tests.contract import precision
from tests.generation.common import EOS, VOCAB, decoder, generate, prompts

NAMES = backends.installed()
pytestmark = pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")

TOLERANCE = 1e-12
ROWS, COLUMNS, NEW = 9, 9, 7  # rows that are continued: nine prompts, or three of three beams each
SAMPLED = {"do_sample": True}
ALL_BUT = [token for token in range(VOCAB) if token not in (4, 17, EOS)]

CASES = {
    "greedy": {},
    "greedy, without a cache": {"use_cache": False},
    "processors that look back": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
    "a reward, and triples": {"repetition_penalty": 0.6, "no_repeat_ngram_size": 3},
    "no token twice": {"no_repeat_ngram_size": 1, "eos_token_id": [2, 17]},
    "bad words": {"bad_words_ids": [[17, 17], [21], [2], [3, 3, 3], [4, 4]]},
    "lengths": {"min_new_tokens": 4, "forced_eos_token_id": [30, 2], "eos_token_id": [2, 17, 3]},
    "suppressed": {"suppress_tokens": [17, 4], "begin_suppress_tokens": [3, 21, 2]},
    "drawn": {**SAMPLED, "top_k": 0},
    "drawn, temperature": {**SAMPLED, "temperature": 0.7},
    "drawn, top_k": {**SAMPLED, "top_k": 5},
    "drawn, top_p": {**SAMPLED, "top_p": 0.8},
    "drawn, min_p": {**SAMPLED, "min_p": 0.1},
    "drawn, typical_p": {**SAMPLED, "typical_p": 0.7},
    "drawn, everything": {
        **SAMPLED,
        "temperature": 1.7,
        "top_k": 25,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 3,
    },
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beams, as soon as possible": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "beams, never early": {"num_beams": 3, "early_stopping": "never"},
    "beams, long ones": {"num_beams": 3, "length_penalty": 2.0},
    "beams, long ones, as soon as possible": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beams, long ones, never early": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "beams, short ones": {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 3},
    "beams, no penalty": {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    "beams, several ends": {"num_beams": 3, "eos_token_id": [2, 17, 4], "num_return_sequences": 3},
    "beams, processors": {
        "num_beams": 3,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[4, 11], [21]],
        "forced_eos_token_id": [2, 30],
    },
    "beams, few tokens": {"num_beams": 3, "num_return_sequences": 3, "suppress_tokens": ALL_BUT},
    "drawn beams": {**SAMPLED, "num_beams": 3, "temperature": 2.0, "num_return_sequences": 3},
    "drawn beams, warped": {**SAMPLED, "num_beams": 3, "top_p": 0.8, "typical_p": 0.9, "length_penalty": 0.5},
    "drawn beams, few tokens": {**SAMPLED, "num_beams": 3, "top_k": 1, "min_p": 0.5, "early_stopping": True},
}
"""Each with prompts of its own, and one of four models."""

DECODERS = {
    "relative_key_query": {"repetition_penalty": 1.3, "min_new_tokens": 3, "bad_words_ids": [[17, 17]]},
    "pruned heads": CASES["drawn, everything"],
    "with an encoder": CASES["beams, processors"],
    "another pad token": CASES["drawn beams, warped"],
    "untied": {**CASES["beams, processors"], "use_cache": False},
}
"""Options for other decoders."""


def inputs_of(rows: int, seed: int, pad: int = 1, encoder: bool = False) -> dict[str, np.ndarray]:
    """Random prompts of random lengths, padded on random sides."""
    rng = np.random.default_rng(seed)
    lengths, sides = rng.integers(1, COLUMNS + 1, rows), "".join(rng.choice(list("lrb"), rows))
    found = prompts(*lengths, columns=COLUMNS, sides=sides, seed=seed, pad=pad)
    if encoder:
        found["encoder_hidden_states"] = rng.standard_normal((rows, 5, 32))
        found["encoder_attention_mask"] = (np.arange(5) < rng.integers(1, 6, (rows, 1))).astype(np.int64)
    return found


def draws_of(options: dict, seed: int) -> dict[str, np.ndarray]:
    """Uniform numbers for a call that draws."""
    if not options.get("do_sample"):
        return {}
    beams = options.get("num_beams", 1)
    shape = (NEW, ROWS // beams, beams * VOCAB) if beams > 1 else (NEW, ROWS)
    return {"draws": np.random.default_rng(seed).random(shape)}


def check(model_of, inputs: dict, **options) -> dict[str, dict[str, np.ndarray]]:
    """Every backend's record is the first one's."""
    found = {}
    for backend in NAMES:
        with precision(backend, "float64"):
            asked = {"max_new_tokens": NEW, "output_scores": True, "output_logits": True, **options}
            found[backend] = generate(model_of(backend), inputs, **asked)
    first, *others = found.values()
    for other in others:
        agree(first, other)
    return found


def agree(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert one["sequences"].tolist() == other["sequences"].tolist()
    if "beam_indices" in one:
        assert one["beam_indices"].tolist() == other["beam_indices"].tolist()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_every_option(name):
    options, number = CASES[name], list(CASES).index(name)
    beams = options.get("num_beams", 1)
    for seed in (number, 100 + number) if beams > 1 else (number,):
        inputs, draws = inputs_of(ROWS // beams, seed), draws_of(options, seed)
        check(lambda backend: decoder(backend, "one layer", seed=number % 4, ending=0.0), inputs, **draws, **options)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder(name):
    options, pad = DECODERS[name], 5 if name == "another pad token" else 1
    inputs = inputs_of(ROWS // options.get("num_beams", 1), 50, pad, name == "with an encoder")
    check(lambda backend: decoder(backend, name, seed=2), inputs, **draws_of(options, 3), **options)


def test_other_draws_are_seen():
    """The control."""
    options = {**CASES["drawn"], "max_new_tokens": NEW}
    model, inputs = decoder(NAMES[0], "one layer"), inputs_of(ROWS, 0)
    one, other = (generate(model, inputs, **draws_of(options, seed), **options) for seed in (0, 1))
    with pytest.raises(AssertionError):
        agree(one, other)
    with pytest.raises(AssertionError):
        agree(one, {**one, "log_probs": one["log_probs"] + 1e-11})
