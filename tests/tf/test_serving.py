"""Keras' `export`: what is loaded without this library gives the numbers of the model, for every batch and length."""

import subprocess
import sys

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from roberta_pln import schema
from roberta_pln import tf as backend
from tests.contract import random_ids, tiny_config

ROUNDINGS = 1e-6  # float32, with other kernels for open shapes
NAMES = ("input_ids", "attention_mask", "token_type_ids")
ALL = {"output_hidden_states": True, "output_attentions": True}

CASES = {
    **{head: (head, {}) for head in schema.HEADS},
    "with states, attentions and a cache": ("Model", {"is_decoder": True, **ALL}),
    "without layers, as tuples": ("Model", {"num_hidden_layers": 0, "return_dict": False, "is_decoder": True, **ALL}),
}


def built(head: str, **changes):
    config = tiny_config(**{"num_hidden_layers": 1, "initializer_range": 0.1, **changes})
    return getattr(backend, schema.architecture(head))(config, seed=0)


def inputs(head: str, batch: int, length: int) -> dict[str, np.ndarray]:
    ids = random_ids(2 * batch, length)
    mask = np.arange(length) < np.arange(2 * batch)[:, None] + 2
    arrays = (array.astype(np.int32) for array in (ids, mask, ids % 2))
    return {
        name: array.reshape(batch, 2, length) if head == "ForMultipleChoice" else array[:batch]
        for name, array in zip(NAMES, arrays, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_model(case, tmp_path):
    head, changes = CASES[case]
    model = built(head, **changes)
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    for batch, length in ((1, 1), (3, 11), (2, 7)):
        arrays = inputs(head, batch, length)
        expected = model(**arrays, return_dict=True)
        assert_same(loaded.serve(arrays), expected)
        tensors = {name: tf.constant(array) for name, array in arrays.items()}
        assert_same(loaded.signatures["serving_default"](**tensors), expected)


def assert_same(found, record):
    assert set(found) == {name for name, value in record.items() if len(value)}
    for name, value in found.items():
        np.testing.assert_allclose(value, np.asarray(record[name]), rtol=0, atol=ROUNDINGS)


def test_what_is_written_needs_no_code_of_this_library(tmp_path):
    model = built("ForMaskedLM")
    model.export(tmp_path, verbose=False)
    code = f"""
import sys, tensorflow as tf
loaded = tf.saved_model.load({str(tmp_path)!r})
ids = tf.constant([[5, 6, 7]])
inputs = dict(input_ids=ids, attention_mask=tf.ones_like(ids), token_type_ids=tf.zeros_like(ids))
logits = loaded.serve(inputs)["logits"]
assert not any(name.startswith(("roberta_pln", "keras")) for name in sys.modules)
print(float(logits[0, 1, 9]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(float(model([[5, 6, 7]]).logits[0, 1, 9]), abs=ROUNDINGS)


def test_a_signature_of_ones_own(tmp_path):
    """Embeddings, encoder states and a cache, whose parts are named one by one."""
    model = built("ForCausalLM", is_decoder=True, add_cross_attention=True)
    states = tf.TensorSpec((None, None, 32), tf.float32)
    model.export(tmp_path, verbose=False, input_signature=[{"inputs_embeds": states, "encoder_hidden_states": states}])
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal((2, length, 32)).astype(np.float32)
        for name, length in (("inputs_embeds", 3), ("encoder_hidden_states", 5))
    }
    loaded = tf.saved_model.load(tmp_path)
    found = loaded.serve(arrays)
    expected = dict(model(**arrays).named_arrays())
    assert found.keys() == expected.keys() == {"logits", *(f"past_key_values.0.{part}" for part in range(4))}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=ROUNDINGS)


def test_inputs_by_position(tmp_path):
    model = built("ForMaskedLM")
    model.gradient_checkpointing_enable()  # which is for training, and in nobody's way here
    spec = tf.TensorSpec((None, 4), tf.int64)
    model.export(tmp_path, "tf_saved_model", False, [spec, spec])
    ids, loaded = random_ids(2, 4), tf.saved_model.load(tmp_path)
    found = loaded.serve(ids, np.ones_like(ids))["logits"]
    np.testing.assert_allclose(found, model(ids).logits, rtol=0, atol=ROUNDINGS)
    with pytest.raises(TypeError):
        loaded.serve(random_ids(2, 5), np.ones((2, 5), int))
