"""What `torch.nn` has too, and computes more slowly or keeps more for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Which operator of PyTorch tells whether the processor has products of a type."""

EMULATED = frozenset(dtype for dtype, name in SUPPORTED.items() if not getattr(torch.ops.mkldnn, name, lambda: True)())
"""Types whose products this processor does not have: PyTorch takes about five times as long for them as in float32."""


class Linear(nn.Linear):
    """x weight^T + bias. `EMULATED` products are computed in float32, and rounded as a kernel for them would do it."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_emulated(x) or x.dtype != self.weight.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def is_emulated(x: Tensor) -> bool:
    """Whether a product with these numbers is better computed in float32."""
    return x.dtype in EMULATED and x.device.type == "cpu"


class Dropout(nn.Dropout):
    """Zeros in place of a share `p` of the elements, the others divided by 1 - p; in training only.

    PyTorch's own takes a random number for each element on a processor, which takes longer than attention does, and
    keeps a factor in full size for the backward pass. Here 16 bits decide on an element, so that the share of a call is
    a multiple of 2**-16, below or above p so often that each element's probability is p; and a boolean is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.inplace or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if not self.is_coarse():
            return super().forward(x)
        return (x * self.draw(x.shape)).mul_(1 / (1 - self.p))

    def is_coarse(self) -> bool:
        """Whether 16 bits are enough for this rate."""
        return 2**-8 <= self.p <= 1 - 2**-8

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """Which elements stay."""
        count = shape.numel()
        numbers = torch.randint(-(2**63), 2**63 - 1, (1 + -(-count // 4),), generator=generator)
        rounding = numbers[-1].double() * 2**-64 + 0.5  # in [0, 1]
        zeros = (self.p * 2**16 + rounding).floor() - 2**15  # those of the 2**16 numbers that are smaller
        return (numbers.view(torch.int16)[:count] >= zeros.short()).view(shape)


def dense_after(before: Callable[[Tensor], Tensor], dense: nn.Linear, x: Tensor) -> Tensor:
    """dense(before(x)); in training, where that can be, without keeping before(x) for the backward pass.

    Args:
        before: PyTorch's own LayerNorm, or a function without parameters, that takes little time to compute anew.
        dense: what follows.
        x: (..., D).
    """
    normalises = isinstance(before, nn.Module)
    alone = is_alone(dense) and (not normalises or is_alone(before)) and not is_emulated(x)
    if not alone or not torch.is_grad_enabled() or is_transformed() or is_autocast(x.device.type):
        return dense(before(x))
    if not normalises:
        return DenseAfter.apply(before, dense.weight, dense.bias, x)

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, before.normalized_shape, weight, bias, before.eps)

    return DenseAfter.apply(normalise, dense.weight, dense.bias, x, before.weight, before.bias)


def is_transformed() -> bool:
    """Whether a compiler decides what is kept for the backward pass, or derivatives are not those of that pass."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_autocast(kind: str) -> bool:
    """Whether layers on such a device compute in another type than that of their inputs."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_alone(module: nn.Module) -> bool:
    """Whether a layer is PyTorch's own and without hooks, so that nobody else sees what it returns or changes it."""
    return type(module) in (Linear, nn.Linear, nn.LayerNorm) and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether there are hooks on a module's calls."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_all = nn.modules.module
    return any((*own, of_all._global_forward_hooks, of_all._global_forward_pre_hooks, of_all._global_backward_hooks))


class DenseAfter(torch.autograd.Function):
    """before(*inputs) weight^T + bias, of which the backward pass computes before(*inputs) anew."""

    @staticmethod
    def forward(ctx: Any, before: Callable[..., Tensor], weight: Tensor, bias: Tensor, *inputs: Tensor) -> Tensor:
        ctx.before = before
        ctx.save_for_backward(weight, *inputs)
        return F.linear(before(*inputs), weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, of_weight, of_bias, *of_inputs = ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # then the gradients are differentiated in their turn
        if not twice:
            inputs = [x.detach().requires_grad_(needed) for x, needed in zip(inputs, of_inputs, strict=True)]
        with torch.enable_grad():
            before = ctx.before(*inputs)
        rows, found = upstream.reshape(-1, upstream.shape[-1]), iter(())
        if any(of_inputs):
            wanted = [x for x, needed in zip(inputs, of_inputs, strict=True) if needed]
            found = iter(torch.autograd.grad(before, wanted, upstream @ weight, create_graph=twice))
        return (
            None,
            rows.T @ (before if twice else before.detach()).reshape(len(rows), -1) if of_weight else None,
            rows.sum(0) if of_bias else None,
            *(next(found) if needed else None for needed in of_inputs),
        )
