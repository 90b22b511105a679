"""The losses, one function each; every one is a scalar mean in at least float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from roberta_pln import checks
from roberta_pln.numerics import IGNORE_INDEX


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not -100; NaN if there is none.

    Args:
        logits: (..., K).
        labels: (...) integers in [0, K), or -100.

    Raises:
        InputError: when a label is out of range and its value can be read.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    labels = labels.flatten()
    if not torch.compiler.is_compiling():
        kept = labels[labels != IGNORE_INDEX]
        if kept.numel():
            lowest, highest = torch.aminmax(kept)
            checks.labels_in_range("labels", int(lowest), int(highest), logits.shape[-1], IGNORE_INDEX)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
