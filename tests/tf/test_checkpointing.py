"""Gradient checkpointing computes every layer a second time, and changes no number."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from roberta_pln import tf as backend
from roberta_pln.schema import architecture
from roberta_pln.tf import attention
from roberta_pln.tf.attention import MultiHeadAttention, in_turns
from roberta_pln.tf.encoder import Layer
from roberta_pln.tf.layers import Dropout, Shared
from roberta_pln.tf.probe import objective
from tests.contract import INPUTS, random_ids, tiny_config, with_labels

ROUNDINGS = 1e-14  # of numbers up to about 10: what several branches send back is added up in another order

RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
RNG = np.random.default_rng(0)
EVERYTHING = {
    "inputs_embeds": RNG.standard_normal((3, 4, 32)),
    "attention_mask": np.array([[1] * 6, [0] + [1] * 5, [0] * 6]),
    "head_mask": RNG.random((1, 4)),
    "encoder_hidden_states": RNG.standard_normal((3, 5, 32)),
    "past_key_values": ((RNG.standard_normal((3, 4, 2, 8)), RNG.standard_normal((3, 4, 2, 8))),),
}
FLAGS = dict(use_cache=True, output_attentions=True, output_hidden_states=True)

CASES = {
    "no mask": ("ForMaskedLM", {}, with_labels(INPUTS["no mask"]), {}),
    "padding and dropout": ("ForMaskedLM", RATES, with_labels(INPUTS["padding inside"]), {"training": True}),
    "a head mask of integers": ("Model", {}, {**INPUTS["no mask"], "head_mask": np.array([1, 0, 1, 1])}, {}),
    "relative positions, pruned, chunked": (
        "Model",
        {"position_embedding_type": "relative_key_query", "pruned_heads": {0: [1]}, "chunk_size_feed_forward": 11},
        INPUTS["a mask of four axes"],
        {},
    ),
    "everything": (
        "Model",
        {"num_hidden_layers": 1, "is_decoder": True, "add_cross_attention": True, **RATES},
        EVERYTHING,
        {"training": True, **FLAGS},
    ),
}
COMPILERS = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}


def built(case: str, checkpointing: bool):
    head, changes, _, _ = CASES[case]
    model = getattr(backend, architecture(head))(tiny_config(initializer_range=0.1, **changes), seed=0, dtype="float64")
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def gradients(model, case: str, compiler: str = "eager"):
    """The outputs, the gradients of all weights and of all inputs that have one, and where the seeds are then."""
    _, _, inputs, flags = CASES[case]
    tensors = tf.nest.map_structure(tf.constant, inputs)
    sources = [weight.value for weight in model.trainable_weights]

    def run(tensors):
        numbers = [tensor for tensor in tf.nest.flatten(tensors) if tensor.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(numbers)
            record = model(**tensors, **flags)
            scalar = objective(record)
        return record, tape.gradient(scalar, [*sources, *numbers], unconnected_gradients="zero")

    record, found = COMPILERS[compiler](run)(tensors)
    return [*tf.nest.flatten(record), *map(tf.convert_to_tensor, found), model.seed_generator.state.value]


@pytest.mark.parametrize(
    ("case", "compiler"), [*((case, "eager") for case in CASES), ("everything", "graph"), ("everything", "xla")]
)
def test_no_number_changes(case, compiler):
    expected = gradients(built(case, False), case, compiler)
    found = gradients(built(case, True), case, compiler)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDINGS)


def test_a_gradient_is_there_for_every_input():
    """The control of the test above: zeros would agree as well."""
    _, _, inputs, _ = CASES["everything"]
    numbers = sum(array.dtype.kind == "f" for array in tf.nest.flatten(inputs))
    *found, _ = gradients(built("everything", True), "everything")
    assert all(np.abs(gradient).max() > 0 for gradient in found[-numbers:])


@pytest.mark.parametrize("case", ["no mask", "everything"])
def test_every_layer_is_computed_twice(case, monkeypatch):
    calls, call = [], Layer.call
    monkeypatch.setattr(
        Layer, "call", lambda self, *args, **options: calls.append(self) or call(self, *args, **options)
    )
    model = built(case, False)
    layers = list(model.base_model.encoder.layer)
    for enabled, expected in ((False, layers), (True, layers + layers[::-1]), (False, layers)):
        model.gradient_checkpointing_enable() if enabled else model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing == enabled
        calls.clear()
        gradients(model, case)
        assert calls == expected


def products(model, ids, training=False, **inputs):
    """How many products of matrices a compiled step has."""

    @tf.function
    def step(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=training, **inputs).loss
        return tape.gradient(loss, [weight.value for weight in model.trainable_weights])

    nodes = step.get_concrete_function(ids).graph.as_graph_def().node
    return sum(node.op in ("MatMul", "BatchMatMulV2") for node in nodes)


def test_compiled_steps_are_computed_twice():
    ids = tf.constant(random_ids())
    model = built("no mask", False)
    kept = products(model, ids)
    model.gradient_checkpointing_enable()
    # query, key, value, scores, values, output, and two dense layers behind
    assert products(model, ids) == kept + 2 * 8


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["layers are kept", "layers are computed anew"])
@pytest.mark.parametrize("way", ["takes_turns", "is_recomputed"])
def test_probabilities_are_computed_anew(way, checkpointing, compiler, monkeypatch):
    """The same step, dropout included."""
    case, length = "padding and dropout", 64
    assert length == 8 * tiny_config().head_size
    ids = random_ids(2, length)
    inputs = {"input_ids": ids, "attention_mask": (np.arange(length) < [[length], [50]]).astype(int), "labels": ids}
    if way == "is_recomputed":
        inputs["head_mask"] = np.array([1.0, 0.5, 0.0, 1.0])
    changes = {**RATES, "num_hidden_layers": 1, "max_position_embeddings": 70}
    monkeypatch.setitem(CASES, case, ("ForMaskedLM", changes, inputs, CASES[case][3]))
    anew = gradients(built(case, checkpointing), case, compiler)
    monkeypatch.setattr(MultiHeadAttention, way, lambda *_: False)
    monkeypatch.setattr(MultiHeadAttention, "is_recomputed", lambda *_: False)
    plain = gradients(built(case, checkpointing), case, compiler)
    for ours, theirs in zip(anew, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * ROUNDINGS)  # sums of more terms


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("inputs", ["a fully padded row", "a mask of four axes", "no mask"])
def test_texts_that_take_turns(inputs, compiler, monkeypatch):
    """The same step as of all at once."""
    case, length = "padding and dropout", INPUTS[inputs]["input_ids"].shape[1]
    changes = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
    monkeypatch.setitem(CASES, case, ("ForMaskedLM", changes, with_labels(INPUTS[inputs]), {"training": True}))
    found = []
    for texts in (100, 1, 2, 3) if compiler == "eager" else (100, 2):  # of three, so that the last turn has fewer
        scores = texts * tiny_config().num_attention_heads * length**2
        monkeypatch.setattr(attention, "SCORES_AT_A_TIME", scores)
        found.append(gradients(built(case, False), case, compiler))
    whole, *turns = found
    for turn in turns:
        for ours, theirs in zip(turn, whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * ROUNDINGS)  # sums of more terms


def test_a_graph_of_open_lengths_takes_turns(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 2 * 4 * 64)  # two texts of eight tokens, or one of more
    model = backend.RobertaPreLayerNormForMaskedLM(tiny_config(initializer_range=0.1), seed=0, dtype="float64")

    def step(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        return loss, *map(
            tf.convert_to_tensor, tape.gradient(loss, [weight.value for weight in model.trainable_weights])
        )

    compiled = tf.function(step, input_signature=[tf.TensorSpec((None, None), tf.int64)])
    for shape in ((2, 8), (3, 8), (3, 11), (1, 1)):  # one turn, and more
        ids = tf.constant(random_ids(*shape))
        for ours, theirs in zip(compiled(ids), step(ids), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=10 * ROUNDINGS)


def test_turns_are_dropped_from_apart(monkeypatch):
    """Each draws anew, at the rate, and what stays is scaled."""
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 1)
    dropout = Dropout(0.25, Shared(keras.dtype_policies.get("float32"), keras.random.SeedGenerator(0)))
    query, value = tf.zeros((4, 1, 100, 100)), tf.eye(100, batch_shape=(4, 1))  # what is read is the probabilities
    found = in_turns(query, query, value, None, dropout).numpy() * 100
    np.testing.assert_allclose(np.unique(found.round(4)), [0, 1.3333])
    assert abs((found == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / found.size)  # five standard deviations
    assert not any(np.array_equal(found[0] == 0, other == 0) for other in found[1:])


def test_probabilities_of_short_texts_with_a_head_mask_are_kept():
    model = backend.RobertaPreLayerNormForMaskedLM(tiny_config(max_position_embeddings=70, **RATES))
    ids, inputs = tf.constant(random_ids(2, 64)), {"training": True, "head_mask": tf.ones(4)}
    short, long = (products(model, ids[:, :length], **inputs) for length in (63, 64))
    assert long == short + 2 * 2  # of each layer scores and values; the products with these are in the gradients anyway
    assert products(model, ids) == products(model, ids[:, :63])


def test_switching_compiles_anew():
    model = built("no mask", False)
    model.train_function = "compiled without it"
    model.gradient_checkpointing_enable()
    assert model.train_function is None
