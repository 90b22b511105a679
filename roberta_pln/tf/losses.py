"""The losses, one function each; every one is a scalar mean in at least float32."""

import math

import tensorflow as tf

from roberta_pln import checks
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tf.layers import at_least_float32


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not -100; NaN if there is none.

    Args:
        logits: (..., K).
        labels: (...) integers in [0, K), or -100.

    Raises:
        InputError: when a label is out of range and its value can be read; the loss is NaN when it cannot.
    """
    logits = tf.cast(logits, at_least_float32(logits.dtype))
    kept = labels != IGNORE_INDEX
    if tf.executing_eagerly() and tf.reduce_any(kept):
        lowest, highest = (int(reduce(labels[kept])) for reduce in (tf.reduce_min, tf.reduce_max))
        checks.labels_in_range("labels", lowest, highest, logits.shape[-1], IGNORE_INDEX)
    known = (labels >= 0) & (labels < logits.shape[-1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(known, labels, 0), logits)
    losses = tf.where(kept, tf.where(known, losses, math.nan), 0)
    return tf.reduce_sum(losses) / tf.reduce_sum(tf.cast(kept, losses.dtype))
