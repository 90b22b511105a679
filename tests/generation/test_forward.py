"""Every token of a greedy search is the most likely one by a call of the model on the tokens so far.

The call sees each text alone, without padding, without a cache and in one piece, so that neither the side of the
padding nor the cache nor compilation can be wrong in both. In float64, within 1e-12: a logit is a sum of some hundred
products of numbers up to 10, each with a rounding of 1e-16, behind two layers that do the same.
"""

import numpy as np
import pytest

from tests.contract import PAD
from tests.generation.common import (
    COMPILED,
    DECODERS,
    EOS,
    PROMPTS,
    STATES,
    decoder,
    forward,
    generate,
    logits_of,
    prompts,
    without_padding,
)

TOLERANCE = 1e-12
NEW = 6
OPTIONS = {"max_new_tokens": NEW, "output_logits": True}
WIDTH = 20
UNCACHED = ("plain", "relative_key_query", "pruned heads, with an encoder", "no layers")


def check(model, found: dict[str, np.ndarray], texts: list[np.ndarray], tolerance=TOLERANCE, eos=(EOS,), **rest):
    """Compare tokens and logits of each step, up to the end of each row, with those of one call."""
    new = found["sequences"][:, -len(found["logits"]) :]
    expected = logits_of(model, [np.append(text, row) for text, row in zip(texts, new, strict=True)], WIDTH, **rest)
    for row, text in enumerate(texts):
        ended = np.flatnonzero(np.isin(new[row], eos))
        steps = ended[0] + 1 if ended.size else new.shape[1]
        behind = expected[row, len(text) - 1 :][:steps]
        assert np.array_equal(new[row, :steps], behind.argmax(axis=-1))
        np.testing.assert_allclose(found["logits"][:steps, row], behind, rtol=0, atol=tolerance)
        assert np.all(new[row, steps:] == model.config.pad_token_id)


@pytest.mark.parametrize(
    ("name", "use_cache"), [*((name, True) for name in DECODERS), *((name, False) for name in UNCACHED)]
)
def test_every_decoder(backend, name, use_cache):
    model, rest = decoder(backend, name), STATES if "encoder" in name else {}
    inputs = prompts(2, 4, 6, columns=8, sides="lrb", pad=model.config.pad_token_id)
    found = generate(model, {**inputs, **rest}, use_cache=use_cache, **OPTIONS)
    check(model, found, without_padding(inputs), **rest)
    assert np.array_equal(found["sequences"][:, :8], inputs["input_ids"])


@pytest.mark.parametrize("name", ["plain", "relative_key_query"])
@pytest.mark.parametrize("padding", PROMPTS)
def test_every_padding(backend, padding, name):
    model, inputs = decoder(backend, name), PROMPTS[padding]
    found = generate(model, inputs, **OPTIONS)
    check(model, found, without_padding(inputs))
    if name == "plain":  # what no mask says is known by the pad tokens
        again = generate(model, {"input_ids": inputs["input_ids"]}, **OPTIONS)
        assert np.array_equal(again["sequences"], found["sequences"])


def test_the_pad_token_may_come(backend):
    """It has the position of padding, and is attended to: as in a call whose mask is 1 there."""
    model = decoder(backend, "relative_key", seed=0)
    inputs = PROMPTS["padding on every side"]
    found = generate(model, inputs, **OPTIONS, eos_token_id=39)
    assert np.any(found["sequences"][1, 8:-1] == PAD)
    check(model, found, without_padding(inputs), eos=(39,))
    absolute = decoder(backend, "plain", seed=1)
    found = generate(absolute, inputs, **OPTIONS, suppress_tokens=[t for t in range(40) if t not in (PAD, 7)])
    texts = [np.append(text, row) for text, row in zip(without_padding(inputs), found["sequences"][:, 8:], strict=True)]
    expected = logits_of(absolute, texts, WIDTH)
    for row, text in enumerate(without_padding(inputs)):
        behind = expected[row, len(text) - 1 :][:NEW]
        np.testing.assert_allclose(found["logits"][:, row], behind, rtol=0, atol=TOLERANCE)
    assert np.any(found["sequences"][:, 8:-1] == PAD)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("padding", ["no padding", "left padding", "right padding"])
def test_embeddings(backend, padding, use_cache):
    """A call on the embeddings as they were given, padding included, and those of the new tokens behind them."""
    model = decoder(backend)
    embeds, mask = np.random.default_rng(5).standard_normal((3, 6, 32)), PROMPTS[padding]["attention_mask"]
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    found = generate(model, inputs, use_cache=use_cache, suppress_tokens=[PAD, EOS], **OPTIONS)
    new = found["sequences"]
    assert new.shape == (3, NEW)
    table = model.get_input_embeddings()
    table = np.asarray(table.weight.detach() if backend == "pt" else getattr(table, "embeddings", table))
    whole = {
        "inputs_embeds": np.concatenate((embeds, table[new]), axis=1),
        "attention_mask": np.concatenate((mask, np.ones_like(new)), axis=1),
    }
    expected = forward(model, whole)
    last = [np.flatnonzero(row)[-1] for row in mask]
    np.testing.assert_allclose(found["logits"][0], expected[range(3), last], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found["logits"][1:], expected[:, 6:-1].swapaxes(0, 1), rtol=0, atol=TOLERANCE)
    assert not np.isin(new, (PAD, EOS)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype(backend, dtype):
    """Scores are in float32. Its roundings are 6e-8, those of bfloat16 4e-3 and of float16 5e-4, on logits up to 8."""
    tolerance = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}[dtype]
    model, inputs = decoder(backend, "one layer", dtype), PROMPTS["padding on every side"]
    how = next(iter(COMPILED[backend].values()))
    found, texts = generate(model, inputs, output_scores=True, **OPTIONS, **how), without_padding(inputs)
    assert found["logits"].dtype == found["scores"].dtype == found["log_probs"].dtype == np.float32
    new = found["sequences"][:, 8:]
    assert np.array_equal(new[:, 0], found["logits"][0].argmax(axis=-1))
    whole = logits_of(model, [np.append(text, row) for text, row in zip(texts, new, strict=True)], WIDTH)
    for row, text in enumerate(texts):
        steps = new.shape[1] if EOS not in new[row] else new[row].tolist().index(EOS) + 1
        behind = whole[row, len(text) - 1 :][:steps]
        np.testing.assert_allclose(found["logits"][:steps, row], behind, rtol=0, atol=tolerance)
    if dtype == "bfloat16":
        drawn = {"num_beams": 3, "do_sample": True, "seed": 0, "top_p": 0.9, "typical_p": 0.9}
        assert np.isfinite(generate(model, inputs, max_new_tokens=4, **drawn, **how)["log_probs"]).all()


@pytest.mark.parametrize("wrong", ["positions", "a token", "a row"])
def test_something_wrong_is_seen(backend, wrong):
    """The control."""
    model, inputs = decoder(backend), PROMPTS["left padding"]
    found, texts = generate(model, inputs, **OPTIONS), without_padding(inputs)
    found["sequences"] = found["sequences"].copy()
    check(model, found, texts)
    if wrong == "positions":
        with pytest.raises(AssertionError):
            check(model, found, texts, position_ids=np.broadcast_to(np.arange(WIDTH), (3, WIDTH)).copy())
        return
    if wrong == "a token":
        found["sequences"][0, -1] = 7
    else:
        found = {**found, "logits": found["logits"][:, ::-1], "sequences": found["sequences"][::-1]}
    with pytest.raises(AssertionError):
        check(model, found, texts)
