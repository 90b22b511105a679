"""The losses, one function each; every one is a scalar mean in at least float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from roberta_pln import checks
from roberta_pln.flax.layers import at_least_float32, readable
from roberta_pln.numerics import IGNORE_INDEX


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
    if readable(labels):
        values = np.asarray(labels)
        values = values[values != IGNORE_INDEX]
        if values.size:
            checks.labels_in_range(name, int(values.min()), int(values.max()), classes, IGNORE_INDEX)
    kept = labels != IGNORE_INDEX
    known = (labels >= 0) & (labels < classes)
    picked = jnp.where(known, labels, 0)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), picked, axis=-1)[..., 0]
    losses = jnp.where(known, losses, jnp.where(kept, jnp.nan, 0.0).astype(losses.dtype))
    return losses.sum() / kept.sum(dtype=losses.dtype)


def causal_cross_entropy(logits: Array, labels: Array) -> Array:
    """`cross_entropy` of each token's logits (B, T, V) with the next token's label (B, T)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


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
