"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from roberta_pln import numerics


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_10(x: Tensor) -> Tensor:
    return torch.clamp(gelu(x), -numerics.GELU_CLIP, numerics.GELU_CLIP)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(numerics.QUICK_GELU_SCALE * x)


def laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - numerics.LAPLACE_MEAN) / (numerics.LAPLACE_STD * math.sqrt(2))))


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, numerics.LEAKY_RELU_SLOPE)


def linear(x: Tensor) -> Tensor:
    return x


def relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
