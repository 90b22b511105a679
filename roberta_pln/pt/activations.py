"""The activations of the feed-forward block, by the names of `numerics.ACTIVATIONS`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roberta_pln import numerics
from roberta_pln.config import RobertaPreLayerNormConfig, refuse_activation

SOFTPLUS_THRESHOLD = 40
"""Where softplus is the identity; PyTorch's own, 20, costs float64 half its digits."""


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_10(x: Tensor) -> Tensor:
    return torch.clamp(gelu(x), -numerics.GELU_CLIP, numerics.GELU_CLIP)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(numerics.QUICK_GELU_SCALE * x)


def glu(x: Tensor) -> Tensor:
    return F.glu(x)


def laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - numerics.LAPLACE_MEAN) / (numerics.LAPLACE_STD * math.sqrt(2))))


def leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, numerics.LEAKY_RELU_SLOPE)


def linear(x: Tensor) -> Tensor:
    return x


def relu2(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


class PReLU(nn.Module):
    """x, or weight x below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)


class XIELU(nn.Module):
    """A parabola above zero, an exponential below, and a line through both."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.zeros(1))
        self.alpha_n = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        above, below = F.relu(x), -F.relu(-x)
        scale_above = F.softplus(self.alpha_p, threshold=SOFTPLUS_THRESHOLD)
        scale_below = numerics.XIELU_BETA + F.softplus(self.alpha_n, threshold=SOFTPLUS_THRESHOLD)
        curved = scale_above * above * above + scale_below * (torch.expm1(below) - below)
        return curved + numerics.XIELU_BETA * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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

LEARNED: dict[str, type[nn.Module]] = {"prelu": PReLU, "xielu": XIELU}


def activation(config: RobertaPreLayerNormConfig) -> Callable[[Tensor], Tensor]:
    """The activation of one layer: a new module if it has parameters, and a function if not."""
    chosen = config.hidden_act
    if isinstance(chosen, nn.Module) and chosen.state_dict():
        refuse_activation(chosen)
    if callable(chosen):
        return chosen
    return LEARNED[chosen]() if chosen in LEARNED else ACTIVATIONS[chosen]


def is_named(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is one of the functions above, which depend on nothing but x."""
    return function in ACTIVATIONS.values()
