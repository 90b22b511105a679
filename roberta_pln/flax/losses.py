"""The losses, one function each; every one is a scalar mean in at least float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from roberta_pln import checks
from roberta_pln.flax.layers import at_least_float32, readable
from roberta_pln.numerics import IGNORE_INDEX


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean of -log softmax(logits)[label] over the labels that are not -100; NaN if there is none.

    Args:
        logits: (..., K).
        labels: (...) integers in [0, K), or -100.

    Raises:
        InputError: when a label is out of range and its value can be read; the loss is NaN when it cannot.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    classes = logits.shape[-1]
    if readable(labels):
        values = np.asarray(labels)
        values = values[values != IGNORE_INDEX]
        if values.size:
            checks.labels_in_range("labels", int(values.min()), int(values.max()), classes, IGNORE_INDEX)
    kept = labels != IGNORE_INDEX
    known = (labels >= 0) & (labels < classes)
    picked = jnp.where(known, labels, 0)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), picked, axis=-1)[..., 0]
    losses = jnp.where(known, losses, jnp.where(kept, jnp.nan, 0.0).astype(losses.dtype))
    return losses.sum() / kept.sum(dtype=losses.dtype)
