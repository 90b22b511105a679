"""A batch in shares, one for each device or one after the other, so that together they give the loss of the whole.

The loss of a batch is the mean over its labels. A share with n of the N labels has a mean of its own, which counts
n / N: the sum of `weight * loss`, and of the gradients, over the shares is that of the batch.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from roberta_pln.checks import InputError
from roberta_pln.data.batches import Arrays
from roberta_pln.numerics import IGNORE_INDEX

LABELS: Final = ("labels", "start_positions", "end_positions")


class Share(NamedTuple):
    """Some rows of a batch."""

    arrays: Arrays
    weight: float
    """Its part of all labels; the weights of all shares add up to 1."""


def share_out(batch: Arrays, count: int, head: str) -> list[Share]:
    """A batch in shares of neighbouring rows, whose numbers differ by one at most.

    A share without a label, whose mean would be NaN, has a made-up one and weighs nothing; one without rows has the
    first row of the batch, so that all devices take part in every step.

    Args:
        batch: arguments of a model, with labels.
        count: number of shares.
        head: one of `schema.HEADS`. `ForCausalLM` predicts no label in the first column.

    Raises:
        InputError: when the batch has no label.
    """
    total = labels_of(batch, head)
    if not total:
        raise InputError("a batch to train on must have a label, got none: give labels that are not -100")
    if count == 1:
        return [Share(batch, 1.0)]
    shares = []
    for rows in np.array_split(np.arange(len(batch["input_ids"])), count):
        part = {name: array[rows] if len(rows) else array[:1] for name, array in batch.items()}
        labels = labels_of(part, head)
        if not labels:
            part["labels"] = _with_one_label(part["labels"])
        shares.append(Share(part, labels / total if len(rows) else 0.0))
    return shares


def labels_of(batch: Arrays, head: str) -> int:
    """How many labels the loss of a batch is the mean of.

    Raises:
        InputError: when it has no array of labels.
    """
    if "start_positions" in batch:
        return len(batch["start_positions"])
    if "labels" not in batch:
        raise InputError(f"a batch to train on must have {' or '.join(LABELS[:2])}, got {', '.join(batch)}")
    labels = batch["labels"]
    if np.issubdtype(labels.dtype, np.floating):
        return int(labels.size)
    return int((labels[:, 1:] if head == "ForCausalLM" else labels).__ne__(IGNORE_INDEX).sum())


def _with_one_label(labels: NDArray[Any]) -> NDArray[Any]:
    labels = labels.copy()
    labels[(0,) if labels.ndim == 1 else (0, -1)] = 0
    return labels
