"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`.

`tf.nn` keeps the constants of gelu and leaky_relu in float32, which costs float64 half its digits; hence their own
formulas here.
"""

import functools
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from roberta_pln import numerics
from roberta_pln.config import RobertaPreLayerNormConfig, refuse_activation
from roberta_pln.tf.layers import Module, Shared, at_least_float32

WORTH_COMPILING = 2**18
"""Elements from which on a function is worth the tenth of a second that XLA takes to compile it."""


def in_one_pass(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """A function of each element of tensors of one shape, compiled by XLA if that is worth it.

    TensorFlow makes a pass over memory for each operation. Where lengths are open, it stays at that: XLA would compile
    for every one.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)

    @functools.wraps(function)
    def run(*tensors: tf.Tensor) -> tf.Tensor:
        count = tensors[0].shape.num_elements()
        worth_it = count is not None and count >= WORTH_COMPILING and can_compile()
        return (compiled if worth_it else function)(*tensors)

    return run


@functools.cache
def can_compile() -> bool:
    """Whether XLA is there for the processor, and no other device."""
    if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
        return False
    with tf.init_scope():
        try:
            tf.function(tf.square, jit_compile=True)(tf.zeros(()))
        except tf.errors.OpError:
            return False
    return True


def gelu(x: tf.Tensor) -> tf.Tensor:
    return gelu_by_itself(x) if x.dtype.size < 4 else gelu_behind_a_product(x)


def gelu_behind_a_product(x: tf.Tensor) -> tf.Tensor:
    """`gelu` in the form that TensorFlow fuses with the product in front of it, if that is of float32."""
    wide = tf.cast(x, at_least_float32(x.dtype))
    return tf.cast(0.5 * wide * (1 + tf.math.erf(math.sqrt(0.5) * wide)), x.dtype)


gelu_by_itself = in_one_pass(gelu_behind_a_product)


@tf.custom_gradient
def gelu_in_training(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """`gelu` with its value in one pass, and its gradient in another."""
    return gelu_by_itself(x), lambda upstream: gelu_gradient(x, upstream)


@in_one_pass
def gelu_gradient(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """What goes back through `gelu`."""
    wide = tf.cast(x, at_least_float32(x.dtype))
    root = math.sqrt(0.5) * wide
    slope = 0.5 + 0.5 * tf.math.erf(root) + root * tf.exp(-0.5 * math.log(math.pi) - tf.square(root))
    return tf.cast(slope * tf.cast(upstream, wide.dtype), x.dtype)


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

    Only there: outside of training TensorFlow fuses it with the product in front.
    """
    return gelu_in_training if function is gelu else function


def is_named(function: Callable[[tf.Tensor], tf.Tensor]) -> bool:
    """Whether an activation is one of the functions above, which depend on nothing but x."""
    return function in ACTIVATIONS.values()
