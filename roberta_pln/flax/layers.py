"""What `torch.nn` is for `pt` and Linen lacks or computes otherwise; and the base class that modules are made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from roberta_pln.config import RobertaPreLayerNormConfig


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
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        wide = at_least_float32(self.dtype)
        x, scale, bias = x.astype(wide), scale.astype(wide), bias.astype(wide)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


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
