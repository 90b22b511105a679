"""How weights follow gradients: AdamW, its learning rate at every step, and what surrounds it. One for all backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from roberta_pln.checks import InputError

SCHEDULES: Final = ("linear", "cosine", "polynomial", "constant")
DECAYED: Final = ("matrices", "all")
PRECISIONS: Final = ("float32", "bfloat16", "float64")
CLIP_EPSILON: Final = 1e-6
"""Is added to the norm that gradients are divided by, as PyTorch's `clip_grad_norm_` does."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One optimizer step after another.

    A step computes the mean loss over all labels of its batch, clips the gradient, and moves each parameter:

        p -= rate * (m^ / (sqrt(v^) + epsilon) + weight_decay * p)

    with m^ and v^ the bias-corrected moments of the gradient (Loshchilov and Hutter 2019).

    Raises:
        InputError: when a value is not as its description says.
    """

    learning_rate: float = 5e-5
    """The highest rate, which the warm-up ends at."""
    schedule: str = "linear"
    """One of `SCHEDULES`: how the rate falls from there to `end_rate` at the end of the run."""
    warmup: float = 0.06
    """Share of the steps, below 1, over which the rate rises from 0; rounded up to whole steps."""
    power: float = 1.0
    """Of the polynomial; 1 is linear."""
    end_rate: float = 0.0
    """The rate that would follow the last step."""
    beta_1: float = 0.9
    """How much of AdamW's mean of the gradient a step keeps."""
    beta_2: float = 0.999
    """How much of AdamW's mean of its square a step keeps."""
    epsilon: float = 1e-8
    """AdamW's, which is added to the root of that mean."""
    weight_decay: float = 0.01
    """What a step takes off a parameter, as a share of it and of the rate."""
    decayed: str = "matrices"
    """What decays: `matrices`, which leaves biases and norms alone, or `all`."""
    clip: float | None = 1.0
    """Highest norm of the gradient of all parameters together; None does not clip."""
    accumulation: int = 1
    """How many parts of a batch are computed one after the other, to need less memory."""
    precision: str = "float32"
    """One of `PRECISIONS`. With `bfloat16` matrix products and activations are in it, and parameters in float32."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes each layer anew, to need less memory."""
    freeze: tuple[str, ...] = ()
    """Parameters, or modules with all of theirs, that are not trained, such as roberta_prelayernorm.embeddings."""
    seed: int = 0
    """What dropout, fresh parameters, and the order of the examples are drawn from."""

    def __post_init__(self) -> None:
        for name, (holds, text) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise InputError(f"{name} must be {text}, got {value!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a run of `steps`.

        In the warm-up of w steps the rate is (step + 1) / w of the highest. Then, with x from 0 to 1 the share of the
        other steps that are done: linear 1 - x, polynomial (1 - x) ** power, cosine (1 + cos(pi x)) / 2, constant 1 of
        the way from `end_rate` (for `constant` 0) to the highest.
        """
        if not 0 <= step < steps:
            raise InputError(f"step must be in [0, {steps}), got {step}")
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warmup) / (steps - warmup)
        left: float = {
            "linear": 1 - done,
            "polynomial": (1 - done) ** self.power,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }[self.schedule]
        return self.end_rate + (self.learning_rate - self.end_rate) * left

    def decays(self, shape: tuple[int, ...]) -> bool:
        """Whether weight decay applies to a parameter of some shape."""
        return self.decayed == "all" or len(shape) > 1

    def dropout_seed(self, step: int, *parts: int) -> int:
        """What the dropout of a step, or of a part of its batch on one device, is drawn from, in [0, 2 ** 32)."""
        return int(np.random.SeedSequence([self.seed, step, *parts]).generate_state(1)[0])

    @property
    def parameter_dtype(self) -> str:
        """The type of parameters and moments."""
        return "float64" if self.precision == "float64" else "float32"


def _number(lowest: float, below: float = math.inf) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value < below

    return holds


_RULES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "learning_rate": (_number(0), "a number of at least 0"),
    "schedule": (SCHEDULES.__contains__, f"one of {', '.join(SCHEDULES)}"),
    "warmup": (_number(0, 1), "a share of the steps, in [0, 1)"),
    "power": (_number(0), "a number of at least 0"),
    "end_rate": (_number(0), "a number of at least 0"),
    "beta_1": (_number(0, 1), "in [0, 1)"),
    "beta_2": (_number(0, 1), "in [0, 1)"),
    "epsilon": (_number(0), "a number of at least 0"),
    "weight_decay": (_number(0), "a number of at least 0"),
    "decayed": (DECAYED.__contains__, f"one of {', '.join(DECAYED)}"),
    "clip": (lambda value: value is None or (_number(0)(value) and value > 0), "a positive number, or None"),
    "accumulation": (lambda value: isinstance(value, int) and value >= 1, "an integer of at least 1"),
    "precision": (PRECISIONS.__contains__, f"one of {', '.join(PRECISIONS)}"),
    "gradient_checkpointing": (lambda value: isinstance(value, bool), "True or False"),
    "freeze": (
        lambda value: isinstance(value, tuple) and all(isinstance(path, str) for path in value),
        "paths of parameters",
    ),
    "seed": (lambda value: isinstance(value, int) and value >= 0, "an integer of at least 0"),
}
