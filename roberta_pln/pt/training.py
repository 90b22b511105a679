"""One optimizer step after another on a model; `roberta_pln/training` says which, and when."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from roberta_pln.backends import BACKENDS
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.pt import weights
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel
from roberta_pln.training.recipe import Recipe
from roberta_pln.training.shares import Arrays, share_out
from roberta_pln.training.state import Snapshot, Tensors


class Trainer:
    """A model, and the optimizer that trains it.

    Args:
        model: one of this package; its parameters become float32, or float64, as the recipe says.
        recipe: how weights follow gradients.
    """

    fixed_shapes = False
    """Whether every new shape of a batch costs time once."""

    def __init__(self, model: RobertaPreLayerNormPreTrainedModel, recipe: Recipe) -> None:
        self.model, self.recipe, self.steps = model, recipe, 0
        ...

    @classmethod
    def build(cls, config: RobertaPreLayerNormConfig, head: str, recipe: Recipe, parallel: str | None = None) -> "Trainer":
        """A trainer for a new model, whose weights `restore` is to bring."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""

    def wait(self) -> None:
        """Return when all processes have come here."""

    def step(self, batch: Arrays, rate: float) -> Tensor:
        """Take one step.

        Args:
            batch: arguments of the model with labels, in NumPy, of all devices together.
            rate: the learning rate.

        Returns:
            The loss of the whole batch before the step, () of this framework; it may still be computed when this
            returns, and `float` waits for it.
        """

    def predict(self, batch: Arrays) -> Arrays:
        """What the model says of every row of a batch, in evaluation mode, on every process.

        Returns:
            The logits by their names, at least float32; of a language model, which needs labels, instead for each
            label `losses`, float, -log softmax(logits)[label], and `best`, the index of the highest logit, both of the
            shape of the labels, zero where there is none.
        """

    def snapshot(self) -> Snapshot:
        """The state in canonical tensors, on every process; all of them call it together."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a state."""
