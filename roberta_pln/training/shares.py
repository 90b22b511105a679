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
        head: one of `schema.HEADS`.

    Raises:
        InputError: when the batch has no label; when there are several shares, and an answer outside of its row, which
            the loss of a question answering model leaves out.
    """
    total = labels_of(batch, head)
    if not total:
        raise InputError("a batch to train on must have a label, got none: give labels that are not -100")
    if count == 1:
        return [Share(batch, 1.0)]
    _check_answers(batch)
    shares = []
    for rows in np.array_split(np.arange(len(batch["input_ids"])), count):
        part = {name: array[rows] if len(rows) else array[:1] for name, array in batch.items()}
        labels = labels_of(part, head)
        if not labels:
            part |= _with_one_label(part)
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
    return int((counted(batch, head) != IGNORE_INDEX).sum())


def counted(batch: Arrays, head: str) -> NDArray[Any]:
    """The integer labels of a batch, -100 where the loss leaves them out: no token predicts the first one of a text."""
    labels = batch["labels"]
    if head != "ForCausalLM":
        return labels
    texts = batch.get("segment_ids", np.ones_like(labels))
    predicted = (texts[:, 1:] == texts[:, :-1]) & (texts[:, 1:] > 0)
    return np.where(np.pad(predicted, ((0, 0), (1, 0))), labels, IGNORE_INDEX)


def _with_one_label(batch: Arrays) -> Arrays:
    """What to change in a batch so that its loss is that of one label."""
    labels = batch["labels"].copy()
    if labels.ndim == 1:
        labels[0] = 0
        return {"labels": labels}
    labels[0, -1] = 0
    if "segment_ids" not in batch:
        return {"labels": labels}
    texts = batch["segment_ids"].copy()
    texts[0] = 1  # there may be none of two tokens, and the first of a text is not predicted
    return {"labels": labels, "segment_ids": texts}


def _check_answers(batch: Arrays) -> None:
    """All answers count, so that the weight of a share is its number of rows."""
    for name in LABELS[1:]:
        positions, length = batch.get(name), batch["input_ids"].shape[-1]
        if positions is not None and not ((positions >= 0) & (positions < length)).all():
            raise InputError(
                f"{name} must be in [0, {length}), the tokens of a row, where a batch is computed in shares, got "
                f"{int(positions.min())} to {int(positions.max())}: leave out the rows whose answers were cut off"
            )
