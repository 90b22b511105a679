"""Compiled: `tf.function` with and without XLA gives the records of eager calls, for open shapes too."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from roberta_pln.checks import InputError
from roberta_pln.outputs import BaseModelOutput, MaskedLMOutput
from roberta_pln.tf import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel
from roberta_pln.tf.losses import cross_entropy
from tests.contract import CONFIGS, INPUTS, random_ids, tiny_config, with_labels

IDS = random_ids()
ROUNDINGS = 1e-13  # of 1e-16 each, a few hundred: other orders of summation
XLA = pytest.mark.parametrize("xla", [False, True], ids=["graph", "xla"])


def masked_lm(**changes):
    config = tiny_config(**{"num_hidden_layers": 1, **changes})
    return RobertaPreLayerNormForMaskedLM(config, seed=0, dtype="float64")


def tensors(inputs):
    return {name: tf.constant(value) for name, value in inputs.items()}


def assert_same(ours, expected):
    assert type(ours) is type(expected)
    assert ours.keys() == expected.keys()
    for one, other in zip(tf.nest.flatten(ours), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDINGS)


@XLA
def test_records(xla):
    model = masked_lm()
    inputs = tensors(with_labels(INPUTS["a fully padded row"]))
    flags = dict(output_hidden_states=True, output_attentions=True)
    compiled = tf.function(lambda inputs: model(inputs, **flags), jit_compile=xla)
    record = compiled(inputs)
    assert isinstance(record, MaskedLMOutput)
    assert_same(record, model(inputs, **flags))


@XLA
def test_the_cache(xla):
    model = RobertaPreLayerNormModel(tiny_config(is_decoder=True), seed=0, dtype="float64")
    compiled = tf.function(lambda ids, past: model(ids, past_key_values=past), jit_compile=xla)
    past = compiled(IDS[:, :6], None).past_key_values
    record = compiled(IDS[:, 6:], past)
    assert isinstance(record, BaseModelOutput)
    np.testing.assert_allclose(record.last_hidden_state, model(IDS).last_hidden_state[:, 6:], rtol=0, atol=ROUNDINGS)


@pytest.mark.parametrize("name", ["relative_key_query", "decoder", "chunked feed-forward", "no layers"])
def test_open_shapes(name):
    """One trace for every batch and length."""
    model = masked_lm(**CONFIGS[name])
    spec = tf.TensorSpec((None, None), tf.int64)

    @tf.function(input_signature=[spec, spec])
    def compiled(ids, mask):
        return model(ids, mask, output_hidden_states=True, output_attentions=True)

    for batch, length in ((1, 11), (3, 11), (2, 22)):
        ids = random_ids(batch, length)
        mask = np.ones_like(ids)
        mask[0, length // 2 :] = 0
        assert_same(compiled(ids, mask), model(ids, mask, output_hidden_states=True, output_attentions=True))


def test_open_shapes_with_a_cache_and_embeddings():
    config = tiny_config(is_decoder=True, position_embedding_type="relative_key_query")
    model = RobertaPreLayerNormModel(config, seed=0, dtype="float64")
    past = tf.TensorSpec((None, 4, None, 8), tf.float64)

    @tf.function(input_signature=[tf.TensorSpec((None, None, 32), tf.float64), ((past, past), (past, past))])
    def compiled(embeddings, past):
        return model(inputs_embeds=embeddings, past_key_values=past)

    embeddings = INPUTS["embeddings"]["inputs_embeds"]
    past = model(inputs_embeds=embeddings[:, :4]).past_key_values
    assert_same(compiled(embeddings[:, 4:], past), model(inputs_embeds=embeddings[:, 4:], past_key_values=past))


BAD = {
    "an id above the vocabulary": ("input_ids", 99),
    "an id below 0": ("input_ids", -1),
    "a token type above the table": ("token_type_ids", 2),
    "a token type below 0": ("token_type_ids", -1),
    "a position above the table": ("position_ids", 40),
    "a position below 0": ("position_ids", -1),
}


@XLA
def test_ids_out_of_range_give_nan_where_they_cannot_be_read(xla):
    model = masked_lm()
    compiled = tf.function(lambda inputs: model(inputs).logits, jit_compile=xla)
    good = {"input_ids": IDS, "token_type_ids": np.zeros_like(IDS), "position_ids": np.zeros_like(IDS) + 5}
    expected = model(good).logits.numpy()
    np.testing.assert_allclose(compiled(tensors(good)), expected, rtol=0, atol=ROUNDINGS)
    for name, (argument, value) in BAD.items():
        bad = {**good, argument: good[argument].copy()}
        bad[argument][1, 4] = value
        with pytest.raises(InputError, match=f"{argument} must be at least 0 and below .* got {value}"):
            model(bad)
        logits = compiled(tensors(bad)).numpy()
        assert np.isnan(logits[1]).all(), name
        np.testing.assert_allclose(logits[[0, 2]], expected[[0, 2]], rtol=0, atol=ROUNDINGS)


@XLA
def test_labels_out_of_range_give_nan_where_they_cannot_be_read(xla):
    logits = tf.constant(np.random.default_rng(0).standard_normal((3, 11, 99)))
    compiled = tf.function(cross_entropy, jit_compile=xla)
    assert np.isfinite(compiled(logits, tf.constant(IDS)))
    for label in (99, -1):
        labels = IDS.copy()
        labels[1, 4] = label
        with pytest.raises(InputError, match=f"labels must be at least 0 and below 99, or -100 .* got {label}"):
            cross_entropy(logits, tf.constant(labels))
        assert np.isnan(compiled(logits, tf.constant(labels)))


@pytest.mark.parametrize("type", ["absolute", "relative_key"])
def test_a_sequence_that_is_too_long_for_an_open_graph_gives_nan(type):
    model = masked_lm(position_embedding_type=type)
    compiled = tf.function(lambda ids: model(ids).logits, input_signature=[tf.TensorSpec((None, None), tf.int64)])
    limit = 38 if type == "absolute" else 40
    assert np.isfinite(compiled(random_ids(1, limit))).all()
    assert np.isnan(compiled(random_ids(1, limit + 1))).all()


@XLA
def test_gradients(xla):
    model = masked_lm()
    inputs = tensors(with_labels(INPUTS["left padding"]))
    variables = [variable.value for variable in model.trainable_weights]

    def gradients(inputs):
        with tf.GradientTape() as tape:
            loss = model(inputs).loss
        return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]

    for ours, expected in zip(tf.function(gradients, jit_compile=xla)(inputs), gradients(inputs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=ROUNDINGS)
