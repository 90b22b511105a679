"""What is particular to TensorFlow and Keras."""

import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from roberta_pln.checks import InputError
from roberta_pln.outputs import BaseModelOutput, MaskedLMOutput
from roberta_pln.tf import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel
from tests.contract import INPUTS, random_ids, tiny_config

IDS = random_ids()
MASK = INPUTS["right padding"]["attention_mask"]
POLICIES = ["float64", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"]


def masked_lm(**changes):
    return RobertaPreLayerNormForMaskedLM(tiny_config(**changes), seed=0)


@pytest.fixture(scope="module")
def model():
    return masked_lm()


CALLS = {
    "by position": lambda model: model(IDS, MASK),
    "by name": lambda model: model(input_ids=IDS, attention_mask=MASK),
    "a mapping": lambda model: model({"attention_mask": MASK, "input_ids": IDS}),
    "a mapping and a name": lambda model: model({"input_ids": IDS}, attention_mask=MASK),
    "a list in order": lambda model: model([IDS, MASK]),
    "a tuple with None": lambda model: model((IDS, MASK, None)),
    "nested lists": lambda model: model(IDS.tolist(), attention_mask=MASK.tolist()),
    "tensors of int32": lambda model: model(tf.constant(IDS, tf.int32), tf.constant(MASK, tf.int32)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_form_of_call(model, name):
    np.testing.assert_array_equal(CALLS[name](model).logits, model(IDS, attention_mask=MASK).logits)


def test_embeddings_without_a_first_argument(model):
    embeddings = INPUTS["embeddings"]["inputs_embeds"]
    expected = model(None, inputs_embeds=embeddings).logits
    np.testing.assert_array_equal(model(inputs_embeds=embeddings).logits, expected)
    np.testing.assert_array_equal(model({"inputs_embeds": embeddings}).logits, expected)


def test_calls_that_are_refused(model):
    with pytest.raises(InputError, match=r"was given no argument \['ids'\]; its arguments are \['input_ids'"):
        model({"input_ids": IDS, "ids": IDS})
    with pytest.raises(InputError, match=r"was given \['attention_mask'\] twice"):
        model({"input_ids": IDS, "attention_mask": MASK}, MASK)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ids'"):
        model(IDS, ids=IDS)


def test_a_model_is_built_when_it_is_constructed():
    model = masked_lm()
    assert model.built
    assert len(model.trainable_weights) == len(model.parameters_of_schema)
    assert model.num_parameters() == model.count_params() == 19437
    assert not RobertaPreLayerNormModel(tiny_config(), trainable=False).trainable_weights


def test_the_decoder_shares_the_word_table(model):
    assert model.lm_head.decoder is None
    untied = masked_lm(tie_word_embeddings=False)
    assert untied.lm_head.decoder.kernel.shape == (32, 99)
    assert untied.num_parameters() == model.num_parameters() + 99 * 32
    word_table = model.roberta_prelayernorm.embeddings.word_embeddings.embeddings
    with tf.GradientTape() as tape:
        loss = model(INPUTS["pads that are seen"]["input_ids"], labels=IDS).loss
    gradient = tf.convert_to_tensor(tape.gradient(loss, word_table.value))
    assert np.count_nonzero(gradient[1])  # the pad row learns through the decoder alone


def test_pads_send_no_gradient_to_the_tables():
    model = RobertaPreLayerNormModel(tiny_config(), seed=0)
    tables = [model.embeddings.word_embeddings.embeddings, model.embeddings.position_embeddings.embeddings]
    with tf.GradientTape() as tape:
        scalar = tf.nn.l2_loss(model(INPUTS["pads that are seen"]["input_ids"]).last_hidden_state)
    for gradient in tape.gradient(scalar, [table.value for table in tables]):
        gradient = tf.convert_to_tensor(gradient).numpy()
        assert np.count_nonzero(gradient[1]) == 0
        assert np.count_nonzero(gradient) > 0


def test_gradients_are_dense():
    """Keras' optimizers take slices of the same row for those of several."""
    model = masked_lm(position_embedding_type="relative_key")
    with tf.GradientTape() as tape:
        loss = model(np.repeat(IDS, 2, axis=1)[:, :11], labels=IDS).loss
    gradients = tape.gradient(loss, [weight.value for weight in model.weights])
    assert not any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients)


def test_seeds():
    one, same, other = (RobertaPreLayerNormForMaskedLM(tiny_config(), seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one.weights, same.weights, strict=True))
    assert not np.array_equal(one.lm_head.dense.kernel, other.lm_head.dense.kernel)
    wide = RobertaPreLayerNormForMaskedLM(tiny_config(), seed=1, dtype="float64")
    assert np.array_equal(wide.lm_head.dense.kernel, one.lm_head.dense.kernel)
    keras.utils.set_random_seed(5)
    first = RobertaPreLayerNormModel(tiny_config())
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(RobertaPreLayerNormModel(tiny_config())(IDS)[0], first(IDS)[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    model = RobertaPreLayerNormForMaskedLM(tiny_config(), seed=0, dtype=policy)
    expected = keras.DTypePolicy(policy)
    inputs = INPUTS["a fully masked row"]
    record = model(**inputs, labels=IDS, output_attentions=True)
    assert {variable.dtype for variable in model.weights} == {expected.variable_dtype}
    assert record.logits.dtype == record.attentions[0].dtype == expected.compute_dtype
    assert record.loss.dtype == ("float64" if policy == "float64" else "float32")
    assert np.isfinite(record.logits.numpy().astype(float)).all()
    eps = ml_dtypes.finfo(record.logits.dtype.as_numpy_dtype).eps
    # a row without keys attends to all of them alike; some processors multiply with the reciprocal, a rounding more
    row = record.attentions[0][1].numpy()
    assert np.all(row == row.flat[0])
    np.testing.assert_allclose(row.astype(float), 1 / 11, rtol=float(eps))
    # the same seed gives the same weights but for rounding: a few spacings of numbers up to 4
    exact = RobertaPreLayerNormForMaskedLM(tiny_config(), seed=0, dtype="float64")(**inputs).logits
    np.testing.assert_allclose(record.logits.numpy().astype(float), exact, rtol=0, atol=16 * float(eps))


def test_norms_of_mixed_precision_are_in_float32():
    """The weights of the norm are not rounded to the compute dtype before they are used."""
    model = RobertaPreLayerNormModel(tiny_config(num_hidden_layers=0), seed=0, dtype="mixed_float16")
    model.LayerNorm.gamma.assign(np.full(32, 2049.0))  # float16 would make it 2048
    model.LayerNorm.beta.assign(np.full(32, -2048.0))
    states = np.repeat([1.0, -1.0], 16).astype(np.float16)[None, None]
    first = model.LayerNorm(states).numpy()[0, 0, 0]
    assert first == pytest.approx(2049 / np.sqrt(1 + 1e-5) - 2048, abs=1e-3)  # the roundings of 2049 in float32


def test_records_in_trees(model):
    record = model(IDS, output_hidden_states=True)
    for tree in (keras.tree, tf.nest):
        doubled = tree.map_structure(lambda value: 2 * value, record)
        assert type(doubled) is MaskedLMOutput
        assert doubled.loss is None
        np.testing.assert_array_equal(doubled.hidden_states[1], 2 * record.hidden_states[1])
        assert len(tree.flatten(record)) == 1 + 3


ORDER = ("last_hidden_state", "pooler_output", "past_key_values", "hidden_states", "attentions", "cross_attentions")


def test_the_cache_comes_before_the_hidden_states():
    """Through every tree, and in the tuple that has the cache in all backends."""
    model = RobertaPreLayerNormModel(tiny_config(is_decoder=True, add_cross_attention=True), seed=0)
    states = np.zeros((3, 5, 32), np.float32)
    flags = dict(output_hidden_states=True, output_attentions=True)

    def call(ids):
        return model(ids, encoder_hidden_states=states, **flags)

    record = call(IDS)
    same = [record, tf.function(call)(IDS), keras.tree.map_structure(tf.identity, record)]
    for other in (*same, tf.nest.map_structure(tf.identity, record), pickle.loads(pickle.dumps(record))):
        assert isinstance(other, BaseModelOutput)
        assert other.keys() == tuple(other) == ORDER
        assert other[2] is other.past_key_values
        assert other[3] is other.hidden_states
    assert BaseModelOutput(**dict(record.items())).keys()[2] == "hidden_states"  # the order of the other backends
    plain = model(IDS, encoder_hidden_states=states, return_dict=False, **flags)
    tf.nest.map_structure(np.testing.assert_array_equal, plain, record.to_tuple())
    assert model(IDS, encoder_hidden_states=states).keys() == ORDER[:3]


def test_functional_models(model):
    ids, mask = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    record = model(ids, attention_mask=mask)
    assert isinstance(record, MaskedLMOutput)
    assert record.logits.shape == (None, None, 99)
    np.testing.assert_allclose(
        keras.Model([ids, mask], record.logits)([IDS, MASK]), model(IDS, MASK).logits, rtol=0, atol=1e-6
    )  # float32, with other kernels for open shapes
    assert isinstance(keras.Model([ids, mask], record)([IDS, MASK]), MaskedLMOutput)


def test_plain_tuples(model):
    logits, states = model(IDS, output_hidden_states=True, return_dict=False)
    assert logits.shape == (3, 11, 99)
    assert len(states) == 3
    loss, _ = model(IDS, labels=IDS, return_dict=False)
    assert loss.shape == ()
    assert RobertaPreLayerNormModel(tiny_config(), add_pooling_layer=False)(IDS, return_dict=False)[1] is None


def test_empty_batches(model):
    assert model(np.zeros((0, 5), int)).logits.shape == (0, 5, 99)
    assert model(np.zeros((2, 0), int)).logits.shape == (2, 0, 99)


def test_the_base_model_of_a_base_model_is_itself(model):
    base = RobertaPreLayerNormModel(tiny_config())
    assert base.base_model is base
    assert model.base_model is model.roberta_prelayernorm
    assert isinstance(model.base_model(IDS), BaseModelOutput)


def test_the_names_of_transformers():
    import roberta_pln.tf as package

    assert package.TFRobertaPreLayerNormModel is RobertaPreLayerNormModel
    assert package.TFRobertaPreLayerNormForMaskedLM is RobertaPreLayerNormForMaskedLM


def test_another_backend_of_keras_is_refused():
    code = """
import types, sys
keras = types.ModuleType("keras")
keras.backend = types.SimpleNamespace(backend=lambda: "jax")
sys.modules["keras"] = keras
import roberta_pln.tf
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: roberta_pln.tf needs Keras with TensorFlow, and Keras runs with 'jax'" in result.stderr
    assert "KERAS_BACKEND=tensorflow" in result.stderr
