"""Compiled or not, a backend computes the same: tokens, scores, and everything else that is returned."""

import numpy as np
import pytest

from roberta_pln import backends
from tests.contract import precision
from tests.generation.common import COMPILED, EOS, PROMPTS, STATES, decoder, generate

TOLERANCE = 1e-12  # float64: a compiler may sum in another order, some hundred products of numbers up to 10

NAMES = [name for name in backends.installed() if name != "pt"]
EMBEDS = np.random.default_rng(5).standard_normal((3, 8, 32))

CASES = {
    "greedy": ("relative_key_query", {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}),
    "drawn": (
        "pruned heads",
        {"do_sample": True, "seed": 3, "top_p": 0.9, "typical_p": 0.9},
    ),
    "beams, with an encoder": (
        "with an encoder",
        {"num_beams": 3, "bad_words_ids": [[17, 4]], "num_return_sequences": 2},
    ),
    "drawn beams": (
        "one layer",
        {"do_sample": True, "seed": 3, "num_beams": 3, "top_k": 9, "forced_eos_token_id": EOS},
    ),
    "embeddings, without a cache": ("one layer", {"use_cache": False, "inputs_embeds": EMBEDS, "input_ids": None}),
}
"""Decoder and options."""


@pytest.mark.parametrize(
    ("backend", "name", "way"), [(name, case, way) for name in NAMES for case in CASES for way in COMPILED[name]]
)
def test_the_same(backend, name, way):
    if way == "compiled by XLA" and name in ("drawn", "drawn beams"):
        pytest.skip("XLA takes long; what it may change is in the other cases")
    which, options = CASES[name]
    inputs = {**PROMPTS["padding on every side"], **(STATES if "encoder" in name else {})}
    options = {"max_new_tokens": 5, "output_scores": True, "output_logits": True, **options}
    with precision(backend, "float64"):
        model = decoder(backend, which)
        expected = generate(model, {}, **inputs | options)
        found = generate(model, {}, **inputs | options, **COMPILED[backend][way])
    assert found.keys() == expected.keys()
    for field in expected:
        np.testing.assert_allclose(found[field], expected[field], rtol=0, atol=TOLERANCE, err_msg=field)
    assert found["sequences"].tolist() == expected["sequences"].tolist()
