"""What `torch.nn` is for `pt` and Linen lacks or computes otherwise; and the base class that modules are made of."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import module as linen
from jax import Array
from jax.typing import DTypeLike

from roberta_pln.config import RobertaPreLayerNormConfig

DENSE, NORM = ("kernel", "bias"), ("scale", "bias")
"""Names of the parameters of a layer."""


class Embedding(nn.Module):
    """Rows of a table; an id that names no row gives NaN. `(...)` -> `(..., features)`.

    Args:
        num_embeddings, features: shape of the table.
        initializer_range: standard deviation of a fresh table.
        dtype: type of the rows.
        param_dtype: type of the table.
        padding_idx: the row that is zero at first and gets no gradient from lookups.
    """

    num_embeddings: int
    features: int
    initializer_range: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    padding_idx: int | None = None

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", self.initialize, (self.num_embeddings, self.features), self.param_dtype
        )

    def initialize(self, key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        """A fresh table."""
        table = nn.initializers.normal(self.initializer_range)(key, shape, dtype)
        return table if self.padding_idx is None else table.at[self.padding_idx].set(0)

    def __call__(self, ids: Array) -> Array:
        ids = jnp.where(ids < 0, self.num_embeddings, ids)  # JAX would count negative ids from the end
        rows = jnp.take(self.embedding, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)
        if self.padding_idx is None:
            return rows
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Computed in at least float32, with the variance in two passes: Linen's own default loses all digits of rows whose
    mean is large.
    """

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        function = self.function()
        return function(x, scale, bias) if deterministic else recomputed(function, x, scale, bias)

    @nn.nowrap
    def function(self) -> Callable[[Array, Array, Array], Array]:
        """What it computes from the input, scale and bias."""
        wide, dtype, epsilon = at_least_float32(self.dtype), self.dtype, self.epsilon

        def normalise(x: Array, scale: Array, bias: Array) -> Array:
            x, scale, bias = x.astype(wide), scale.astype(wide), bias.astype(wide)
            centred = x - x.mean(-1, keepdims=True)
            variance = jnp.square(centred).mean(-1, keepdims=True)
            return (centred * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(dtype)

        return normalise


class Dropout(nn.Module):
    """Zeros elements with probability `rate` and scales the others by 1 / (1 - rate), unless it is deterministic.

    16 bits decide on an element, which takes half as long as a number of float32: the share of a call is a multiple of
    2**-16, below or above the rate so often that each element's probability is the rate.
    """

    rate: float

    def __call__(self, x: Array, deterministic: bool) -> Array:
        return self.drop(x, self.key(deterministic))

    def key(self, deterministic: bool) -> Array | None:
        """What the next call draws from; None if it leaves everything as it is."""
        return None if deterministic or self.rate == 0 else self.make_rng("dropout")

    def drop(self, x: Array, key: Array | None) -> Array:
        """What a call with this key returns."""
        if key is None:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        draw = self.draw if 2**-8 <= self.rate <= 1 - 2**-8 else self.draw_finely
        return jnp.where(draw(key, x.shape), x / (1 - self.rate), 0)

    def draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Which elements stay."""
        *lengths, size = shape
        for_all, for_each = jax.random.split(key)
        half = (size + 1) // 2
        numbers = jax.random.bits(for_each, (*lengths, half), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(numbers, jnp.uint16).reshape(*lengths, 2 * half)[..., :size]
        whole, part = divmod(self.rate * 2**16, 1)
        more = (jax.random.uniform(for_all) < part).astype(jnp.uint16)
        return halves >= jnp.uint16(whole) + more  # the others, of the 2**16 numbers the least, are zeros

    def draw_finely(self, key: Array, shape: tuple[int, ...]) -> Array:
        """The same for a rate that 16 bits are too coarse for."""
        return jax.random.bernoulli(key, 1 - self.rate, shape)


class Block(nn.Module):
    """Base of the modules: what each is constructed with, and the layers that it consists of.

    Args:
        config: the model's config.
        dtype: type of the computation and of the results.
        param_dtype: type of the parameters.
    """

    config: RobertaPreLayerNormConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    def linear(self, features: int, use_bias: bool = True) -> nn.Dense:
        """A layer x @ kernel + bias."""
        normal = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            features, use_bias, self.dtype, self.param_dtype, kernel_init=normal, dot_general=product_of_rows
        )

    def table(self, num_embeddings: int, features: int, padding_idx: int | None = None) -> Embedding:
        """A table of that shape."""
        scale = self.config.initializer_range
        return Embedding(num_embeddings, features, scale, self.dtype, self.param_dtype, padding_idx)

    def norm(self) -> LayerNorm:
        """A norm over the hidden axis."""
        return LayerNorm(self.config.layer_norm_eps, self.dtype, self.param_dtype)


def recomputed(function: Callable[..., Array], *args: Array | None) -> Array:
    """function(*args), of which the backward pass computes the insides anew instead of keeping them.

    Unlike those of `jax.checkpoint`, whose barriers XLA's processor backend drops, they cannot be mistaken for what the
    forward pass has computed. Derivatives in forward mode are refused, by JAX.

    Args:
        function: one without parameters of a module, and without other arrays than its arguments.
        *args: arrays, of which those of real numbers get gradients, and keys, and None.
    """

    def real(x: Array | None) -> bool:
        return x is not None and jnp.issubdtype(x.dtype, jnp.floating)

    @jax.custom_vjp
    def run(*args: Array | None) -> Array:
        return function(*args)

    def forward(*args: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
        return function(*args), args

    def backward(args: tuple[Array | None, ...], upstream: Array) -> tuple[Array | None, ...]:
        places = [place for place, x in enumerate(args) if real(x)]
        numbers = [later(args[place], upstream) for place in places]

        def of_real(*numbers: Array) -> Array:
            given = dict(zip(places, numbers, strict=True))
            return function(*(given.get(place, x) for place, x in enumerate(args)))

        found = dict(zip(places, jax.vjp(of_real, *numbers)[1](upstream), strict=True))
        return tuple(found.get(place) for place in range(len(args)))

    run.defvjp(forward, backward)
    return run(*args)


def later(x: Array, upstream: Array) -> Array:
    """An array for the backward pass to compute with, which the compiler does not know before its gradient has come."""
    first = upstream.reshape(-1)[:1].sum()
    return x + jnp.where(first == first, 0.0, jnp.nan).astype(x.dtype)


def dense_after(
    before: Callable[[Array], Array] | LayerNorm, x: Array, *layers: nn.Dense, deterministic: bool
) -> tuple[Array, ...]:
    """Each layer of before(x); in training without keeping before(x) for the backward pass.

    Args:
        before: a LayerNorm, or a function without parameters, that takes little time to compute anew.
        x: (..., D).
        *layers: what follows, one beside the other.
        deterministic: whether this is not training.
    """
    normalises = isinstance(before, nn.Module)
    own = all(map(is_own, (before, *layers) if normalises else layers))
    if deterministic or not own or is_watched() or layers[0].is_initializing():
        x = before(x)
        return tuple(layer(x) for layer in layers)
    function, inputs = before, (x,)
    if normalises:
        function, inputs = before.function(), (x, *(before.get_variable("params", name) for name in NORM))
    weights = [tuple(layer.get_variable("params", name).astype(layer.dtype) for name in DENSE) for layer in layers]

    @jax.custom_vjp
    def products(weights: list[tuple[Array, Array]], *inputs: Array) -> tuple[Array, ...]:
        found = function(*inputs)
        return tuple(product_of_rows(found, kernel, None) + bias for kernel, bias in weights)

    def forward(weights: list[tuple[Array, Array]], *inputs: Array) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
        return products(weights, *inputs), ([kernel for kernel, _ in weights], *inputs)

    def backward(kept: tuple[Any, ...], upstream: tuple[Array, ...]) -> tuple[Any, ...]:
        kernels, x, *parameters = kept
        found, gradients = jax.vjp(function, later(x, upstream[0]), *parameters)
        columns = found.reshape(-1, found.shape[-1])
        rows = [above.reshape(-1, above.shape[-1]) for above in upstream]
        slopes = reduce(jnp.add, (above @ kernel.T for above, kernel in zip(rows, kernels, strict=True)))
        return [(columns.T @ above, above.sum(0)) for above in rows], *gradients(slopes.reshape(found.shape))

    products.defvjp(forward, backward)
    return products(weights, *inputs)


def rows_at(states: Array, places: Array) -> Array:
    """Some of the rows (B, T, D), those at places (B, M) or (1, M): (B, M, D); NaN where no row is."""
    places = jnp.where(places < 0, states.shape[1], places)  # JAX would count negative places from the end
    return jnp.take_along_axis(states, places[..., None], axis=1, mode="fill", fill_value=jnp.nan)


def is_own(layer: nn.Module) -> bool:
    """Whether a layer is one of those of `Block`, and not a user's in its place, which may compute something else."""
    return type(layer) in (nn.Dense, LayerNorm)


def is_watched() -> bool:
    """Whether Linen shows someone what each layer returns: interceptors, captured intermediates, or a table."""
    interceptors = getattr(linen, "_global_interceptor_stack", ())
    captured, tabulated = (getattr(linen._context, name, ()) for name in ("capture_stack", "call_info_stack"))
    return bool(interceptors) or any(captured) or bool(tabulated)


def product_of_rows(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """x @ kernel as one product of matrices, in place of `jax.lax.dot_general`.

    XLA's processor backend would transpose the kernel's gradient as a step of its own if `x` had more axes.
    """
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that sums over many elements are made in; JAX's own promotion refuses two types in its strict mode."""
    return np.promote_types(dtype, np.float32)


def readable(array: Array) -> bool:
    """Whether the values of an array can be looked at: not while tracing, nor when other hosts hold some of them."""
    return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable
