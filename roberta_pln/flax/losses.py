"""The losses, one function each; every one is a scalar mean in at least float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from roberta_pln import checks
from roberta_pln.flax.layers import at_least_float32, readable
from roberta_pln.numerics import IGNORE_INDEX, LOGITS_PER_CHUNK


def cross_entropy(logits: Array, labels: Array, name: str = "labels") -> Array:
    """Mean of -log softmax(logits)[label] over the labels that are not -100; NaN if there is none.

    Args:
        logits: (..., K).
        labels: (...) integers in [0, K), or -100.
        name: what an error calls the labels.

    Raises:
        InputError: when a label is out of range and its value can be read; the loss is NaN when it cannot.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    classes = logits.shape[-1]
    check_labels(name, labels, classes)
    kept = labels != IGNORE_INDEX
    known = (labels >= 0) & (labels < classes)
    picked = jnp.where(known, labels, 0)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), picked, axis=-1)[..., 0]
    losses = jnp.where(known, losses, jnp.where(kept, jnp.nan, 0.0).astype(losses.dtype))
    return losses.sum() / kept.sum(dtype=losses.dtype)


def check_labels(name: str, labels: Array, classes: int) -> None:
    """Refuse labels that are neither in [0, classes) nor -100, if their values can be read."""
    if readable(labels):
        values = np.asarray(labels)
        values = values[values != IGNORE_INDEX]
        if values.size:
            checks.labels_in_range(name, int(values.min()), int(values.max()), classes, IGNORE_INDEX)


def causal_cross_entropy(logits: Array, labels: Array) -> Array:
    """`cross_entropy` of each token's logits (B, T, V) with the next token's label (B, T)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def next_labels(labels: Array) -> Array:
    """For each place the label of the next one, (B, T) -> (B, T); nothing is behind the last."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def labels_within(labels: Array, segment_ids: Array) -> Array:
    """Labels (B, T) less those of padding and of first tokens, which the segment before does not predict."""
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where((segment_ids == before) & (segment_ids > 0), labels, IGNORE_INDEX)


def labelled_cross_entropy(
    hidden_states: Array, labels: Array, transform: Callable[[Array], Array], table: Array, bias: Array
) -> Array:
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
    check_labels("labels", labels, len(table))
    # XLA has one size for all batches: every position is taken, those with labels first, and the loop ends behind them.
    # Where a mesh may share the batch out, they change places within their row only, which is all on one device, and a
    # chunk is shared out as the batch is.
    devices = jax.device_count()
    groups = 1 if devices == 1 else len(labels)
    states, labels = transform(hidden_states), labels.reshape(groups, -1)
    size = states.shape[-1]
    order = jnp.argsort(labels == IGNORE_INDEX, axis=1, stable=True)
    labels = jnp.take_along_axis(labels, order, axis=1)
    states = jnp.take_along_axis(states.reshape(*labels.shape, size), order[..., None], axis=1)
    length = labels.shape[1]
    rows = max(1, min(length, devices * LOGITS_PER_CHUNK // len(table) // groups))
    chunks = max(1, -(-length // rows))
    missing = (0, chunks * rows - length)
    states = jnp.pad(states, ((0, 0), missing, (0, 0))).reshape(groups, chunks, rows, size)
    labels = jnp.pad(labels, ((0, 0), missing), constant_values=IGNORE_INDEX).reshape(groups, chunks, rows)
    return decoded(states, labels, table, bias)


@jax.custom_vjp
def decoded(states: Array, labels: Array, table: Array, bias: Array) -> Array:
    """The mean that `in_chunks` finds, which gives the gradients on."""
    (mean,) = in_chunks(states, labels, table, bias, gradients=False)
    return mean


def decoded_forward(states: Array, labels: Array, table: Array, bias: Array) -> tuple[Array, tuple[Any, ...]]:
    """The mean, and what the backward pass needs."""
    mean, *gradients = in_chunks(states, labels, table, bias, gradients=True)
    return mean, (gradients, (states, table, bias))


def decoded_backward(kept: tuple[Any, ...], upstream: Array) -> tuple[Array | None, ...]:
    """The gradients of the mean."""
    states, table, bias = ((gradient * upstream).astype(x.dtype) for gradient, x in zip(*kept, strict=True))
    return states, None, table, bias


decoded.defvjp(decoded_forward, decoded_backward)


@partial(jax.jit, static_argnames="gradients")
def in_chunks(states: Array, labels: Array, table: Array, bias: Array, gradients: bool) -> tuple[Array, ...]:
    """The mean of -log softmax(states table^T + bias)[label], and its gradients.

    Args:
        states: (G, C, rows, D), in the type of the computation; those with labels first in each group.
        labels: (G, C, rows).
        table: (V, D).
        bias: (V,).
        gradients: whether they are wanted.

    Returns:
        The mean, and the gradients of states, table and bias, in at least float32; without gradients the mean alone.
    """
    dtype, wide, (classes, size) = states.dtype, at_least_float32(states.dtype), table.shape
    decoder, offset = table.astype(dtype), bias.astype(dtype)
    count = (labels != IGNORE_INDEX).sum(dtype=wide)
    share = 1 / jnp.maximum(count, 1)

    def chunk(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        part, targets = states[:, i].reshape(-1, size), labels[:, i].reshape(-1, 1)
        logits = (part @ decoder.T + offset).astype(wide)  # (rows, V); in two axes, since XLA is slower with three
        highest = -(-logits).min(-1, keepdims=True)  # XLA would fuse `max` with the product, and take thrice as long
        powers = jnp.exp(logits - highest)
        sums = powers.sum(-1, keepdims=True)
        known = (targets >= 0) & (targets < classes)
        targets, ignored = jnp.where(known, targets, 0), targets == IGNORE_INDEX
        losses = highest + jnp.log(sums) - jnp.take_along_axis(logits, targets, axis=-1)
        total = found[0] + jnp.where(known, losses, jnp.where(ignored, 0, jnp.nan).astype(wide)).sum()
        if not gradients:
            return (total,)
        slopes = powers / sums - (targets == jnp.arange(classes, dtype=targets.dtype)).astype(wide)
        slopes = jnp.where(known, slopes, 0)
        _, of_states, of_table, of_bias = found
        of_bias += share * jnp.matmul(jnp.ones(len(slopes), wide), slopes, precision="highest")  # `sum` is far slower
        slopes = slopes.astype(dtype)
        of_states = of_states.at[:, i].set(share * (slopes @ decoder).astype(wide).reshape(of_states[:, i].shape))
        return total, of_states, plus_product(of_table, slopes, part, share), of_bias

    chunks = (labels[..., 0] != IGNORE_INDEX).any(0).sum()  # the others have no labels
    starts = tuple(jnp.zeros(x.shape, wide) for x in (states, table, bias)) if gradients else ()
    total, *found = jax.lax.fori_loop(0, chunks, chunk, (jnp.zeros((), wide), *starts))
    return total / count, *found


def plus_product(total: Array, left: Array, right: Array, scale: Array) -> Array:
    """total + scale left^T right, some rows after the others, since otherwise the product is there beside the sum.

    Args:
        total: (V, D).
        left: (M, V).
        right: (M, D).
        scale: a number.
    """
    height, width = total.shape
    if jax.device_count() > 1:  # which may share the rows out
        return total + scale * jnp.matmul(left.T, right, preferred_element_type=total.dtype)
    turns = -(-height // max(1, LOGITS_PER_CHUNK // width))
    rows = -(-height // turns)

    def turn(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * rows, height - rows)  # so that the last ones are as many: some of them had their turn
        product = jnp.matmul(
            jax.lax.dynamic_slice_in_dim(left, start, rows, 1).T, right, preferred_element_type=total.dtype
        )
        product = jnp.where((start + jnp.arange(rows) >= i * rows)[:, None], scale * product, 0)
        before = jax.lax.dynamic_slice_in_dim(total, start, rows)
        return jax.lax.dynamic_update_slice_in_dim(total, before + product, start, 0)

    return jax.lax.fori_loop(0, turns, turn, total)


def classification(kind: str, logits: Array, labels: Array) -> Array:
    """The loss of a sequence classifier.

    Args:
        kind: `regression` is the mean squared error, `single_label_classification` is `cross_entropy`, and
            `multi_label_classification` is the mean binary cross entropy of each label.
        logits: (B, L).
        labels: (B,) or (B, 1) for one label and for classes, (B, L) otherwise.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.flatten())
    labels = labels.reshape(logits.shape).astype(logits.dtype)
    if kind == "regression":
        return jnp.square(logits - labels).mean()
    return (jax.nn.softplus(logits) - logits * labels).mean()


def span(start_logits: Array, end_logits: Array, start_positions: Array, end_positions: Array) -> Array:
    """The mean of the cross entropies (B, T) of start and end; a position (B,) outside of the tokens is left out."""
    losses = [
        cross_entropy(logits, jnp.where((at >= 0) & (at < logits.shape[-1]), at, IGNORE_INDEX))
        for logits, at in ((start_logits, start_positions.flatten()), (end_logits, end_positions.flatten()))
    ]
    return (losses[0] + losses[1]) / 2
