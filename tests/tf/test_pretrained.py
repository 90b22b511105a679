"""Loading and saving, by this library and by Keras."""

import copy
import pickle

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import memory, stored
from roberta_pln.tf import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel, weights
from tests.contract import random_checkpoint, random_ids, random_tensors, tiny_config

IDS = random_ids()


@pytest.fixture
def saved(tmp_path):
    return random_checkpoint(tmp_path, tiny_config(), "ForMaskedLM")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", tf.bfloat16, np.float16])
def test_loading_in_every_dtype(dtype, saved, tmp_path):
    loaded = RobertaPreLayerNormForMaskedLM.from_pretrained(saved, dtype=dtype)
    name = keras.dtype_policies.get(dtype).name
    assert loaded.dtype_policy.name == loaded.config.dtype == loaded.dtype == name
    expected = random_tensors(tiny_config(), "ForMaskedLM")["lm_head.dense.weight"].T
    np.testing.assert_array_equal(loaded.lm_head.dense.kernel, tf.cast(expected, name))
    loaded.save_pretrained(tmp_path / "again")
    again = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype_policy.name == name
    assert all(np.array_equal(a, b) for a, b in zip(again.weights, loaded.weights, strict=True))


def test_mixed_precision_keeps_float32_weights(saved):
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(saved, dtype="mixed_bfloat16")
    assert model.config.dtype == model.lm_head.bias.dtype == "float32"
    assert model(IDS).logits.dtype == "bfloat16"


def test_the_policy_of_keras_is_the_default(saved):
    assert RobertaPreLayerNormForMaskedLM.from_pretrained(saved).dtype_policy.name == "float32"
    keras.config.set_dtype_policy("mixed_float16")
    try:
        assert RobertaPreLayerNormForMaskedLM.from_pretrained(saved).dtype_policy.name == "mixed_float16"
        assert RobertaPreLayerNormForMaskedLM(tiny_config()).dtype_policy.name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("format", ["safetensors", "h5"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"is_decoder": True, "add_cross_attention": True}, {"pruned_heads": {0: [1]}}],
    ids=str,
)
def test_every_tensor_survives(format, changes, tmp_path):
    config = tiny_config(**changes)
    expected = random_tensors(config, "ForMaskedLM")
    random_checkpoint(tmp_path, config, "ForMaskedLM")
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again", safe_serialization=format == "safetensors")
    assert (tmp_path / "again" / checkpoint.FILES[format]).is_file()
    saved = checkpoint.open(tmp_path / "again")
    assert set(saved) == set(expected)
    assert all(np.array_equal(saved[name], expected[name]) for name in expected)


def test_a_head_from_a_base_model_and_back(tmp_path):
    RobertaPreLayerNormModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"newly initialised: lm_head\.dense\.weight"):
        model, info = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path, seed=3, output_loading_info=True)
    assert info["missing_keys"] == [name for name in schema.expand(tiny_config(), "ForMaskedLM") if "lm_head" in name]
    kernel = model.lm_head.dense.kernel.numpy()
    assert 0.01 < kernel.std() < 0.03  # drawn, not left empty
    assert np.all(model.lm_head.layer_norm.gamma.numpy() == 1)
    with pytest.warns(UserWarning, match="newly initialised"):
        again = RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path, seed=3)
    np.testing.assert_array_equal(again.lm_head.dense.kernel, kernel)
    model.save_pretrained(tmp_path / "head")
    base = RobertaPreLayerNormModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    np.testing.assert_array_equal(base(IDS).last_hidden_state, model.roberta_prelayernorm(IDS).last_hidden_state)


def test_loading_draws_nothing(saved, monkeypatch):
    """The weights that are about to be loaded are not initialised first."""
    monkeypatch.setattr(keras.random, "normal", lambda *_, **__: pytest.fail("drew random numbers"))
    RobertaPreLayerNormForMaskedLM.from_pretrained(saved)


def test_weights_of_keras(saved, tmp_path):
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(saved)
    model.save_weights(tmp_path / "model.weights.h5")
    other = RobertaPreLayerNormForMaskedLM(tiny_config())
    other.load_weights(tmp_path / "model.weights.h5")
    tensors = weights.dump(other)
    assert all(np.array_equal(tensors[name], array) for name, array in weights.dump(model).items())


@pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16"])
def test_models_of_keras(dtype, tmp_path):
    model = RobertaPreLayerNormModel(tiny_config(), add_pooling_layer=False, dtype=dtype, name="mine")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is RobertaPreLayerNormModel
    assert (loaded.name, loaded.dtype_policy.name, loaded.config) == ("mine", dtype, model.config)
    np.testing.assert_array_equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_checkpoints_of_tensorflow(saved, tmp_path):
    model, other = RobertaPreLayerNormForMaskedLM.from_pretrained(saved), RobertaPreLayerNormForMaskedLM(tiny_config())
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    assert all(np.array_equal(a, b) for a, b in zip(other.weights, model.weights, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied, saved):
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(saved)
    other = copied(model)
    np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)
    other.lm_head.bias.assign(other.lm_head.bias + 1)
    assert not np.array_equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [0, 4, 16])
def test_memory_is_taken_over_only_where_tensorflow_can_work_in_it(shift, dtype):
    dtype = stored.DTYPES[dtype]
    array = memory.empty((4096 + shift,), np.dtype(np.uint8))[shift : shift + 4096].view(dtype)
    array[:] = 1
    variable = tf.Variable(weights.to_tensor(array))
    array[0] = 2
    assert variable[0] == (1 if shift else 2)
    variable.assign_add(tf.ones_like(variable))  # in place; the allocator of TensorFlow checks the alignment
    np.testing.assert_array_equal(variable[1:], np.full(len(array) - 1, 2, dtype))


def test_training_leaves_the_file_as_it_is(saved):
    before = (saved / "model.safetensors").read_bytes()
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(saved)
    for variable in model.weights:
        variable.assign_add(tf.ones_like(variable))
    assert (saved / "model.safetensors").read_bytes() == before
    again = RobertaPreLayerNormForMaskedLM.from_pretrained(saved)
    assert all(np.array_equal(a + 1, b) for a, b in zip(again.weights, model.weights, strict=True))


def test_every_variable_is_listed_once(saved):
    model = RobertaPreLayerNormForMaskedLM.from_pretrained(saved)
    assert len({variable.path for variable in model.variables}) == len(model.variables) == len(model.weights) + 1
    model.compile()
    trainable = model.get_state_tree()["trainable_variables"]
    assert len(keras.tree.flatten(trainable)) == len(model.weights)


def test_the_outline_of_the_schema_is_checked():
    model = RobertaPreLayerNormModel(tiny_config())
    model.embeddings.extra = model.embeddings.LayerNorm.add_weight((3,), name="extra")
    with pytest.raises(RuntimeError, match="parameters differ from the schema.*extra"):
        weights.check(model)
