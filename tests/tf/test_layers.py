"""Dropout, and the forms of layers that training takes: the same functions with the same derivatives."""

import math

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from roberta_pln.tf import activations
from roberta_pln.tf.activations import ACTIVATIONS, can_compile, gelu, gelu_in_training, in_training
from roberta_pln.tf.layers import Dense, Dropout, LayerNorm, Shared, dense_after

SIZE = 400_000
WAYS = {"eager": lambda f: f, "graph": tf.function, "XLA": lambda f: tf.function(f, jit_compile=True)}


def shared(policy="float32"):
    return Shared(keras.dtype_policies.get(policy), keras.random.SeedGenerator(0))


# ------------------------------------------------------------- dropout


def dropped(rate, x, way="eager", layer=None):
    layer = layer or Dropout(rate, shared())
    return WAYS[way](lambda x: layer(x, training=True))(x)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 2**-8, 0.999, 1e-4])
def test_a_share_of_the_elements_is_zero(rate, dtype):
    x = tf.ones(SIZE, dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = dropped(rate, x)
    zeros = np.mean(y.numpy() == 0)
    assert abs(zeros - rate) < 5 * math.sqrt(rate * (1 - rate) / SIZE)  # five standard deviations
    kept = y[y != 0]
    tf.debugging.assert_equal(kept, tf.fill(kept.shape, tf.constant(1 / (1 - rate), dtype)))
    tf.debugging.assert_equal(tape.gradient(y, x), y)


@pytest.mark.parametrize(("last", "zeros"), [(0, 6553), (3 * 2**30 - 1, 6553), (3 * 2**30, 6554), (2**32 - 1, 6554)])
def test_the_rate_is_exact(last, zeros, monkeypatch):
    """A call has a multiple of 2**-16; that above 6553.25 of them a quarter of the time."""
    every = np.append(np.arange(2**16, dtype=np.uint16).view(np.uint32), np.uint32(last))
    monkeypatch.setattr(tf.random, "stateless_uniform", lambda *_: tf.constant(every))
    assert np.sum(dropped(6553.25 / 2**16, tf.ones(2**16)) == 0) == zeros


@pytest.mark.parametrize("way", WAYS)
def test_elements_are_decided_on_by_themselves(way):
    """None of those that come from one number, or are neighbours, follows another."""
    zeros = np.float64(dropped(0.5, tf.ones(SIZE), way) == 0)
    for distance in range(1, 9):
        both = (zeros[distance:] * zeros[:-distance]).mean()
        assert abs(both - 0.25) < 5 * 0.5 / math.sqrt(SIZE)


def test_the_seed_decides():
    found = []
    for seed in (3, 3, 4):
        layer = Dropout(0.5, Shared(keras.dtype_policies.get("float32"), keras.random.SeedGenerator(seed)))
        found.append([dropped(0.5, tf.ones(33), layer=layer).numpy() for _ in range(2)])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0][0], found[0][1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 7)])
@pytest.mark.parametrize("rate", [0.25, 1e-4])
def test_every_shape(shape, rate):
    layer = Dropout(rate, shared())
    x = tf.random.normal(shape)
    assert dropped(rate, x, layer=layer).shape == shape
    unknown = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None] * len(shape))])
    assert unknown(x).shape == shape


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_rates_at_the_ends(rate, expected):
    assert np.all(dropped(rate, tf.ones(1000)) == expected)


def test_nothing_is_dropped_outside_of_training():
    x = tf.random.normal((9,))
    assert np.array_equal(Dropout(0.5, shared())(x), x)


# ------------------------------------------------------------- what training keeps less for


def derivatives(function, *inputs, way="eager"):
    """The value, its gradients along a direction, and the gradients of a sum of these."""

    def compute(*inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                value = function(*inputs)
            weights = tf.cos(tf.reshape(tf.range(tf.cast(tf.size(value), value.dtype)), tf.shape(value)))
            first = inner.gradient(value, inputs, weights)
            total = tf.add_n([tf.reduce_sum(tf.sin(x)) for x in first])
        return value, *first, *outer.gradient(total, inputs, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    return [x.numpy() for x in WAYS[way](compute)(*inputs)]


def norm():
    layer = LayerNorm(7, 1e-5, shared("float64"))
    layer.gamma.assign(np.linspace(-1, 2, 7))
    layer.beta.assign(np.linspace(3, -1, 7))
    return layer


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_of_training_is_the_norm(way):
    layer, x = norm(), tf.random.stateless_normal((2, 3, 7), (0, 0), dtype=tf.float64) + 5
    inputs = x, tf.constant(layer.gamma.numpy()), tf.constant(layer.beta.numpy())
    ours, plain = derivatives(layer.normalise_in_training, *inputs, way=way), derivatives(layer.normalise, *inputs)
    for one, other in zip(ours, plain, strict=True):
        # roundings of 1e-16 of some dozen terms of up to a hundred
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    assert np.array_equal(layer(x, training=True), layer(x))
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
    assert all(gradient is not None for gradient in tape.gradient(y, [layer.gamma.value, layer.beta.value]))


@pytest.mark.parametrize("least", [0, activations.WORTH_COMPILING], ids=["compiled", "plain"])
@pytest.mark.parametrize("way", WAYS)
def test_the_gelu_of_training_is_gelu(way, least, monkeypatch):
    x = tf.constant(np.linspace(-9, 9, 101).reshape(1, 101))
    expected = derivatives(gelu, x)
    monkeypatch.setattr(activations, "WORTH_COMPILING", least)
    for one, other in zip(derivatives(gelu_in_training, x, way=way), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)  # roundings of numbers up to 9
    assert in_training(gelu) is gelu_in_training
    assert in_training(tf.nn.relu) is tf.nn.relu


def compiled_parts(function, *lengths, dtype="float32"):
    """How many functions in the graph of another XLA is to compile."""
    graph = tf.function(function).get_concrete_function(tf.TensorSpec(lengths, dtype)).graph
    return sum("_XlaMustCompile" in node.attr for node in graph.as_graph_def().node)


def test_what_is_compiled(monkeypatch):
    """Large tensors of known lengths, where there is a compiler; and no form that TensorFlow fuses by itself."""
    large = (2, activations.WORTH_COMPILING // 2)
    assert compiled_parts(gelu_in_training, *large) == 1
    assert compiled_parts(gelu, *large, dtype="bfloat16") == 1
    assert compiled_parts(gelu, *large) == 0
    assert compiled_parts(gelu_in_training, large[0], large[1] - 1) == 0
    assert compiled_parts(gelu_in_training, None, large[1]) == 0
    monkeypatch.setattr(activations, "can_compile", lambda: False)
    assert compiled_parts(gelu_in_training, *large) == 0


def test_whether_there_is_a_compiler(monkeypatch):
    assert can_compile.__wrapped__()
    monkeypatch.setattr(tf, "square", lambda x: tf.raw_ops.Print(input=x, data=[x]))  # XLA has none
    assert not can_compile.__wrapped__()
    monkeypatch.undo()
    devices = [*tf.config.list_logical_devices(), tf.config.LogicalDevice("/device:GPU:0", "GPU")]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: devices)
    assert not can_compile.__wrapped__()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["norm", *ACTIVATIONS])
def test_dense_layers_behind_something(name, way):
    before = norm() if name == "norm" else in_training(ACTIVATIONS[name])
    x = tf.random.stateless_normal((2, 3, 14 if name == "glu" else 7), (0, 0), dtype=tf.float64) + 0.1
    layers = [Dense(7, size, shared("float64")) for size in (5, 4)]
    for layer in layers:
        layer.kernel.assign(np.linspace(-1, 2, layer.kernel.shape.num_elements()).reshape(layer.kernel.shape))
        layer.bias.assign(np.linspace(3, -1, *layer.bias.shape))
    sources = [weight.value for layer in layers for weight in layer.weights]
    sources += [weight.value for weight in (before.weights if name == "norm" else ())]

    def run(training):
        chosen = before if name == "norm" or training else ACTIVATIONS[name]
        return lambda x, *_: tf.concat(dense_after(chosen, x, *layers, training=training), axis=-1)

    ours, theirs = derivatives(run(True), x, *sources, way=way), derivatives(run(False), x, *sources)
    for one, other in zip(ours, theirs, strict=True):
        # roundings of 1e-16 of some dozen terms of up to a hundred
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


class Doubled(Dense):
    def call(self, *args):
        return 2 * super().call(*args)


def test_a_layer_of_a_user_is_called():
    """One in the place of a layer here, as for adapters."""
    x = tf.random.stateless_normal((2, 7), (0, 0), dtype=tf.float64)
    plain, doubled = Dense(7, 5, shared("float64")), Doubled(7, 5, shared("float64"))
    for layer in (plain, doubled):
        layer.kernel.assign(np.linspace(-1, 2, 35).reshape(7, 5))
        layer.bias.assign(np.linspace(3, -1, 5))
    one, other = dense_after(norm(), x, plain, doubled, training=True)
    assert np.array_equal(2 * one, other)


@pytest.mark.parametrize("least", [0, activations.WORTH_COMPILING], ids=["compiled", "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, least, monkeypatch):
    monkeypatch.setattr(activations, "WORTH_COMPILING", least)
    layer = LayerNorm(64, 1e-5, shared(f"mixed_{dtype}"))
    layer.gamma.assign(tf.ones(64))
    layer.beta.assign(tf.zeros(64))
    x = tf.cast(tf.random.stateless_normal((5, 64), (1, 2)), dtype)
    for form, plain in ((lambda x: layer(x, training=True), layer), (gelu_in_training, gelu)):
        found = []
        for function in (form, plain):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            found.append((y, tape.gradient(y, x)))
            assert y.dtype == found[-1][1].dtype == dtype
        assert np.array_equal(found[0][0], found[1][0])
        step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
        difference = np.abs(np.float32(found[0][1]) - np.float32(found[1][1])).max()
        assert difference <= 4 * step  # some roundings of slopes near one
