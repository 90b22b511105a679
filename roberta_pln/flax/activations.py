"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`.

`jnp.clip` halves the derivative at its bounds, and `jax.nn.leaky_relu` takes the upper one at zero; hence `jnp.where`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from roberta_pln import numerics
from roberta_pln.config import RobertaPreLayerNormConfig, refuse_activation
from roberta_pln.flax.layers import at_least_float32


def gelu(x: Array) -> Array:
    wide = x.astype(at_least_float32(x.dtype))  # with erf, since XLA takes four times as long for JAX's own, with erfc
    return (0.5 * wide * (1 + jax.scipy.special.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def gelu_10(x: Array) -> Array:
    y = gelu(x)  # never below -0.2
    return jnp.where(y > numerics.GELU_CLIP, numerics.GELU_CLIP, y)


def quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(numerics.QUICK_GELU_SCALE * x)


def glu(x: Array) -> Array:
    return jax.nn.glu(x)


def laplace(x: Array) -> Array:
    return 0.5 * (1 + jax.scipy.special.erf((x - numerics.LAPLACE_MEAN) / (numerics.LAPLACE_STD * math.sqrt(2))))


def leaky_relu(x: Array) -> Array:
    return jnp.where(x > 0, x, numerics.LEAKY_RELU_SLOPE * x)


def linear(x: Array) -> Array:
    return x


def relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


class PReLU(nn.Module):
    """x, or negative_slope x below zero."""

    param_dtype: DTypeLike

    def setup(self) -> None:
        start = nn.initializers.constant(numerics.PRELU_START)
        self.negative_slope = self.param("negative_slope", start, (1,), self.param_dtype)

    def __call__(self, x: Array) -> Array:
        return jnp.where(x > 0, x, self.negative_slope.astype(x.dtype) * x)


class XIELU(nn.Module):
    """A parabola above zero, an exponential below, and a line through both."""

    param_dtype: DTypeLike

    def setup(self) -> None:
        start_p, start_n = map(nn.initializers.constant, (numerics.XIELU_START_P, numerics.XIELU_START_N))
        self.alpha_p = self.param("alpha_p", start_p, (1,), self.param_dtype)
        self.alpha_n = self.param("alpha_n", start_n, (1,), self.param_dtype)

    def __call__(self, x: Array) -> Array:
        above, below = jax.nn.relu(x), -jax.nn.relu(-x)
        scale_above = jax.nn.softplus(self.alpha_p.astype(x.dtype))
        scale_below = numerics.XIELU_BETA + jax.nn.softplus(self.alpha_n.astype(x.dtype))
        curved = scale_above * above * above + scale_below * (jnp.expm1(below) - below)
        return curved + numerics.XIELU_BETA * x


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": gelu_10,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "glu": glu,
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

LEARNED: dict[str, type[nn.Module]] = {"prelu": PReLU, "xielu": XIELU}


def activation(config: RobertaPreLayerNormConfig, param_dtype: DTypeLike) -> Callable[[Array], Array]:
    """The activation of one layer: a new module if it has parameters, and a function if not."""
    chosen = config.hidden_act
    if isinstance(chosen, nn.Module):
        refuse_activation(chosen)
    if callable(chosen):
        return chosen
    return LEARNED[chosen](param_dtype) if chosen in LEARNED else ACTIVATIONS[chosen]


def is_named(function: Callable[[Array], Array]) -> bool:
    """Whether an activation is one of the functions above, which depend on nothing but x."""
    return function in ACTIVATIONS.values()
