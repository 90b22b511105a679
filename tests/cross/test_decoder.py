"""A decoder called step by step over its cache computes what one call on the whole sequence does.

In float64, within 1e-13: some hundred roundings of 1e-16 of numbers near 1.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends
from roberta_pln.checks import InputError
from tests.contract import PAD, load, padded, precision, random_checkpoint, random_ids, tiny_config

TOLERANCE = 1e-13
CROSS = {"add_cross_attention": True}
STATES = {
    "encoder_hidden_states": np.random.default_rng(3).standard_normal((3, 5, 32)),
    "encoder_attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]),
}

CONFIGS = {
    "plain": {},
    "with an encoder": CROSS,
    "relative_key": {"position_embedding_type": "relative_key"},
    "relative_key_query": {"position_embedding_type": "relative_key_query"},
    "pruned heads": {"pruned_heads": {0: [1, 3], 1: [0]}},
    "pruned heads, with an encoder": {"pruned_heads": {0: [1, 3], 1: [0]}, **CROSS},
}
STEPS = {"token by token": (1, 1, 1, 8), "a prompt, then tokens": (9, 1, 1), "two halves": (5, 6)}


@pytest.fixture(params=backends.installed())
def backend(request):
    with precision(request.param, "float64"):
        yield request.param


@cache
def decoder(backend: str, name: str = "plain", head: str = "ForCausalLM"):
    config = tiny_config(is_decoder=True, **CONFIGS[name])
    with tempfile.TemporaryDirectory() as folder, precision(backend, "float64"):
        return load(backend, random_checkpoint(Path(folder), config, head), head)


def steps_over(model, lengths, rows, mask=None, positions=None, name="input_ids", **rest) -> np.ndarray:
    """Logits of the steps, one behind the other: each step gets its rows, its positions, and the mask so far."""
    past, start, logits = None, 0, []
    for length in lengths:
        step = slice(start, start := start + length)
        record = model(
            **{name: rows[:, step]},
            attention_mask=None if mask is None else mask[:, :start],
            position_ids=None if positions is None else positions[:, step],
            past_key_values=past,
            **rest,
        )
        past = record.past_key_values
        logits.append(array(record.logits))
    return np.concatenate(logits, axis=1)


def array(tensor) -> np.ndarray:
    return np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)


def close(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(left - right).max() <= TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", STEPS)
def test_steps_are_the_full_pass(backend, name, lengths):
    model, rest = decoder(backend, name), STATES if "encoder" in name else {}
    rows = padded(random_ids(), (0, slice(8, None)), (2, slice(10, None)))
    ids, mask = rows["input_ids"], rows["attention_mask"]
    full = array(model(ids, attention_mask=mask, **rest).logits)
    assert close(steps_over(model, STEPS[lengths], ids, mask, **rest), full)


@pytest.mark.parametrize("name", ["plain", "relative_key_query", "with an encoder"])
@pytest.mark.parametrize("side", ["left", "inside"])
def test_padding_before_tokens_needs_positions(backend, name, side):
    """The rule of positions counts what is cached, pads included, so that after pads it needs to be told better."""
    model, rest = decoder(backend, name), STATES if "encoder" in name else {}
    pads = [(0, slice(0, 4)), (2, slice(0, 1))] if side == "left" else [(0, slice(2, 4)), (1, slice(5, 6))]
    rows = padded(random_ids(), *pads)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    positions = np.where(mask > 0, PAD + mask.cumsum(axis=1), PAD)
    full = array(model(ids, attention_mask=mask, **rest).logits)
    tokens = mask > 0  # in a row whose first tokens are pads, these see no key in the full pass and fewer in the steps
    assert close(steps_over(model, STEPS["a prompt, then tokens"], ids, mask, positions, **rest)[tokens], full[tokens])
    automatic = steps_over(model, STEPS["a prompt, then tokens"], ids, mask, **rest)
    assert close(automatic[tokens], full[tokens]) == (name == "relative_key_query")  # the control


def test_embeddings_continue_the_positions(backend):
    model = decoder(backend)
    rows = np.random.default_rng(5).standard_normal((3, 11, 32))
    full = array(model(inputs_embeds=rows).logits)
    assert close(steps_over(model, STEPS["two halves"], rows, name="inputs_embeds"), full)


def test_patterns_over_the_cache(backend):
    """A complete pattern is (B, T, S): the new queries over the cached and the new keys."""
    model, ids = decoder(backend), random_ids()
    pattern = np.tril(np.random.default_rng(4).integers(0, 2, (3, 11, 11)) | np.eye(11, dtype=int))
    full = array(model(ids, attention_mask=pattern).logits)
    first = model(ids[:, :6], attention_mask=pattern[:, :6, :6])
    second = model(ids[:, 6:], attention_mask=pattern[:, 6:], past_key_values=first.past_key_values)
    assert close(array(second.logits), full[:, 6:])


def test_a_cache_is_a_value(backend):
    """Calling twice with the same cache gives the same; only a decoder that is asked for one returns it."""
    model, ids = decoder(backend), random_ids()
    past = model(ids[:, :6]).past_key_values
    once, again = (model(ids[:, 6:], past_key_values=past) for _ in range(2))
    assert np.array_equal(array(once.logits), array(again.logits))
    assert past[0][0].shape == (3, 4, 6, 8)
    assert once.past_key_values[0][0].shape == (3, 4, 11, 8)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None


def test_forms_of_a_cache(backend):
    """Cross keys and values may be there, absent, or None; the tuples may be lists."""
    model, ids = decoder(backend, "with an encoder"), random_ids()
    past = model(ids[:, :6], **STATES).past_key_values
    expected = array(model(ids[:, 6:], past_key_values=past, **STATES).logits)
    forms = [
        tuple(layer[:2] for layer in past),
        tuple((*layer[:2], None, None) for layer in past),
        [list(layer) for layer in past],
    ]
    for form in forms:
        assert close(array(model(ids[:, 6:], past_key_values=form, **STATES).logits), expected)


def test_an_encoder_has_no_cache(backend, tmp_path):
    """It neither makes one nor reads one."""
    model, ids = load(backend, random_checkpoint(tmp_path, tiny_config(), "Model"), "Model"), random_ids()
    past = decoder(backend, head="Model")(ids).past_key_values
    record = model(ids, past_key_values=past, use_cache=True)
    assert record.past_key_values is None
    assert np.array_equal(array(record.last_hidden_state), array(model(ids).last_hidden_state))


def test_without_layers(backend, tmp_path):
    config = tiny_config(is_decoder=True, num_hidden_layers=0)
    model = load(backend, random_checkpoint(tmp_path, config, "ForCausalLM"), "ForCausalLM")
    past = model(random_ids()).past_key_values
    assert len(past) == 0
    assert model(random_ids(), past_key_values=past).logits.shape == (3, 11, 99)


REFUSED = {
    "another batch": ((), lambda past: [[part[:2] for part in layer] for layer in past], r"\[0\]\[0\] must have shape"),
    "fewer layers": ((), lambda past: past[:1], "an item for each of the 2 layers, got 1"),
    "layers of two lengths": (
        (),
        lambda past: [past[0], [part[:, :, :4] for part in past[1]]],
        r"past_key_values\[1\]\[0\] must have shape \(3, 4, 6, 8\), got \(3, 4, 4, 8\)",
    ),
    "values of another length": (
        (),
        lambda past: [(past[0][0], past[0][1][:, :, :4]), past[1]],
        r"past_key_values\[0\]\[1\] must have shape \(3, 4, 6, 8\), got \(3, 4, 4, 8\)",
    ),
    "three parts": (
        (),
        lambda past: [(*layer, layer[0]) for layer in past],
        r"past_key_values\[0\] must hold self keys and values, .* got 3 items",
    ),
    "cross keys without an encoder": (
        (),
        lambda past: [(*layer, *layer) for layer in past],
        r"past_key_values\[0\] holds cross keys and values, .* encoder_hidden_states only: give them in every call",
    ),
    "cross keys of another encoder": (
        ("with an encoder",),
        lambda past: [(*layer[:2], layer[2][:, :, :4], layer[3][:, :, :4]) for layer in past],
        r"past_key_values\[0\]\[2\] must have shape \(3, 4, 5, 8\), got \(3, 4, 4, 8\)",
    ),
    "an object": ((), lambda past: object(), "past_key_values must be what an earlier call returned, .* got object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_caches_that_are_refused(backend, name):
    config, change, message = REFUSED[name]
    model, ids, rest = decoder(backend, *config), random_ids(), STATES if config else {}
    past = change(model(ids[:, :6], **rest).past_key_values)
    with pytest.raises(InputError, match=message):
        model(ids[:, 6:], past_key_values=past, **rest)


def test_a_mask_covers_the_cache(backend):
    model, ids = decoder(backend), random_ids()
    past = model(ids[:, :6]).past_key_values
    with pytest.raises(InputError, match=r"attention_mask must have shape \(3, 11\) .* got \(3, 5\)"):
        model(ids[:, 6:], attention_mask=np.ones((3, 5), int), past_key_values=past)
    with pytest.raises(InputError, match=r"at most 38 tokens .* got 39 \(6 cached and 33 new\)"):
        model(random_ids(3, 33), past_key_values=past)


def test_encoder_states_need_layers_that_read_them(backend):
    with pytest.raises(InputError, match="has to be instantiated with cross-attention layers"):
        decoder(backend)(random_ids(), **STATES)
    with pytest.raises(InputError, match=r"encoder_hidden_states must have shape \(3, any, 32\), got \(3, 5, 31\)"):
        decoder(backend, "with an encoder")(random_ids(), encoder_hidden_states=np.zeros((3, 5, 31)))


@pytest.mark.parametrize("switch", ["use_cache", "output_attentions", "output_hidden_states", "return_dict"])
def test_switches_are_known_values(backend, switch):
    with pytest.raises(InputError, match=f"{switch} must be True or False, .* got (ndarray|EagerTensor)"):
        decoder(backend)(random_ids(), **{switch: np.ones(())})
