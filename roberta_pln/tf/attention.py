"""Attention: project, score, combine; and the masks that say which keys a query sees."""

import math
from collections.abc import Callable
from functools import partial

import tensorflow as tf

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.numerics import SCORES_AT_A_TIME
from roberta_pln.tf import cache
from roberta_pln.tf.cache import Slots
from roberta_pln.tf.layers import (
    Dense,
    Dropout,
    Embedding,
    LayerNorm,
    Module,
    Shared,
    at_least_float32,
    dense_after,
    is_place,
    later,
    next_seed,
    recomputed,
    rows_at,
    shape_of,
)

KeyValue = tuple[tf.Tensor | Slots, tf.Tensor | Slots]
"""Keys and values, each (B, H, S, K)."""


class MultiHeadAttention(Module):
    """softmax(q k^T / sqrt(K) + bias) v, with relative position terms if the config asks for them.

    Args:
        config: the model's config.
        kept_heads: the heads that are there, in the original numbering (pruning leaves gaps).
        relative: whether queries and keys also meet a distance embedding.
        shared: see `Shared`.
    """

    def __init__(
        self, config: RobertaPreLayerNormConfig, kept_heads: list[int], relative: bool, shared: Shared
    ) -> None:
        super().__init__(shared)
        self.keep(kept_heads)
        self.head_size = config.head_size
        size = self.num_heads * self.head_size
        self.query = Dense(config.hidden_size, size, shared)
        self.key = Dense(config.hidden_size, size, shared)
        self.value = Dense(config.hidden_size, size, shared)
        self.dropout = Dropout(config.attention_probs_dropout_prob, shared)
        self.relative_query = relative
        self.relative_key = relative and config.position_embedding_type == "relative_key_query"
        if relative:
            self.distance_embedding = Embedding(2 * config.max_position_embeddings - 1, config.head_size, shared)

    def keep(self, kept_heads: list[int]) -> None:
        """Count on these heads from now on."""
        self.kept_heads, self.num_heads = kept_heads, len(kept_heads)

    def split(self, states: tf.Tensor) -> tf.Tensor:
        """(B, T, H * K) -> (B, H, T, K)."""
        batch, length, _ = shape_of(states)
        return tf.transpose(tf.reshape(states, (batch, length, self.num_heads, self.head_size)), (0, 2, 1, 3))

    def call(
        self,
        query: tf.Tensor,
        key_value: KeyValue,
        bias: tf.Tensor | None,
        head_mask: tf.Tensor | None,
        output_attentions: bool,
        training: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        key, value = map(cache.entries, key_value)
        first = cache.length(key_value[0]) - shape_of(query)[2]
        if bias is not None and bias.shape[1] not in (None, 1, self.num_heads):  # a pattern for each head, some pruned
            bias = tf.gather(bias, self.kept_heads, axis=1)
        # TensorFlow has no fused kernel as PyTorch has; XLA fuses what it compiles.
        mix = partial(self.mix, first=first, training=training)
        if self.takes_turns(query, head_mask, output_attentions, training):
            dropout = self.dropout if self.dropout.rate > 0 else None
            context, attentions = in_turns(query, key, value, bias, dropout), None
        elif training and self.is_recomputed(key, output_attentions):
            generator = self.dropout.seed_generator
            context = recomputed(lambda *args: mix(*args)[0], generator, query, key, value, bias, head_mask)
            attentions = None
        else:
            context, attentions = mix(query, key, value, bias, head_mask)
        context = tf.transpose(context, (0, 2, 1, 3))  # (B, T, H, K)
        batch, length, heads, size = shape_of(context)
        return tf.reshape(context, (batch, length, heads * size)), attentions if output_attentions else None

    def takes_turns(
        self, query: tf.Tensor, head_mask: tf.Tensor | None, output_attentions: bool, training: bool
    ) -> bool:
        """Whether some texts after the others are attended to, and in the backward pass again, by `in_turns`."""
        special = output_attentions or head_mask is not None or self.relative_query
        special = special or (self.dropout.rate > 0 and not self.dropout.is_coarse())
        computed_here = query.dtype == softmax_dtype(query.dtype) and not tf.config.list_logical_devices("GPU")
        return training and computed_here and not special

    def is_recomputed(self, key: tf.Tensor, output_attentions: bool) -> bool:
        """Whether the backward pass computes the probabilities anew instead of keeping them, if their number is known.

        For each token training keeps 2 H S numbers of attention and 16 H K of the rest of a layer. From S = 8 K on the
        first would be half of all, for less than a tenth of the work. The second derivative needs them kept.
        """
        return key.shape[2] is not None and key.shape[2] >= 8 * self.head_size and not output_attentions

    def mix(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        value: tf.Tensor,
        bias: tf.Tensor | None,
        head_mask: tf.Tensor | None,
        first: int | tf.Tensor,
        training: bool,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """What the heads read, (B, H, T, K), and its weights, (B, H, T, S)."""
        scores = self.score(query, key, first)
        attentions = tf.cast(self.combine(scores, bias, head_mask, training), value.dtype)
        return attentions @ value, attentions

    def score(self, query: tf.Tensor, key: tf.Tensor, first: int | tf.Tensor) -> tf.Tensor:
        """Scores before the bias, (B, H, T, K) and (B, H, S, K) -> (B, H, T, S); `first` is the first query's place."""
        scores = tf.matmul(query, key, transpose_b=True)
        if self.relative_query:
            distances = self.distances(first, shape_of(query)[2], shape_of(key)[2])  # (T, S, K)
            scores = scores + tf.einsum("bhtk,tsk->bhts", query, distances)
            if self.relative_key:
                scores = scores + tf.einsum("bhsk,tsk->bhts", key, distances)
        return scores / math.sqrt(self.head_size)

    def distances(self, first: int | tf.Tensor, queries: int | tf.Tensor, keys: int | tf.Tensor) -> tf.Tensor:
        """Embedding of (query position - key position); the queries' positions begin at `first`. (T, S, K)."""
        query_positions = first + tf.range(queries)
        key_positions = tf.range(keys)
        zero = self.distance_embedding.num_embeddings // 2
        ids = query_positions[:, None] - key_positions[None, :] + zero
        if not isinstance(keys, int):  # a graph of open length cannot refuse what is too long, so all of it is NaN
            ids = tf.where(keys <= zero + 1, ids, -1)
        return self.distance_embedding(ids)

    def combine(
        self, scores: tf.Tensor, bias: tf.Tensor | None, head_mask: tf.Tensor | None, training: bool
    ) -> tf.Tensor:
        """Probabilities over the keys, in at least float32, after dropout and head mask. (B, H, T, S)."""
        scores = tf.cast(scores, softmax_dtype(scores.dtype))
        probabilities = self.dropout(tf.nn.softmax(scores if bias is None else scores + bias), training=training)
        if head_mask is None:
            return probabilities
        kept = tf.gather(head_mask, tf.constant(self.kept_heads, tf.int32))
        return probabilities * tf.cast(kept, probabilities.dtype)[:, None, None]


def in_turns(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor | None, dropout: Dropout | None
) -> tf.Tensor:
    """dropout(softmax(q k^T / sqrt(K) + bias)) v, a few texts at a time; the backward pass computes all of it anew.

    So nothing is kept that grows with the square of the length, and the scores of those few stay in the cache of the
    processor. Both passes draw from one seed.
    """
    seed = None if dropout is None else tf.cast(next_seed(dropout.seed_generator), tf.int32)
    scale = 1.0 if dropout is None else 1 / (1 - dropout.rate)
    root = math.sqrt(query.shape[-1])

    def probabilities(place: tf.Tensor, q: tf.Tensor, k: tf.Tensor, bias: tf.Tensor | None) -> tuple[tf.Tensor, ...]:
        """Those of a few texts, and what dropout leaves of them, before its scale."""
        scores = tf.matmul(q, k, transpose_b=True) / root
        found = tf.nn.softmax(scores if bias is None else scores + bias)
        if dropout is None:
            return found, found, None
        kept = dropout.draw(shape_of(found), seed + tf.stack([place, 0]))
        return found, tf.where(kept, found, 0), kept

    def attend(
        place: tf.Tensor, bias: tf.Tensor | None, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        _, used, _ = probabilities(place, q, k, bias)
        return (tf.matmul(used, v) * scale,)

    def slopes(
        place: tf.Tensor, bias: tf.Tensor | None, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, upstream: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        upstream *= scale
        found, used, kept = probabilities(place, q, k, bias)
        of_used = tf.matmul(upstream, v, transpose_b=True)
        of_found = of_used if kept is None else tf.where(kept, of_used, 0)
        of_scores = found * (of_found - tf.reduce_sum(of_found * found, axis=-1, keepdims=True)) / root
        return (
            tf.matmul(of_scores, k),
            tf.matmul(of_scores, q, transpose_a=True),
            tf.matmul(used, upstream, transpose_a=True),
        )

    @tf.custom_gradient
    def run(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        (context,) = turns(attend, 1, bias, q, k, v)
        return context, lambda upstream: turns(slopes, 3, bias, *(later(x, upstream) for x in (q, k, v)), upstream)

    return run(query, key, value)


def turns(
    function: Callable[..., tuple[tf.Tensor, ...]], results: int, bias: tf.Tensor | None, *tensors: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """function(place, bias, *tensors) of a few texts after the others, as of all at once.

    Args:
        function: what to compute of those at a place, which counts the turns.
        results: how many tensors that is.
        bias: (B, ...) or (1, ...), or None.
        tensors: (B, H, T, K) and (B, H, S, K), queries and keys first.
    """
    batch, heads, queries, _ = shape_of(tensors[0])
    scores = heads * queries * shape_of(tensors[1])[2]
    if isinstance(batch, int) and isinstance(scores, int):
        few = max(1, min(batch, SCORES_AT_A_TIME // max(1, scores)))
        if batch <= few:
            return function(0, bias, *tensors)
        few = next(size for size in range(few, 0, -1) if batch % size == 0)
    else:
        few = tf.where(batch * scores <= SCORES_AT_A_TIME, tf.maximum(batch, 1), 1)
    shared = bias is None or bias.shape[0] == 1
    given = tensors if shared else (bias, *tensors)
    given = [tf.reshape(x, (batch // few, few, *shape_of(x)[1:])) for x in given]

    def turn(items: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        place, *parts = items
        return function(place, bias if shared else parts.pop(0), *parts)

    items = (tf.range(batch // few), *given)
    found = tf.map_fn(turn, items, parallel_iterations=1, fn_output_signature=(tensors[0].dtype,) * results)
    return tuple(tf.reshape(x, (batch, *shape_of(x)[2:])) for x in found)


class AttentionOutput(Module):
    """The dense layer behind the heads."""

    def __init__(self, config: RobertaPreLayerNormConfig, num_heads: int, shared: Shared) -> None:
        super().__init__(shared)
        self.dense = Dense(num_heads * config.head_size, config.hidden_size, shared)
        self.dropout = Dropout(config.hidden_dropout_prob, shared)

    def call(self, context: tf.Tensor) -> tf.Tensor:
        return self.dropout(self.dense(context))


class Attention(Module):
    """The attention branch of a layer: x + dense(attention(LN(x))).

    Self-attention normalises queries, keys and values alike; cross-attention takes the encoder's states as they are.
    """

    def __init__(self, config: RobertaPreLayerNormConfig, layer: int, cross: bool, shared: Shared) -> None:
        super().__init__(shared)
        kept_heads = list(range(config.num_attention_heads)) if cross else config.kept_heads(layer)
        relative = config.position_embedding_type != "absolute" and not cross
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, shared)
        self.self = MultiHeadAttention(config, kept_heads, relative, shared)
        self.attention_output = AttentionOutput(config, len(kept_heads), shared)

    @property
    def output(self) -> AttentionOutput:
        """The dense layer behind the heads. Keras has an attribute of this name, which its savers pass over."""
        return self.attention_output

    def call(
        self,
        hidden_states: tf.Tensor,
        bias: tf.Tensor | None,
        head_mask: tf.Tensor | None,
        encoder_hidden_states: tf.Tensor | None,
        past: KeyValue | None,
        output_attentions: bool,
        places: tf.Tensor | None = None,
        training: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor | None, KeyValue]:
        asking = hidden_states if places is None else rows_at(hidden_states, places)
        query, key_value = self.project(asking, hidden_states, encoder_hidden_states, past, training)
        context, attentions = self.self(query, key_value, bias, head_mask, output_attentions=output_attentions)
        return asking + self.output(context), attentions, key_value

    def project(
        self,
        asking: tf.Tensor,
        hidden_states: tf.Tensor,
        encoder_hidden_states: tf.Tensor | None,
        past: KeyValue | None,
        training: bool,
    ) -> tuple[tf.Tensor, KeyValue]:
        """Queries of the tokens that ask, (B, H, T, K); keys and values of all, those of the cache included."""
        heads, norm = self.self, self.LayerNorm
        if encoder_hidden_states is None and asking is hidden_states:
            projected = dense_after(norm, hidden_states, heads.query, heads.key, heads.value, training=training)
            query, key, value = map(heads.split, projected)
            return query, extend(past, (key, value))
        (query,) = map(heads.split, dense_after(norm, asking, heads.query, training=training))
        if encoder_hidden_states is None:
            projected = dense_after(norm, hidden_states, heads.key, heads.value, training=training)
            key, value = map(heads.split, projected)
            return query, extend(past, (key, value))
        if past is None:
            past = heads.split(heads.key(encoder_hidden_states)), heads.split(heads.value(encoder_hidden_states))
        return query, past


def extend(past: KeyValue | None, new: KeyValue) -> KeyValue:
    """The cache with new keys and values behind it."""
    if past is None:
        return new
    return cache.append(past[0], new[0]), cache.append(past[1], new[1])


def bias_at(bias: tf.Tensor | None, places: tf.Tensor) -> tf.Tensor | None:
    """What is added to the scores of the queries at places, (B, M) or (1, M); see `attention_bias`."""
    if bias is None or bias.shape[2] == 1:  # the same for all queries
        return bias
    batch = tf.maximum(tf.shape(bias)[0], tf.shape(places)[0])
    bias = tf.broadcast_to(bias, (batch, *shape_of(bias)[1:]))
    places = tf.broadcast_to(places, (batch, shape_of(places)[1]))
    return tf.gather(bias, tf.where(is_place(places, bias, 2), places, 0), axis=2, batch_dims=1)


def softmax_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype that scores are added up in: at least float32."""
    return at_least_float32(dtype)


def attention_bias(
    mask: tf.Tensor | None,
    queries: int | tf.Tensor,
    keys: int | tf.Tensor,
    causal: bool,
    dtype: tf.DType,
    segments: tf.Tensor | None = None,
) -> tf.Tensor | None:
    """What is added to the scores: 0 where a query sees a key, finfo.min where it does not.

    Args:
        mask: (B, S) keys to keep, or the complete pattern as (B, T, S) or (B, H, T, S); an entry of 1 or more keeps.
        queries, keys: T and S; the queries are the last of the keys.
        causal: whether a (B, S) mask, or none, also hides the keys behind each query.
        dtype: the dtype of the scores.
        segments: (B, T) in place of a mask; a query sees the keys of its own segment.

    Returns:
        A tensor of four axes that broadcasts to (B, H, T, S), or None when every query sees every key.
    """
    keep = None
    if mask is not None:
        keep = tf.cast(mask, tf.int64) > 0
        keep = keep[:, None, None] if len(mask.shape) == 2 else keep[:, None] if len(mask.shape) == 3 else keep
    if segments is not None:
        keep = (segments[:, :, None] == segments[:, None, :])[:, None]  # (B, 1, T, T)
    if causal and (mask is None or len(mask.shape) == 2):
        seen = (tf.range(keys)[None, :] <= tf.range(keys - queries, keys)[:, None])[None, None]  # (1, 1, T, S)
        keep = seen if keep is None else keep & seen
    return None if keep is None else tf.where(keep, tf.zeros((), dtype), dtype.min)
