"""Attention: project, score, combine; and the masks that say which keys a query sees."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from roberta_pln.flax import cache
from roberta_pln.flax.cache import Slots
from roberta_pln.flax.layers import Block, Dropout, at_least_float32, dense_after, recomputed, rows_at

KeyValue = tuple[Array, Array] | tuple[Slots, Slots]
"""Keys and values, each (B, H, S, K), or slots for them."""


class MultiHeadAttention(Block):
    """softmax(q k^T / sqrt(K) + bias) v, with relative position terms if the config asks for them.

    Args:
        config, dtype, param_dtype: see `Block`.
        kept_heads: the heads that are there, in the original numbering (pruning leaves gaps).
        relative: whether queries and keys also meet a distance embedding.
    """

    kept_heads: list[int]
    relative: bool

    def setup(self) -> None:
        config = self.config
        self.num_heads, self.head_size = len(self.kept_heads), config.head_size
        size = self.num_heads * self.head_size
        self.query = self.linear(size)
        self.key = self.linear(size)
        self.value = self.linear(size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.relative_query = self.relative
        self.relative_key = self.relative and config.position_embedding_type == "relative_key_query"
        if self.relative:
            self.distance_embedding = self.table(2 * config.max_position_embeddings - 1, config.head_size)

    def split(self, states: Array) -> Array:
        """(B, T, H * K) -> (B, H, T, K)."""
        return states.reshape(*states.shape[:2], self.num_heads, self.head_size).swapaxes(1, 2)

    def __call__(
        self,
        query: Array,
        key_value: KeyValue,
        bias: Array | None,
        head_mask: Array | None,
        output_attentions: bool,
        deterministic: bool,
    ) -> tuple[Array, Array | None]:
        key, value = map(cache.entries, key_value)
        first = cache.length(key_value[0]) - query.shape[2]
        if bias is not None and bias.shape[1] not in (1, self.num_heads):  # a pattern for each head, some pruned
            bias = bias[:, jnp.asarray(self.kept_heads)]
        # No fused kernel beside this, as in PyTorch: XLA fuses what is compiled.
        mix, key_of_dropout = partial(self.mix, first=first), self.dropout.key(deterministic)
        if not deterministic and self.is_recomputed(output_attentions):
            context = recomputed(lambda *args: mix(*args)[0], query, key, value, bias, head_mask, key_of_dropout)
            attentions = None
        else:
            context, attentions = mix(query, key, value, bias, head_mask, key_of_dropout)
        context = context.swapaxes(1, 2)  # (B, T, H, K)
        size = self.num_heads * self.head_size
        return context.reshape(*context.shape[:2], size), attentions if output_attentions else None

    def is_recomputed(self, output_attentions: bool) -> bool:
        """Whether the backward pass computes the probabilities anew instead of keeping them.

        Fused with all around them they take no longer than from memory. With relative positions they have parameters.
        """
        return not output_attentions and not self.relative_query

    def mix(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        head_mask: Array | None,
        key_of_dropout: Array | None,
        first: int | Array,
    ) -> tuple[Array, Array]:
        """What the heads read, (B, H, T, K), and its weights, (B, H, T, S)."""
        scores = self.score(query, key, first)
        attentions = self.combine(scores, bias, head_mask, key_of_dropout).astype(value.dtype)
        return attentions @ value, attentions

    def score(self, query: Array, key: Array, first: int | Array) -> Array:
        """Scores before the bias, (B, H, T, K) and (B, H, S, K) -> (B, H, T, S); `first` is the first query's place."""
        scores = query @ key.swapaxes(-1, -2)
        if self.relative_query:
            distances = self.distances(first, query.shape[2], key.shape[2])  # (T, S, K)
            scores = scores + jnp.einsum("bhtk,tsk->bhts", query, distances)
            if self.relative_key:
                scores = scores + jnp.einsum("bhsk,tsk->bhts", key, distances)
        return scores / math.sqrt(self.head_size)

    def distances(self, first: int | Array, queries: int, keys: int) -> Array:
        """Embedding of (query position - key position); the queries' positions begin at `first`. (T, S, K)."""
        query_positions = first + jnp.arange(queries, dtype=jnp.int32)
        key_positions = jnp.arange(keys, dtype=jnp.int32)
        zero = self.distance_embedding.num_embeddings // 2
        return self.distance_embedding(query_positions[:, None] - key_positions[None, :] + zero)

    def combine(
        self, scores: Array, bias: Array | None, head_mask: Array | None, key_of_dropout: Array | None
    ) -> Array:
        """Probabilities over the keys, in at least float32, after dropout and head mask. (B, H, T, S)."""
        scores = scores.astype(softmax_dtype(scores.dtype))
        probabilities = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
        probabilities = self.dropout.drop(probabilities, key_of_dropout)
        if head_mask is None:
            return probabilities
        kept = jnp.asarray(self.kept_heads, jnp.int32)
        return probabilities * head_mask[kept][:, None, None].astype(probabilities.dtype)


class AttentionOutput(Block):
    """The dense layer behind the heads."""

    def setup(self) -> None:
        self.dense = self.linear(self.config.hidden_size)
        self.dropout = Dropout(self.config.hidden_dropout_prob)

    def __call__(self, context: Array, deterministic: bool) -> Array:
        return self.dropout(self.dense(context), deterministic)


class Attention(Block):
    """The attention branch of a layer: x + dense(attention(LN(x))).

    Self-attention normalises queries, keys and values alike; cross-attention takes the encoder's states as they are.
    """

    layer: int
    cross: bool

    def setup(self) -> None:
        config = self.config
        kept_heads = list(range(config.num_attention_heads)) if self.cross else config.kept_heads(self.layer)
        relative = config.position_embedding_type != "absolute" and not self.cross
        self.LayerNorm = self.norm()
        self.self = MultiHeadAttention(config, self.dtype, self.param_dtype, kept_heads, relative)
        self.output = AttentionOutput(config, self.dtype, self.param_dtype)

    def __call__(
        self,
        hidden_states: Array,
        bias: Array | None,
        head_mask: Array | None,
        encoder_hidden_states: Array | None,
        past: KeyValue | None,
        output_attentions: bool,
        deterministic: bool,
        places: Array | None = None,
    ) -> tuple[Array, Array | None, KeyValue]:
        asking = hidden_states if places is None else rows_at(hidden_states, places)
        query, key_value = self.project(asking, hidden_states, encoder_hidden_states, past, deterministic)
        context, attentions = self.self(query, key_value, bias, head_mask, output_attentions, deterministic)
        return asking + self.output(context, deterministic), attentions, key_value

    def project(
        self,
        asking: Array,
        hidden_states: Array,
        encoder_hidden_states: Array | None,
        past: KeyValue | None,
        deterministic: bool,
    ) -> tuple[Array, KeyValue]:
        """Queries of the tokens that ask, (B, H, T, K); keys and values of all, those of the cache included."""
        heads, after = self.self, partial(dense_after, self.LayerNorm, deterministic=deterministic)
        if encoder_hidden_states is None and asking is hidden_states:
            query, key, value = map(heads.split, after(hidden_states, heads.query, heads.key, heads.value))
            return query, extend(past, (key, value))
        (query,) = map(heads.split, after(asking, heads.query))
        if encoder_hidden_states is None:
            key, value = map(heads.split, after(hidden_states, heads.key, heads.value))
            return query, extend(past, (key, value))
        if past is None:
            past = heads.split(heads.key(encoder_hidden_states)), heads.split(heads.value(encoder_hidden_states))
        return query, past


def extend(past: KeyValue | None, new: KeyValue) -> KeyValue:
    """The cache with new keys and values behind it."""
    if past is None:
        return new
    return cache.append(past[0], new[0]), cache.append(past[1], new[1])


def bias_at(bias: Array | None, places: Array) -> Array | None:
    """What is added to the scores of the queries at places, (B, M) or (1, M); see `attention_bias`."""
    if bias is None or bias.shape[2] == 1:  # the same for all queries
        return bias
    return jnp.take_along_axis(bias, places[:, None, :, None], axis=2)


def softmax_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that scores are added up in: at least float32."""
    return at_least_float32(dtype)


def attention_bias(
    mask: Array | None,
    queries: int,
    keys: int,
    causal: bool,
    dtype: DTypeLike,
    tokens: int | Array | None = None,
    segments: Array | None = None,
) -> Array | None:
    """What is added to the scores: 0 where a query sees a key, finfo.min where it does not, -inf where none is yet.

    Args:
        mask: (B, S) keys to keep, or the complete pattern as (B, T, S) or (B, H, T, S); an entry of 1 or more keeps.
        queries, keys: T and S; the queries are the last of the keys that are there.
        causal: whether a (B, S) mask, or none, also hides the keys behind each query.
        dtype: the dtype of the scores.
        tokens: how many keys are there, all if not given; they are the first ones.
        segments: (B, T) in place of a mask; a query sees the keys of its own segment.

    Returns:
        An array of four axes that broadcasts to (B, H, T, S), or None when every query sees every key.
    """
    keep = None
    if mask is not None:
        keep = mask.astype(jnp.int32) > 0
        keep = keep[:, None, None] if mask.ndim == 2 else keep[:, None] if mask.ndim == 3 else keep
    if segments is not None:
        keep = (segments[:, :, None] == segments[:, None, :])[:, None]  # (B, 1, T, T)
    tokens = keys if tokens is None else tokens
    positions = jnp.arange(keys, dtype=jnp.int32)
    if causal and (mask is None or mask.ndim == 2):
        first = tokens - queries
        seen = positions <= first + jnp.arange(queries, dtype=jnp.int32)[:, None]  # (T, S)
        keep = seen[None, None] if keep is None else keep & seen
    if keep is None:
        return None
    bias = jnp.where(keep, jnp.zeros((), dtype), jnp.finfo(dtype).min)
    whole = isinstance(tokens, int) and tokens == keys
    return bias if whole else jnp.where(positions < tokens, bias, -jnp.inf)
