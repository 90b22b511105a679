"""The losses, one function each; every one is a scalar mean in at least float32."""

import math

import tensorflow as tf

from roberta_pln import checks
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tf.layers import at_least_float32


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, name: str = "labels") -> tf.Tensor:
    """Mean of -log softmax(logits)[label] over the labels that are not -100; NaN if there is none.

    Args:
        logits: (..., K).
        labels: (...) integers in [0, K), or -100.
        name: what an error calls the labels.

    Raises:
        InputError: when a label is out of range and its value can be read; the loss is NaN when it cannot.
    """
    logits = tf.cast(logits, at_least_float32(logits.dtype))
    kept = labels != IGNORE_INDEX
    if tf.executing_eagerly() and tf.reduce_any(kept):
        lowest, highest = (int(reduce(labels[kept])) for reduce in (tf.reduce_min, tf.reduce_max))
        checks.labels_in_range(name, lowest, highest, logits.shape[-1], IGNORE_INDEX)
    known = (labels >= 0) & (labels < logits.shape[-1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(known, labels, 0), logits)
    losses = tf.where(kept, tf.where(known, losses, math.nan), 0)
    return tf.reduce_sum(losses) / tf.reduce_sum(tf.cast(kept, losses.dtype))


def causal_cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """`cross_entropy` of each token's logits (B, T, V) with the next token's label (B, T)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def classification(kind: str, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The loss of a sequence classifier.

    Args:
        kind: `regression` is the mean squared error, `single_label_classification` is `cross_entropy`, and
            `multi_label_classification` is the mean binary cross entropy of each label.
        logits: (B, L).
        labels: (B,) or (B, 1) for one label and for classes, (B, L) otherwise.
    """
    logits = tf.cast(logits, at_least_float32(logits.dtype))
    if kind == "single_label_classification":
        return cross_entropy(logits, tf.cast(tf.reshape(labels, (-1,)), tf.int64))
    labels = tf.cast(tf.reshape(labels, tf.shape(logits)), logits.dtype)
    if kind == "regression":
        return tf.reduce_mean(tf.square(logits - labels))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))


def span(
    start_logits: tf.Tensor, end_logits: tf.Tensor, start_positions: tf.Tensor, end_positions: tf.Tensor
) -> tf.Tensor:
    """The mean of the cross entropies (B, T) of start and end; a position (B,) outside of the tokens is left out."""
    length = tf.shape(start_logits, tf.int64)[-1]
    losses = []
    for logits, at in ((start_logits, start_positions), (end_logits, end_positions)):
        at = tf.reshape(at, (-1,))
        losses.append(cross_entropy(logits, tf.where((at >= 0) & (at < length), at, IGNORE_INDEX)))
    return (losses[0] + losses[1]) / 2
