"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from roberta_pln import numerics


def gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def gelu_10(x: Array) -> Array:
    return jnp.clip(gelu(x), -numerics.GELU_CLIP, numerics.GELU_CLIP)


def quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(numerics.QUICK_GELU_SCALE * x)


def laplace(x: Array) -> Array:
    return 0.5 * (1 + jax.scipy.special.erf((x - numerics.LAPLACE_MEAN) / (numerics.LAPLACE_STD * math.sqrt(2))))


def leaky_relu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, numerics.LEAKY_RELU_SLOPE)


def linear(x: Array) -> Array:
    return x


def relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": gelu_10,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": laplace,
    "leaky_relu": leaky_relu,
    "linear": linear,
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": relu2,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
