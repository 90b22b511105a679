"""The losses, one function each; every one is a scalar mean in at least float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from roberta_pln import checks
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.pt.embeddings import readable


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not -100; NaN if there is none.

    Args:
        logits: (..., K).
        labels: (...) integers in [0, K), or -100.
        name: what an error calls the labels.

    Raises:
        InputError: when a label is out of range and its value can be read.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    labels = labels.flatten()
    if readable(labels):
        kept = labels[labels != IGNORE_INDEX]
        if kept.numel():
            lowest, highest = torch.aminmax(kept)
            checks.labels_in_range(name, int(lowest), int(highest), logits.shape[-1], IGNORE_INDEX)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def causal_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy` of each token's logits (B, T, V) with the next token's label (B, T)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def classification(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a sequence classifier.

    Args:
        kind: `regression` is the mean squared error, `single_label_classification` is `cross_entropy`, and
            `multi_label_classification` is the mean binary cross entropy of each label.
        logits: (B, L).
        labels: (B,) or (B, 1) for one label and for classes, (B, L) otherwise.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.flatten().long())
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span(start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """The mean of the cross entropies (B, T) of start and end; a position (B,) outside of the tokens is left out."""
    losses = [
        cross_entropy(logits, torch.where((at >= 0) & (at < logits.shape[-1]), at, IGNORE_INDEX))
        for logits, at in ((start_logits, start_positions.flatten()), (end_logits, end_positions.flatten()))
    ]
    return (losses[0] + losses[1]) / 2
