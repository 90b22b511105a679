"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`.

`tf.nn` keeps the constants of gelu and leaky_relu in float32, which costs float64 half its digits; hence their own
formulas here.
"""

import math
from collections.abc import Callable

import keras
import tensorflow as tf

from roberta_pln import numerics
from roberta_pln.config import RobertaPreLayerNormConfig, refuse_activation
from roberta_pln.tf.layers import Module, Shared, at_least_float32


def gelu(x: tf.Tensor) -> tf.Tensor:
    wide = tf.cast(x, at_least_float32(x.dtype))
    return tf.cast(0.5 * wide * (1 + tf.math.erf(math.sqrt(0.5) * wide)), x.dtype)


@tf.custom_gradient
def gelu_in_training(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """`gelu`, whose slope shares what it can with the value, where both are computed at the same time."""
    wide = tf.cast(x, at_least_float32(x.dtype))
    root = -math.sqrt(0.5) * wide
    below = 0.5 * tf.math.erfc(root)  # a normal number is less than x

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        slope = below - root * tf.exp(-0.5 * math.log(math.pi) - tf.square(root))
        return tf.cast(slope, x.dtype) * upstream

    return tf.cast(wide * below, x.dtype), gradient


def gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + numerics.GELU_CUBIC * x * x * x)))


def gelu_10(x: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(gelu(x), -numerics.GELU_CLIP, numerics.GELU_CLIP)


def quick_gelu(x: tf.Tensor) -> tf.Tensor:
    return x * tf.sigmoid(numerics.QUICK_GELU_SCALE * x)


def glu(x: tf.Tensor) -> tf.Tensor:
    values, gates = tf.split(x, 2, axis=-1)
    return values * tf.sigmoid(gates)


def laplace(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * (1 + tf.math.erf((x - numerics.LAPLACE_MEAN) / (numerics.LAPLACE_STD * math.sqrt(2))))


def leaky_relu(x: tf.Tensor) -> tf.Tensor:
    return tf.where(x > 0, x, numerics.LEAKY_RELU_SLOPE * x)


def linear(x: tf.Tensor) -> tf.Tensor:
    return x


def mish(x: tf.Tensor) -> tf.Tensor:
    return x * tf.tanh(tf.nn.softplus(x))


def relu2(x: tf.Tensor) -> tf.Tensor:
    return tf.square(tf.nn.relu(x))


class PReLU(Module):
    """x, or alpha x below zero."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self.alpha = self.add_weight((1,), "alpha")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.where(x > 0, x, tf.cast(self.alpha, x.dtype) * x)


class XIELU(Module):
    """A parabola above zero, an exponential below, and a line through both."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self.alpha_p = self.add_weight((1,), "alpha_p")
        self.alpha_n = self.add_weight((1,), "alpha_n")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        above, below = tf.nn.relu(x), -tf.nn.relu(-x)
        scale_above = tf.nn.softplus(tf.cast(self.alpha_p, x.dtype))
        scale_below = numerics.XIELU_BETA + tf.nn.softplus(tf.cast(self.alpha_n, x.dtype))
        curved = scale_above * above * above + scale_below * (tf.math.expm1(below) - below)
        return curved + numerics.XIELU_BETA * x


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
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
    "mish": mish,
    "quick_gelu": quick_gelu,
    "relu": tf.nn.relu,
    "relu2": relu2,
    "relu6": tf.nn.relu6,
    "sigmoid": tf.sigmoid,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}

LEARNED: dict[str, type[Module]] = {"prelu": PReLU, "xielu": XIELU}


def activation(config: RobertaPreLayerNormConfig, shared: Shared) -> Callable[[tf.Tensor], tf.Tensor]:
    """The activation of one layer: a new module if it has parameters, and a function if not."""
    chosen = config.hidden_act
    if isinstance(chosen, keras.layers.Layer) and (chosen.weights or not chosen.built):
        refuse_activation(chosen)
    if callable(chosen):
        return chosen
    return LEARNED[chosen](shared) if chosen in LEARNED else ACTIVATIONS[chosen]


def in_training(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tf.Tensor]:
    """The same function, in the form for `dense_after` in training.

    Only there: TensorFlow fuses the other form with the product before it.
    """
    return gelu_in_training if function is gelu else function


def is_named(function: Callable[[tf.Tensor], tf.Tensor]) -> bool:
    """Whether an activation is one of the functions above, which depend on nothing but x."""
    return function in ACTIVATIONS.values()
