"""The losses, one function each; every one is a scalar mean in at least float32."""

import math
from collections.abc import Callable

import tensorflow as tf

from roberta_pln import checks
from roberta_pln.numerics import IGNORE_INDEX, LOGITS_PER_CHUNK
from roberta_pln.tf.layers import at_least_float32, in_xla, shape_of


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
    check_labels(name, labels, logits.shape[-1])
    kept = labels != IGNORE_INDEX
    known = (labels >= 0) & (labels < tf.shape(logits, labels.dtype)[-1])  # tokens, whose number a graph leaves open
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(known, labels, 0), logits)
    losses = tf.where(kept, tf.where(known, losses, math.nan), 0)
    return tf.reduce_sum(losses) / tf.reduce_sum(tf.cast(kept, losses.dtype))


def check_labels(name: str, labels: tf.Tensor, classes: int) -> None:
    """Refuse labels that are neither in [0, classes) nor -100, if their values can be read."""
    kept = labels != IGNORE_INDEX
    if tf.executing_eagerly() and tf.reduce_any(kept):
        lowest, highest = (int(reduce(labels[kept])) for reduce in (tf.reduce_min, tf.reduce_max))
        checks.labels_in_range(name, lowest, highest, classes, IGNORE_INDEX)


def causal_cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """`cross_entropy` of each token's logits (B, T, V) with the next token's label (B, T)."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def next_labels(labels: tf.Tensor) -> tf.Tensor:
    """For each place the label of the next one, (B, T) -> (B, T); nothing is behind the last."""
    return tf.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def labels_within(labels: tf.Tensor, segment_ids: tf.Tensor) -> tf.Tensor:
    """Labels (B, T) less those of padding and of first tokens, which the segment before does not predict."""
    before = tf.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return tf.where((segment_ids == before) & (segment_ids > 0), labels, IGNORE_INDEX)


def labelled_places(labels: tf.Tensor) -> tf.Tensor | None:
    """Places of the labels (B, T) that are not -100, in each row before others: (B, M) for the row with most of them.

    None if XLA compiles, which has one size for all batches.
    """
    if in_xla():
        return None
    labelled = labels != IGNORE_INDEX
    most = tf.maximum(1, tf.reduce_max(tf.reduce_sum(tf.cast(labelled, tf.int32), axis=1)))
    return tf.argsort(tf.cast(~labelled, tf.int32), axis=1, stable=True)[:, :most]


def labels_at(labels: tf.Tensor, places: tf.Tensor | None) -> tf.Tensor:
    """Labels (B, T) at places, (B, M); all of them if no places are given."""
    return labels if places is None else tf.gather(labels, places, batch_dims=1)


def labelled_cross_entropy(
    hidden_states: tf.Tensor,
    labels: tf.Tensor,
    transform: Callable[[tf.Tensor], tf.Tensor],
    table: tf.Tensor,
    bias: tf.Tensor,
    training: bool,
) -> tf.Tensor:
    """`cross_entropy` of the logits transform(x) table^T + bias, of which no more than a chunk is ever held.

    Only what has a label is decoded. The gradients of the decoder are computed with the loss, a chunk at a time, and
    scaled in the backward pass: a second derivative needs the logits, and so does anything but reverse mode.

    Args:
        hidden_states: (B, T, D).
        labels: (B, T) integers in [0, V), or -100.
        transform: what comes before the decoder, (..., D) -> (..., D).
        table: (V, D).
        bias: (V,).
        training: whether the gradients are computed with the loss; if not, the backward pass computes both again.

    Raises:
        InputError: as `cross_entropy`.
    """
    check_labels("labels", labels, table.shape[0])
    # XLA has one size for all batches: every position is taken, those with labels first, and the loop ends behind them.
    states = transform(hidden_states)
    count, size = math.prod(shape_of(labels)), states.shape[-1]
    labels = tf.reshape(labels, (count,))
    order = tf.argsort(tf.cast(labels == IGNORE_INDEX, tf.int32), stable=True)
    states, labels = tf.gather(tf.reshape(states, (count, size)), order), tf.gather(labels, order)
    rows = max(1, LOGITS_PER_CHUNK // table.shape[0])
    least = max(1, count) if isinstance(count, int) else tf.maximum(count, 1)  # a chunk even of no tokens
    rows = min(rows, least) if isinstance(count, int) else tf.minimum(rows, least)
    missing = least - count + -least % rows
    states = tf.reshape(tf.pad(states, ((0, missing), (0, 0))), (-1, rows, size))
    labels = tf.reshape(tf.pad(labels, ((0, missing),), constant_values=IGNORE_INDEX), (-1, rows))
    return decoded(states, labels, tf.convert_to_tensor(table), tf.convert_to_tensor(bias), training)


def decoded(states: tf.Tensor, labels: tf.Tensor, table: tf.Tensor, bias: tf.Tensor, training: bool) -> tf.Tensor:
    """The mean of what `in_chunks` sums up, which gives the gradients on."""

    @tf.custom_gradient
    def mean(states: tf.Tensor, table: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        total, *found = in_chunks(states, labels, table, bias, training)
        count = tf.reduce_sum(tf.cast(labels != IGNORE_INDEX, total.dtype))

        @tf.custom_gradient
        def scaled(scale: tf.Tensor, *inputs: tf.Tensor) -> tuple[list[tf.Tensor], Callable]:
            gradients = found or in_chunks(states, labels, table, bias, gradients=True)[1:]
            return [tf.cast(scale * g, x.dtype) for g, x in zip(gradients, inputs, strict=True)], refuse

        return total / count, lambda upstream: scaled(upstream / tf.maximum(count, 1), states, table, bias)

    return mean(states, table, bias)


def refuse(*_: tf.Tensor) -> None:
    """The gradient of the gradients: how they depend on what they are the gradients of is not known any more."""
    raise checks.no_second_derivative()


def in_chunks(
    states: tf.Tensor, labels: tf.Tensor, table: tf.Tensor, bias: tf.Tensor, gradients: bool
) -> tuple[tf.Tensor, ...]:
    """The sum of -log softmax(states table^T + bias)[label], and its gradients.

    Args:
        states: (C, rows, D), in the type of the computation; those with labels first.
        labels: (C, rows).
        table: (V, D).
        bias: (V,).
        gradients: whether they are wanted.

    Returns:
        The sum, and the gradients of states, table and bias, all in at least float32; without gradients the sum alone.
    """
    dtype, wide, classes = states.dtype, at_least_float32(states.dtype), table.shape[0]
    decoder, offset = tf.cast(table, dtype), tf.cast(bias, dtype)

    def chunk(i: tf.Tensor, total: tf.Tensor, *found: tf.Tensor) -> tuple[tf.Tensor, ...]:
        part, targets = states[i], labels[i]
        scores = tf.nn.bias_add(tf.matmul(part, decoder, transpose_b=True), offset)
        scores = tf.nn.log_softmax(tf.cast(scores, wide))  # (rows, V)
        known = (targets >= 0) & (targets < classes)
        targets, ignored = tf.where(known, targets, 0), targets == IGNORE_INDEX
        losses = tf.where(
            known, -tf.gather(scores, targets, batch_dims=1), tf.where(ignored, tf.cast(0, wide), math.nan)
        )
        total += tf.reduce_sum(losses)
        if not gradients:
            return i + 1, total
        slopes = tf.where(known[:, None], tf.exp(scores) - tf.one_hot(targets, classes, dtype=wide), 0)
        of_states, of_table, of_bias = found
        of_bias += tf.reduce_sum(slopes, axis=0)
        slopes = tf.cast(slopes, dtype)
        of_states = tf.tensor_scatter_nd_update(of_states, [[i]], tf.cast(tf.matmul(slopes, decoder), wide)[None])
        of_table += tf.cast(tf.matmul(slopes, part, transpose_a=True), wide)
        return i + 1, total, of_states, of_table, of_bias

    chunks = tf.reduce_sum(tf.cast(labels[:, 0] != IGNORE_INDEX, tf.int32))  # the others have no labels
    zero = tf.zeros((), wide)
    # The first one before the loop, whose sums then begin with it: a table of zeros would be there beside its gradient.
    first = chunk(0, zero, *([tf.zeros(tf.shape(states), wide), zero, zero] if gradients else []))
    # One at a time, or the logits of several are there at once.
    _, *found = tf.while_loop(lambda i, *_: i < chunks, chunk, first, parallel_iterations=1)
    return tuple(found)


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
