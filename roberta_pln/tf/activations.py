"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`.

`tf.nn` keeps the constants of gelu and leaky_relu in float32, which costs float64 half its digits; hence their own
formulas here.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from roberta_pln import numerics


def gelu(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.math.erf(math.sqrt(0.5) * x))


def gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + numerics.GELU_CUBIC * x * x * x)))


def gelu_10(x: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(gelu(x), -numerics.GELU_CLIP, numerics.GELU_CLIP)


def quick_gelu(x: tf.Tensor) -> tf.Tensor:
    return x * tf.sigmoid(numerics.QUICK_GELU_SCALE * x)


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


ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
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
