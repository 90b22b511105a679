"""Attention: project, score, combine; and the masks that say which keys a query sees."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.numerics import SCORES_AT_A_TIME
from roberta_pln.pt.cache import Slots, append, entries
from roberta_pln.pt.layers import Dropout, Linear, bits, dense_after, is_transformed, next_seed, rows_at

KeyValue = tuple[Tensor | Slots, Tensor | Slots]
"""Keys and values, each (B, H, S, K)."""


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(K) + bias) v, with relative position terms if the config asks for them.

    Args:
        config: the model's config.
        kept_heads: the heads that are there, in the original numbering (pruning leaves gaps).
        relative: whether queries and keys also meet a distance embedding.
    """

    def __init__(self, config: RobertaPreLayerNormConfig, kept_heads: list[int], relative: bool) -> None:
        super().__init__()
        self.keep(kept_heads)
        self.head_size = config.head_size
        size = self.num_heads * self.head_size
        self.query = Linear(config.hidden_size, size)
        self.key = Linear(config.hidden_size, size)
        self.value = Linear(config.hidden_size, size)
        self.dropout = Dropout(config.attention_probs_dropout_prob)
        self.relative_query = relative
        self.relative_key = relative and config.position_embedding_type == "relative_key_query"
        if relative:
            self.distance_embedding = nn.Embedding(2 * config.max_position_embeddings - 1, config.head_size)

    def keep(self, kept_heads: list[int]) -> None:
        """Count on these heads from now on."""
        self.kept_heads, self.num_heads = kept_heads, len(kept_heads)

    def split(self, states: Tensor) -> Tensor:
        """(B, T, H * K) -> (B, H, T, K)."""
        return states.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        key_value: KeyValue,
        bias: Tensor | None,
        head_mask: Tensor | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        key, value = map(entries, key_value)
        if bias is not None and bias.shape[1] not in (1, self.num_heads):  # a pattern for each head, some pruned
            bias = bias[:, self.kept_heads]
        if self.is_plain(query, head_mask, output_attentions):
            if bias is not None:  # clamped, since float32's minimum is infinite in bfloat16
                bias = bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
            context, attentions = F.scaled_dot_product_attention(query, key, value, attn_mask=bias), None
        elif self.takes_turns(query, head_mask, output_attentions):
            rate = self.dropout.p if self.training else 0.0
            context, attentions = InTurns.apply(query, key, value, bias, self.dropout if rate else None), None
        elif self.is_recomputed(key, output_attentions):
            context, attentions = checkpoint(self.mix, query, key, value, bias, head_mask, use_reentrant=False)
        else:
            context, attentions = self.mix(query, key, value, bias, head_mask)
        return context.transpose(1, 2).flatten(2), attentions if output_attentions else None

    def is_plain(self, query: Tensor, head_mask: Tensor | None, output_attentions: bool) -> bool:
        """Whether the fused kernel computes this call.

        It does not return probabilities, its gradient is wrong in rows that see no key (it takes each probability to
        be 1 there), and in float16 its masked score is too small to give such a row equal probabilities.
        """
        dropout = self.training and self.dropout.p > 0
        special = output_attentions or head_mask is not None or self.relative_query or dropout
        return not special and not torch.is_grad_enabled() and query.dtype != torch.float16

    def takes_turns(self, query: Tensor, head_mask: Tensor | None, output_attentions: bool) -> bool:
        """Whether some texts after the others are attended to, and in the backward pass again, by `InTurns`."""
        drops = self.training and self.dropout.p > 0
        special = output_attentions or head_mask is not None or self.relative_query
        special = special or (drops and not self.dropout.is_coarse())
        computed_here = query.device.type == "cpu" and query.dtype == softmax_dtype(query.dtype)
        return torch.is_grad_enabled() and computed_here and not special and not is_transformed()

    def is_recomputed(self, key: Tensor, output_attentions: bool) -> bool:
        """Whether the backward pass computes the probabilities anew instead of keeping them.

        For each token training keeps 2 H S numbers of attention and 16 H K of the rest of a layer. From S = 8 K on the
        first would be half of all, for less than a tenth of the work. Compilers decide by themselves, and transforms of
        functions cannot.
        """
        long = key.shape[2] >= 8 * self.head_size
        return long and torch.is_grad_enabled() and not is_transformed() and not output_attentions

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the heads read, (B, H, T, K), and its weights, (B, H, T, S)."""
        attentions = self.combine(self.score(query, key), bias, head_mask).to(value.dtype)
        return attentions @ value, attentions

    def score(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores before the bias, (B, H, T, K) and (B, H, S, K) -> (B, H, T, S)."""
        scores = query @ key.transpose(-1, -2)
        if self.relative_query:
            distances = self.distances(query.shape[2], key.shape[2])  # (T, S, K)
            scores = scores + torch.einsum("bhtk,tsk->bhts", query, distances)
            if self.relative_key:
                scores = scores + torch.einsum("bhsk,tsk->bhts", key, distances)
        return scores.div_(math.sqrt(self.head_size))  # in place, since fresh memory takes longer than the division

    def distances(self, queries: int, keys: int) -> Tensor:
        """Embedding of (query position - key position); the queries are the last of the keys. (T, S, K)."""
        device = self.distance_embedding.weight.device
        query_positions = torch.arange(keys - queries, keys, device=device)
        key_positions = torch.arange(keys, device=device)
        zero = self.distance_embedding.num_embeddings // 2
        return self.distance_embedding(query_positions[:, None] - key_positions[None, :] + zero)

    def combine(self, scores: Tensor, bias: Tensor | None, head_mask: Tensor | None) -> Tensor:
        """Probabilities over the keys, in at least float32, after dropout and head mask. (B, H, T, S)."""
        scores = scores.to(softmax_dtype(scores.dtype))
        probabilities = self.dropout(torch.softmax(scores if bias is None else scores + bias, dim=-1))
        if head_mask is None:
            return probabilities
        return probabilities * head_mask[self.kept_heads][:, None, None].to(probabilities.dtype)


class InTurns(torch.autograd.Function):
    """dropout(softmax(q k^T / sqrt(K) + bias)) v, a few texts at a time; the backward pass computes all of it anew.

    So nothing is kept that grows with the square of the length, and the scores of those few stay in the cache of the
    processor. Both passes draw from one seed, which comes from PyTorch's own generator.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: Dropout | None
    ) -> Tensor:
        ctx.dropout, ctx.seed = dropout, None if dropout is None else next_seed()
        ctx.save_for_backward(query, key, value, bias)
        turns = each_turn(ctx, query, key, value, bias)
        return together([(turn.used @ turn.value).mul_(turn.scale) for turn in turns])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradients are differentiated in their turn
            return *differentiable(ctx, upstream), None, None
        root, parts = math.sqrt(upstream.shape[-1]), []
        for turn in each_turn(ctx, *ctx.saved_tensors):
            above = upstream[turn.texts].contiguous() * turn.scale
            of_value = turn.used.transpose(-1, -2) @ above
            slopes = above @ turn.value.transpose(-1, -2)
            if turn.kept is not None:
                slopes.mul_(turn.kept)
            slopes.mul_(turn.probabilities)
            slopes.addcmul_(turn.probabilities, slopes.sum(-1, keepdim=True), value=-1).div_(root)
            parts.append((slopes @ turn.key, slopes.transpose(-1, -2) @ turn.query, of_value))
        return *map(together, zip(*parts, strict=True)), None, None


class Turn(NamedTuple):
    """A few texts, and what their attention is computed from, each (few, H, T or S, K or S).

    Attributes:
        texts: which they are.
        query, key, value: their part of them, row by row in memory.
        probabilities: of the keys.
        used: what dropout leaves of those, before its scale.
        kept: 1 where it leaves them, else 0; None without dropout.
        scale: that of dropout.
    """

    texts: slice
    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: Tensor
    used: Tensor
    kept: Tensor | None
    scale: float


def each_turn(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Iterator[Turn]:
    """A few texts after the others."""
    batch, heads, queries, size = query.shape
    few = max(1, SCORES_AT_A_TIME // max(1, heads * queries * key.shape[2]))
    generator = None if ctx.dropout is None else bits(ctx.seed)
    for start in range(0, max(1, batch), few):  # also a turn of no texts, if there are none
        texts = slice(start, start + few)
        q, k, v = (x[texts].contiguous() for x in (query, key, value))
        scores = (q @ k.transpose(-1, -2)).div_(math.sqrt(size))
        if bias is not None:
            scores += bias if len(bias) == 1 else bias[texts]
        probabilities = torch.softmax(scores, dim=-1)
        used, kept, scale = probabilities, None, 1.0
        if ctx.dropout is not None:
            kept, scale = ctx.dropout.draw(scores.shape, generator), 1 / (1 - ctx.dropout.p)
            used = probabilities * kept
        yield Turn(texts, q, k, v, probabilities, used, kept, scale)


def together(parts: Sequence[Tensor]) -> Tensor:
    """What each turn has found, (few, H, T, K), as (B, H, T, K), in memory as dense layers have it, (B, T, H * K)."""
    return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


def differentiable(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients of `InTurns` as functions of its inputs."""
    *inputs, bias = ctx.saved_tensors
    contexts = [(turn.used @ turn.value) * turn.scale for turn in each_turn(ctx, *inputs, bias)]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(torch.cat(contexts), wanted, upstream, create_graph=True))
    return [next(found) if x.requires_grad else None for x in inputs]


class AttentionOutput(nn.Module):
    """The dense layer behind the heads."""

    def __init__(self, config: RobertaPreLayerNormConfig, num_heads: int) -> None:
        super().__init__()
        self.dense = Linear(num_heads * config.head_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor) -> Tensor:
        return self.dropout(self.dense(context))


class Attention(nn.Module):
    """The attention branch of a layer: x + dense(attention(LN(x))).

    Self-attention normalises queries, keys and values alike; cross-attention takes the encoder's states as they are.
    """

    def __init__(self, config: RobertaPreLayerNormConfig, layer: int, cross: bool) -> None:
        super().__init__()
        kept_heads = list(range(config.num_attention_heads)) if cross else config.kept_heads(layer)
        relative = config.position_embedding_type != "absolute" and not cross
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self = MultiHeadAttention(config, kept_heads, relative)
        self.output = AttentionOutput(config, len(kept_heads))

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        head_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        past: KeyValue | None,
        output_attentions: bool,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, KeyValue]:
        asking = hidden_states if places is None else rows_at(hidden_states, places)
        query, key_value = self.project(asking, hidden_states, encoder_hidden_states, past)
        context, attentions = self.self(query, key_value, bias, head_mask, output_attentions)
        return asking + self.output(context), attentions, key_value

    def project(
        self, asking: Tensor, hidden_states: Tensor, encoder_hidden_states: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Queries of the tokens that ask, (B, H, T, K); keys and values of all, those of the cache included."""
        heads, norm = self.self, self.LayerNorm
        if encoder_hidden_states is None and asking is hidden_states:
            projected = dense_after(norm, hidden_states, heads.query, heads.key, heads.value)
            query, key, value = map(heads.split, projected)
            return query, extend(past, (key, value))
        (query,) = map(heads.split, dense_after(norm, asking, heads.query))
        if encoder_hidden_states is None:
            key, value = map(heads.split, dense_after(norm, hidden_states, heads.key, heads.value))
            return query, extend(past, (key, value))
        if past is None:
            past = heads.split(heads.key(encoder_hidden_states)), heads.split(heads.value(encoder_hidden_states))
        return query, past


def extend(past: KeyValue | None, new: KeyValue) -> KeyValue:
    """The cache with new keys and values behind it."""
    return new if past is None else (append(past[0], new[0]), append(past[1], new[1]))


def bias_at(bias: Tensor | None, places: Tensor) -> Tensor | None:
    """What is added to the scores of the queries at places, (B, M) or (1, M); see `attention_bias`."""
    if bias is None or bias.shape[2] == 1:  # the same for all queries
        return bias
    batch, heads, _, keys = bias.shape
    batch = max(batch, len(places))
    return bias.expand(batch, -1, -1, -1).gather(2, places[:, None, :, None].expand(batch, heads, -1, keys))


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are added up in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def attention_bias(
    mask: Tensor | None,
    queries: int,
    keys: int,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
    segments: Tensor | None = None,
) -> Tensor | None:
    """What is added to the scores: 0 where a query sees a key, finfo.min where it does not.

    Args:
        mask: (B, S) keys to keep, or the complete pattern as (B, T, S) or (B, H, T, S); an entry of 1 or more keeps.
        queries, keys: T and S; the queries are the last of the keys.
        causal: whether a (B, S) mask, or none, also hides the keys behind each query.
        dtype: the dtype of the scores.
        device: where to build a causal pattern.
        segments: (B, T) in place of a mask; a query sees the keys of its own segment.

    Returns:
        A tensor of four axes that broadcasts to (B, H, T, S), or None when every query sees every key.
    """
    keep = None
    if mask is not None:
        keep = mask.long() > 0
        keep = keep[:, None, None] if mask.ndim == 2 else keep[:, None] if mask.ndim == 3 else keep
    if segments is not None:
        keep = (segments[:, :, None] == segments[:, None, :])[:, None]  # (B, 1, T, T)
    if causal and (mask is None or mask.ndim == 2):
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        keep = seen if keep is None else keep & seen
    if keep is None:
        return None
    hidden = torch.finfo(dtype).min
    return torch.zeros(keep.shape, dtype=dtype, device=device).masked_fill(~keep, hidden)
