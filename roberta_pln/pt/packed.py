"""Weights laid out for the processor's kernel, for loops that multiply few rows with all of them again and again.

For four rows and more, and for bfloat16, PyTorch's usual kernel reads a weight at about half the rate of the memory;
oneDNN's, which PyTorch ships for compiled code, comes close to the whole once the weight is in its own order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from roberta_pln.pt.layers import COMPILED, EMULATED, fused

LEAST_ROWS = {torch.float32: 4, torch.bfloat16: 1}
"""From how many rows on it is faster."""


class Packed(NamedTuple):
    """A weight in the kernel's order, with what tells whether it is still the module's."""

    source: tuple[int, int]
    tensor: Tensor


_kept: WeakKeyDictionary[nn.Linear, Packed] = WeakKeyDictionary()


@contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Within this context the model's linear layers compute with packed weights, where that is faster.

    The packed weights take as much memory as the weights, and are kept with the model for the next time; one that has
    changed is packed anew.

    Args:
        model: the model.
        rows: how many rows most of its calls have.
    """
    modules = [module for module in model.modules() if isinstance(module, nn.Linear) and is_faster(module, rows)]
    for module in modules:
        module.forward = partial(linear, pack(module, rows), module)
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def is_faster(module: nn.Linear, rows: int) -> bool:
    """Whether the kernel is there for a layer's weight, and faster for so many rows."""
    weight = module.weight
    if weight.device.type != "cpu" or rows < LEAST_ROWS.get(weight.dtype, rows + 1) or weight.is_inference():
        return False
    return COMPILED and weight.dtype not in EMULATED


def pack(module: nn.Linear, rows: int) -> Tensor:
    """A layer's weight in the kernel's order."""
    weight = module.weight
    source = (weight.data_ptr(), weight._version)
    if module not in _kept or _kept[module].source != source:
        _kept[module] = Packed(source, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))
    return _kept[module].tensor


def linear(weight: Tensor, module: nn.Linear, inputs: Tensor) -> Tensor:
    """What the layer computes, with its packed weight."""
    return fused(inputs, weight, module.bias)
