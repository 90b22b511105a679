"""Dropout, and what the backward pass computes anew: the same functions with the same derivatives."""

import math

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from roberta_pln import flax as backend
from roberta_pln.flax.activations import ACTIVATIONS
from roberta_pln.flax.attention import MultiHeadAttention
from roberta_pln.flax.layers import Dropout, LayerNorm, dense_after, product_of_rows, recomputed
from tests.contract import INPUTS, precision, tiny_config, with_labels

SIZE = 400_000
WAYS = {"eager": lambda f: f, "compiled": jax.jit}


def dropped(rate, x, seed=0, deterministic=False):
    return Dropout(rate).apply({}, x, deterministic, rngs={"dropout": jax.random.key(seed)})


# ------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 2**-8, 0.999, 1e-4])
def test_a_share_of_the_elements_is_zero(rate, dtype):
    with precision("flax", dtype):
        y, back = jax.vjp(lambda x: dropped(rate, x), jnp.ones(SIZE, dtype))
        (gradient,) = back(jnp.ones(SIZE, dtype))
        assert y.dtype == dtype
        zeros = float((y == 0).mean())
        assert abs(zeros - rate) < 5 * math.sqrt(rate * (1 - rate) / SIZE)  # five standard deviations
        assert np.unique(np.float64(y[y != 0])) == np.float64(jnp.ones((), dtype) / (1 - rate))
        assert np.array_equal(gradient, y)


@pytest.mark.parametrize(("drawn", "zeros"), [(0.0, 6554), (0.2499, 6554), (0.25, 6553), (0.9999, 6553)])
def test_the_rate_is_exact(drawn, zeros, monkeypatch):
    """A call has a multiple of 2**-16; that above 6553.25 of them a quarter of the time."""
    every = np.arange(2**16, dtype=np.uint16).view(np.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda *_: jnp.asarray(every))
    monkeypatch.setattr(jax.random, "uniform", lambda *_: jnp.float32(drawn))
    assert int((dropped(6553.25 / 2**16, jnp.ones(2**16)) == 0).sum()) == zeros


@pytest.mark.parametrize("shape", [(SIZE,), (SIZE // 8, 8)])
def test_elements_are_decided_on_by_themselves(shape):
    """None of those that come from one number, or are neighbours, follows another."""
    zeros = np.float64(dropped(0.5, jnp.ones(shape)) == 0).reshape(-1)
    for distance in range(1, 9):
        both = (zeros[distance:] * zeros[:-distance]).mean()
        assert abs(both - 0.25) < 5 * 0.5 / math.sqrt(SIZE)


def test_the_seed_decides():
    found = [np.asarray(dropped(0.5, jnp.ones(33), seed)) for seed in (3, 3, 4)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (5,), (1,), (2, 3, 7)])
@pytest.mark.parametrize("rate", [0.25, 1e-4])
def test_every_shape(shape, rate):
    assert dropped(rate, jnp.ones(shape)).shape == shape


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_rates_at_the_ends(rate, expected):
    assert (dropped(rate, jnp.ones(1000)) == expected).all()


def test_nothing_is_dropped_outside_of_training():
    x = jnp.arange(9.0)
    assert dropped(0.5, x, deterministic=True) is x


# ------------------------------------------------------------- what is computed anew


def derivatives(function, *inputs, way="eager"):
    """The value, its gradients along a direction, and the gradients of a sum of these."""

    def first(*inputs):
        value, back = jax.vjp(function, *inputs)
        return value, back(jnp.cos(jnp.arange(value.size)).reshape(value.shape))

    def compute(*inputs):
        second = jax.grad(lambda *x: sum(jnp.sin(g).sum() for g in first(*x)[1]), tuple(range(len(inputs))))
        return *first(*inputs), second(*inputs)

    return [np.asarray(x) for x in jax.tree.leaves(WAYS[way](compute)(*inputs))]


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_of_training_is_the_norm(way):
    with precision("flax", "float64"):
        layer = LayerNorm(1e-5, jnp.float64, jnp.float64)
        x = jax.random.normal(jax.random.key(0), (2, 3, 7)) + 5
        inputs = x, jnp.linspace(-1, 2, 7), jnp.linspace(3, -1, 7)

        def run(deterministic):
            return lambda x, scale, bias: layer.apply({"params": {"scale": scale, "bias": bias}}, x, deterministic)

        ours, plain = derivatives(run(False), *inputs, way=way), derivatives(run(True), *inputs)
        for one, other in zip(ours, plain, strict=True):
            # roundings of 1e-16 of some dozen terms of up to a hundred
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["norm", *ACTIVATIONS])
def test_dense_layers_behind_something(name, way):
    class All(nn.Module):
        deterministic: bool

        def setup(self):
            self.norm = LayerNorm(1e-5, jnp.float64, jnp.float64)
            options = {"param_dtype": jnp.float64, "dtype": jnp.float64, "dot_general": product_of_rows}
            self.layers = [nn.Dense(size, **options) for size in (5, 4)]

        def __call__(self, x):
            before = self.norm if name == "norm" else ACTIVATIONS[name]
            found = dense_after(before, x, *self.layers, deterministic=self.deterministic)
            return jnp.concatenate(found, axis=-1)

    with precision("flax", "float64"):
        x = jax.random.normal(jax.random.key(0), (2, 3, 14 if name == "glu" else 7), jnp.float64)
        leaves, tree = jax.tree.flatten(All(True).init(jax.random.key(1), x))

        def run(deterministic):
            return lambda x, *leaves: All(deterministic).apply(jax.tree.unflatten(tree, leaves), x)

        ours, plain = derivatives(run(False), x, *leaves, way=way), derivatives(run(True), x, *leaves)
        for one, other in zip(ours, plain, strict=True):
            # roundings of 1e-16 of some dozen terms of up to a hundred
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


class Doubled(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_layer_of_a_user_is_called():
    """One in the place of a layer here, as for adapters."""

    class Both(nn.Module):
        def setup(self):
            self.plain, self.doubled = nn.Dense(5), Doubled(5)

        def __call__(self, x):
            return dense_after(jnp.sin, x, self.plain, self.doubled, deterministic=False)

    x, model = jnp.ones((2, 7)), Both()
    params = model.init(jax.random.key(0), x)["params"]
    one, other = model.apply({"params": {"plain": params["plain"], "doubled": params["plain"]}}, x)
    assert np.array_equal(2 * one, other)


@pytest.mark.parametrize("way", ["an interceptor", "captured intermediates"])
def test_who_watches_layers_sees_them(way, monkeypatch):
    model = backend.RobertaPreLayerNormModel(tiny_config(num_hidden_layers=1), seed=0)
    apply, seen = nn.Module.apply, set()

    def record(call, args, options, context):
        seen.update(context.module.path)
        return call(*args, **options)

    def intercepted(*args, **options):
        with nn.intercept_methods(record):
            return apply(*args, **options)

    def captured(*args, **options):
        result, state = apply(*args, **options, capture_intermediates=True, mutable=["intermediates"])
        seen.update(name for path in flatten_dict(state) for name in path)
        return result

    def run():
        return model(jnp.array([[5, 6, 7]]), train=True, dropout_rng=jax.random.key(0)).last_hidden_state

    plain = run()
    monkeypatch.setattr(nn.Module, "apply", {"an interceptor": intercepted, "captured intermediates": captured}[way])
    np.testing.assert_allclose(run(), plain, rtol=0, atol=1e-5)  # roundings of float32
    assert seen >= {"query", "key", "value", "LayerNorm", "dense"}


def test_only_what_is_real_gets_a_gradient():
    def function(x, nothing, numbers, key):
        assert nothing is None
        return jnp.sin(x) * numbers + jax.random.normal(key, x.shape) * x

    arguments = jnp.arange(3.0), None, jnp.arange(3), jax.random.key(0)
    for run in (function, lambda *args: recomputed(function, *args)):
        assert np.array_equal(run(*arguments), function(*arguments))
        gradient = jax.grad(lambda x, run=run: run(x, *arguments[1:]).sum())(arguments[0])
        expected = jax.grad(lambda x: function(x, *arguments[1:]).sum())(arguments[0])
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)  # float32


def test_the_compiler_keeps_no_probabilities(monkeypatch):
    batch, length = 4, 256
    config = tiny_config(max_position_embeddings=length + 2, attention_probs_dropout_prob=0.1)
    model = backend.RobertaPreLayerNormForMaskedLM(config, seed=0)
    ids = jnp.full((batch, length), 7)

    def memory():
        def loss(params):
            return model(ids, labels=ids, params=params, train=True, dropout_rng=jax.random.key(1)).loss

        return jax.jit(jax.grad(loss)).lower(model.params).compile().memory_analysis().temp_size_in_bytes

    anew = memory()
    monkeypatch.setattr(MultiHeadAttention, "is_recomputed", lambda *_: False)
    probabilities = 4 * batch * config.num_attention_heads * length**2
    assert memory() - anew > (config.num_hidden_layers - 1) * probabilities  # one layer has them in the backward pass


def test_training_has_no_forward_mode():
    model = backend.RobertaPreLayerNormModel(tiny_config(num_hidden_layers=1), seed=0)

    def slope(**training):
        def run(params):
            return model(jnp.array([[5, 6]]), params=params, **training).last_hidden_state.sum()

        return jax.jvp(run, (model.params,), (model.params,))[1]

    assert jnp.isfinite(slope())
    with pytest.raises(TypeError, match="forward-mode"):
        slope(train=True, dropout_rng=jax.random.key(0))


@pytest.mark.parametrize("case", ["padding inside", "a mask of four axes"])
def test_a_step_is_the_same(case, monkeypatch):
    """Dropout included."""
    inputs = with_labels(INPUTS[case])
    with precision("flax", "float64"):
        config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3)
        model = backend.RobertaPreLayerNormForMaskedLM(config, seed=0, dtype=jnp.float64)

        def step():
            def loss(params):
                return model(**inputs, params=params, train=True, dropout_rng=jax.random.key(1)).loss

            return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(model.params))

        anew = step()
        monkeypatch.setattr(MultiHeadAttention, "is_recomputed", lambda *_: False)
        for ours, expected in zip(anew, step(), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-13)  # roundings of sums near one
