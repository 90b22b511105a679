"""What `torch.nn` has too, and computes more slowly or keeps more for."""

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Which operator of PyTorch tells whether the processor has products of a type."""

EMULATED = frozenset(dtype for dtype, name in SUPPORTED.items() if not getattr(torch.ops.mkldnn, name, lambda: True)())
"""Types whose products this processor does not have: PyTorch takes about five times as long for them as in float32."""

COMPILED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether oneDNN's kernel is there which PyTorch ships for compiled code."""


class Linear(nn.Linear):
    """x weight^T + bias. `EMULATED` products are computed in float32, and rounded as a kernel for them would do it."""

    def forward(self, x: Tensor) -> Tensor:
        if is_fused(x, self.weight):
            return fused(x, self.weight, self.bias)
        if not is_emulated(x) or x.dtype != self.weight.dtype:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, by `COMPILED` code's kernel; the weight may be in the kernel's own order."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether `fused`, which has no gradient, computes a product.

    The usual one copies the bias into the result first, which in bfloat16 takes a tenth of the time; both round
    once. In float32 the usual one is faster nevertheless.
    """
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype or not x.device.type == weight.device.type == "cpu":
        return False
    if not {type(x), type(weight)} <= {Tensor, nn.Parameter} or x.shape[-1:] != weight.shape[1:]:
        return False  # numbers in another form, and what PyTorch has an error for
    if torch.is_grad_enabled() or is_transformed() or is_autocast("cpu") or torch.jit.is_tracing():
        return False
    return COMPILED and not is_emulated(x)


def is_emulated(x: Tensor) -> bool:
    """Whether a product with these numbers is better computed in float32."""
    return x.dtype in EMULATED and x.device.type == "cpu"


class Dropout(nn.Dropout):
    """Zeros in place of a share `p` of the elements, the others divided by 1 - p; in training only.

    PyTorch's own takes a random number for each element on a processor, which takes longer than attention does, and
    keeps a factor in full size for the backward pass. Here 16 bits decide on an element, so that the share of a call is
    a multiple of 2**-16, below or above p so often that each element's probability is p; and a byte is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.inplace or x.device.type != "cpu" or is_transformed() or torch.jit.is_tracing():
            return super().forward(x)
        if not self.is_coarse():
            return super().forward(x)
        return (x * self.draw(x.shape, bits(next_seed()))).mul_(1 / (1 - self.p))

    def is_coarse(self) -> bool:
        """Whether 16 bits are enough for this rate."""
        return 2**-8 <= self.p <= 1 - 2**-8

    def draw(self, shape: torch.Size, generator: np.random.Generator) -> Tensor:
        """1 for elements that stay, 0 for the others; PyTorch multiplies with bytes faster than with booleans."""
        count = shape.numel()
        numbers = generator.integers(2**64, size=1 + -(-count // 4), dtype=np.uint64)
        rounding = float(numbers[-1]) * 2**-64  # in [0, 1]
        zeros = math.floor(self.p * 2**16 + rounding) - 2**15  # those of the 2**16 numbers that are smaller
        return (torch.from_numpy(numbers.view(np.int16)[:count]) >= zeros).view(torch.int8).view(shape)


def next_seed() -> int:
    """A number from PyTorch's own generator."""
    return int(torch.randint(2**63 - 1, ()))


def bits(seed: int) -> np.random.Generator:
    """Random numbers for dropout, in a third of the time that PyTorch's own take."""
    return np.random.Generator(np.random.SFC64(seed))


def dense_after(before: Callable[[Tensor], Tensor], x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer of before(x); in training, where that can be, without keeping before(x) for the backward pass.

    Args:
        before: PyTorch's own LayerNorm, or a function without parameters, that takes little time to compute anew.
        x: (..., D).
        *layers: what follows, one beside the other.
    """
    normalises = isinstance(before, nn.Module)
    plain = not torch.is_grad_enabled() or is_transformed() or is_autocast(x.device.type) or is_emulated(x)
    if plain or not all(map(is_alone, (before, *layers) if normalises else layers)):
        x = before(x)
        return tuple(layer(x) for layer in layers)
    function, inputs = before, (x,)
    if normalises:
        function = partial(normalise, before.normalized_shape, before.eps)
        inputs = x, before.weight, before.bias
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return DenseAfter.apply(function, len(layers), *weights, *biases, *inputs)


def rows_at(states: Tensor, places: Tensor) -> Tensor:
    """Some of the rows (B, T, D), those at places (B, M) or (1, M): (B, M, D)."""
    batch, _, size = states.shape
    return states.gather(1, places[..., None].expand(batch, -1, size))


def normalise(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's LayerNorm, with its parameters as the last arguments."""
    return F.layer_norm(x, shape, weight, bias, eps)


def is_transformed() -> bool:
    """Whether a compiler decides what is kept for the backward pass, or derivatives are not those of that pass."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_autocast(kind: str) -> bool:
    """Whether layers on such a device compute in another type than that of their inputs."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_alone(module: nn.Module) -> bool:
    """Whether a layer is PyTorch's own and without hooks, so that its weights are there and nobody sees its result."""
    return type(module) in (Linear, nn.Linear, nn.LayerNorm) and not any(hooks(module))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees what a module returns: there are hooks on its calls, other than those that shard it."""
    return any(not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp") for hook in hooks(module))


def hooks(module: nn.Module) -> Iterator[Callable]:
    """What is called with a module's calls, before or after them."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_all = nn.modules.module
    for some in (*own, of_all._global_forward_hooks, of_all._global_forward_pre_hooks, of_all._global_backward_hooks):
        yield from some.values()


class DenseAfter(torch.autograd.Function):
    """before(*inputs) weight^T + bias for some weights and biases; the backward pass computes before(*inputs) anew."""

    @staticmethod
    def forward(ctx: Any, before: Callable[..., Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, biases, inputs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.before, ctx.count = before, count
        ctx.save_for_backward(*weights, *inputs)
        found = before(*inputs)
        return tuple(F.linear(found, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        count, needs = ctx.count, ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors  # once, or PyTorch's checkpoint would compute them once more
        weights, inputs = saved[:count], saved[count:]
        of_weights, of_biases, of_inputs = needs[:count], needs[count : 2 * count], needs[2 * count :]
        twice = torch.is_grad_enabled()  # then the gradients are differentiated in their turn
        if not twice:
            inputs = [x.detach().requires_grad_(needed) for x, needed in zip(inputs, of_inputs, strict=True)]
        with torch.enable_grad():
            before = ctx.before(*inputs)
        found = iter(())
        if any(of_inputs):
            slopes = reduce(torch.add, map(torch.matmul, upstream, weights))
            wanted = [x for x, needed in zip(inputs, of_inputs, strict=True) if needed]
            found = iter(torch.autograd.grad(before, wanted, slopes, create_graph=twice))
        rows = [above.reshape(-1, above.shape[-1]) for above in upstream]
        columns = (before if twice else before.detach()).flatten(0, -2)
        return (
            None,
            None,
            *(above.T @ columns if needed else None for above, needed in zip(rows, of_weights, strict=True)),
            *(above.sum(0) if needed else None for above, needed in zip(rows, of_biases, strict=True)),
            *(next(found) if needed else None for needed in of_inputs),
        )
