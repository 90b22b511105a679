"""The losses, one function each; every one is a scalar mean in at least float32."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from roberta_pln import checks
from roberta_pln.numerics import IGNORE_INDEX, LOGITS_PER_CHUNK
from roberta_pln.pt.embeddings import readable
from roberta_pln.pt.layers import is_autocast, is_transformed


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
    check_labels(name, labels, logits.shape[-1])
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX)


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Refuse labels that are neither in [0, classes) nor -100, if their values can be read."""
    if readable(labels):
        kept = labels[labels != IGNORE_INDEX]
        if kept.numel():
            lowest, highest = torch.aminmax(kept)
            checks.labels_in_range(name, int(lowest), int(highest), classes, IGNORE_INDEX)


def causal_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy` of each token's logits (B, T, V) with the next token's label (B, T)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def next_labels(labels: Tensor) -> Tensor:
    """For each place the label of the next one, (B, T) -> (B, T); nothing is behind the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def labels_within(labels: Tensor, segment_ids: Tensor) -> Tensor:
    """Labels (B, T) less those of padding and of first tokens, which the segment before does not predict."""
    before = F.pad(segment_ids[:, :-1], (1, 0))
    return torch.where((segment_ids == before) & (segment_ids > 0), labels, IGNORE_INDEX)


def labelled_places(labels: Tensor) -> Tensor | None:
    """Places of the labels (B, T) that are not -100, in each row before others: (B, M) for the row with most of them.

    None if it cannot be seen how many they are.
    """
    if not labels.numel() or not readable(labels) or is_transformed():
        return None
    labelled = labels != IGNORE_INDEX
    most = max(1, int(labelled.sum(dim=1).max()))
    return labelled.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def labels_at(labels: Tensor, places: Tensor | None) -> Tensor:
    """Labels (B, T) at places, (B, M); all of them if no places are given."""
    return labels if places is None else labels.gather(1, places)


def labelled_cross_entropy(
    hidden_states: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor], table: Tensor, bias: Tensor
) -> Tensor:
    """`cross_entropy` of the logits transform(x) table^T + bias, of which no more than a chunk is ever held.

    Only what has a label is decoded. The gradients of the decoder are computed with the loss, a chunk at a time, and
    scaled in the backward pass: a second derivative needs the logits, and so does anything but reverse mode.

    Args:
        hidden_states: (B, T, D).
        labels: (B, T) integers in [0, V), or -100.
        transform: what comes before the decoder, (..., D) -> (..., D).
        table: (V, D).
        bias: (V,).

    Raises:
        InputError: as `cross_entropy`.
    """
    if torch.compiler.is_compiling():  # not this: how much there is to compute depends on the labels
        return torch.compiler.disable(labelled_cross_entropy)(hidden_states, labels, transform, table, bias)
    check_labels("labels", labels, len(table))
    labelled = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    states = transform(hidden_states[labelled])  # (M, D)
    kind = states.device.type
    if is_autocast(kind) and states.dtype != torch.float64:
        states = states.to(torch.get_autocast_dtype(kind))  # as a linear layer would
    needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (states, table, bias)]
    return Decoded.apply(states, labels[labelled], table, bias, needed)[0]


class Decoded(torch.autograd.Function):
    """The mean that `in_chunks` finds, which gives the gradients on, to somebody who may write into them.

    A second backward pass through the same graph computes them anew.
    """

    @staticmethod
    def forward(states: Tensor, labels: Tensor, table: Tensor, bias: Tensor, needed: list[bool]) -> tuple:
        with torch.autocast(states.device.type, enabled=False):
            return in_chunks(states, labels, table, bias, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.needed = inputs
        gradients = output[1:]
        ctx.mark_non_differentiable(*(gradient for gradient in gradients if gradient is not None))
        ctx.set_materialize_grads(False)  # zeros as large as the table for an output that nobody differentiates
        if is_transformed():  # which see nothing but what is saved
            ctx.save_for_backward(*tensors, *gradients)
        else:
            ctx.save_for_backward(*tensors)
            ctx.gradients = gradients

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (states, labels, table, bias), gradients = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        if not gradients:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                gradients = Decoded.forward(states.detach(), labels, table.detach(), bias.detach(), ctx.needed)[1:]
        inputs = states, table, bias
        if is_one(upstream):  # nothing to scale: a copy of the table would take longer than a layer
            pairs = zip(inputs, gradients, strict=True)
            states, table, bias = (None if gradient is None else gradient.to(x.dtype) for x, gradient in pairs)
        else:
            states, table, bias = Scaled.apply(upstream, *inputs, *gradients)
        return states, None, table, bias, None


def is_one(upstream: Tensor) -> bool:
    """Whether a gradient is that of the loss alone, if that can be seen at once and is not differentiated again."""
    return not torch.is_grad_enabled() and upstream.device.type == "cpu" and readable(upstream) and upstream.item() == 1


class Scaled(torch.autograd.Function):
    """Gradients times a number. How they depend on what they are the gradients of is not known any more."""

    @staticmethod
    def forward(scale: Tensor, states: Tensor, table: Tensor, bias: Tensor, *gradients: Tensor | None) -> tuple:
        return tuple(
            None if gradient is None else (gradient * scale).to(tensor.dtype)
            for gradient, tensor in zip(gradients, (states, table, bias), strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise checks.no_second_derivative()


def in_chunks(
    states: Tensor, labels: Tensor, table: Tensor, bias: Tensor, gradients: list[bool]
) -> tuple[Tensor | None, ...]:
    """The mean of -log softmax(states table^T + bias)[label], and its gradients.

    Args:
        states: (M, D), in the type of the computation.
        labels: (M,).
        table: (V, D).
        bias: (V,).
        gradients: which gradients are needed; the others are None.

    Returns:
        The mean, and the gradients of states, table and bias, all in at least float32.
    """
    dtype, wide = states.dtype, torch.promote_types(states.dtype, torch.float32)
    decoder, offset = table.to(dtype), bias.to(dtype)
    total = states.new_zeros((), dtype=wide)
    of_states, of_table, of_bias = (
        torch.zeros_like(tensor, dtype=wide) if needed else None
        for tensor, needed in zip((states, table, bias), gradients, strict=True)
    )
    rows, share = max(1, LOGITS_PER_CHUNK // len(table)), 1 / max(1, len(states))
    for start in range(0, len(states), rows):
        part, targets = states[start : start + rows], labels[start : start + rows, None]
        logits = (part @ decoder.T).add_(offset).to(wide)  # (rows, V); the rest in place, fresh memory takes longer
        logits.sub_(logits.amax(-1, keepdim=True))
        picked = logits.gather(1, targets)
        powers = logits.exp_()
        sums = powers.sum(-1, keepdim=True)
        total += (sums.log() - picked).sum()
        if not any(gradients):
            continue
        slopes = powers.div_(sums).scatter_add_(1, targets, -torch.ones_like(targets, dtype=wide))
        if of_bias is not None:
            of_bias.add_(slopes.sum(0), alpha=share)
        slopes = slopes.to(dtype)
        if of_states is not None:
            of_states[start : start + rows] = (slopes @ decoder).mul_(share)
        if of_table is not None and dtype == wide:  # without a second table for the product, or a look at zeros
            of_table.addmm_(slopes.T, part, beta=1 if start else 0, alpha=share)
        elif of_table is not None:
            of_table.add_(slopes.T @ part, alpha=share)
    return total / len(states), of_states, of_table, of_bias


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
