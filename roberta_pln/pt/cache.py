"""A decoder's cache in tensors of a fixed size, so that no step copies what earlier ones wrote."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """Keys or values of one layer, (B, H, S, K), in a tensor that has room for more.

    It is changed in place, so only a loop that never looks back uses it; elsewhere a cache is made of plain tensors.

    Args:
        tensor: (B, H, max_length, K).
        tokens: how many slots are taken; they are the first ones.
    """

    def __init__(self, tensor: Tensor, tokens: int = 0) -> None:
        self.tensor, self.tokens = tensor, tokens

    @property
    def shape(self) -> torch.Size:
        """(B, H, tokens, K)."""
        return entries(self).shape


def append(past: Tensor | Slots, new: Tensor) -> Tensor | Slots:
    """Keys or values with T new ones (B, H, T, K) behind them."""
    if not isinstance(past, Slots):
        return torch.cat((past, new), dim=2)
    end = past.tokens + new.shape[2]
    past.tensor[:, :, past.tokens : end] = new
    return Slots(past.tensor, end)


def entries(past: Tensor | Slots) -> Tensor:
    """Keys or values, (B, H, S, K)."""
    return past.tensor[:, :, : past.tokens] if isinstance(past, Slots) else past


def with_room(
    past: Sequence[Sequence[Tensor]], max_length: int, rows: Tensor
) -> tuple[tuple[Tensor | Slots, ...], ...]:
    """A cache of plain tensors as one with room for `max_length` tokens; those of cross-attention keep their size.

    Args:
        past: what a call on the prompts returned.
        max_length: tokens of prompt and continuation.
        rows: (R,) the row of the prompts that each row continues.
    """
    return tuple(
        (*(_slots(part, max_length, rows) for part in layer[:2]), *(part[rows] for part in layer[2:])) for layer in past
    )


def reorder(past: Sequence[Sequence[Tensor | Slots]], rows: Tensor) -> None:
    """Give every row the cache of another, in place. Cross-attention stays: rows of one prompt have the same there."""
    for layer in past:
        for part in layer[:2]:
            entries(part).copy_(entries(part)[rows])


def _slots(part: Tensor, max_length: int, rows: Tensor) -> Slots:
    _, heads, tokens, size = part.shape
    tensor = part.new_empty(len(rows), heads, max_length, size)
    tensor[:, :, :tokens] = part[rows]
    return Slots(tensor, tokens)
