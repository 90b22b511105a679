"""The pre-norm layer and the stack of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.outputs import BaseModelOutput
from roberta_pln.pt.activations import activation, gelu, is_named
from roberta_pln.pt.attention import Attention, bias_at
from roberta_pln.pt.layers import Dropout, Linear, dense_after, hooks, is_alone, is_watched

LayerCache = tuple[Tensor, ...]
"""Self keys and values, and with cross-attention also cross keys and values; each (B, H, S, K)."""


class Cache(tuple[LayerCache, ...]):
    """What a decoder returns to be called on with: N items. A plain tuple of them serves as well.

    It has what users of transformers' caches call, but is never changed: each call returns another.
    """

    def get_seq_length(self) -> int:
        """Number of tokens that it holds."""
        return self[0][0].shape[2] if self else 0

    def to_legacy_cache(self) -> tuple[tuple[Tensor | None, ...], ...]:
        """N tuples of self keys and values, cross keys and values; None for those that are not there."""
        return tuple((*layer, None, None)[:4] for layer in self)


class Intermediate(nn.Module):
    """The first half of the feed-forward branch: act(dense(LN(x)))."""

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.expand(hidden_states)
        if self.intermediate_act_fn is gelu and not torch.is_grad_enabled() and is_alone(self.dense):
            return torch.ops.aten.gelu_(hidden_states)  # in place: fresh memory would take longer than the function
        return self.intermediate_act_fn(hidden_states)

    def expand(self, hidden_states: Tensor) -> Tensor:
        """dense(LN(x)), before the activation."""
        (hidden_states,) = dense_after(self.LayerNorm, hidden_states, self.dense)
        return hidden_states


class Output(nn.Module):
    """The second half of the feed-forward branch: dense(x), or dense(before(x))."""

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.dense = Linear(config.activated_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, before: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        if before is None:
            return self.dropout(self.dense(hidden_states))
        return self.dropout(*dense_after(before, hidden_states, self.dense))


class Layer(nn.Module):
    """Self-attention, cross-attention if the config has it, and feed-forward, each added to the residual stream."""

    def __init__(self, config: RobertaPreLayerNormConfig, layer: int) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.attention = Attention(config, layer, cross=False)
        if config.add_cross_attention:
            self.crossattention = Attention(config, layer, cross=True)
        self.intermediate = Intermediate(config)
        self.output = Output(config)

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        head_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_bias: Tensor | None,
        past: LayerCache | None,
        output_attentions: bool,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, LayerCache]:
        hidden_states, attentions, cache = self.attention(
            hidden_states,
            bias,
            head_mask,
            None,
            None if past is None else past[:2],
            output_attentions,
            places,
        )
        cross_attentions = None
        if encoder_hidden_states is not None:
            cross_past = None if past is None or len(past) < 4 or past[2] is None else past[2:]
            hidden_states, cross_attentions, cross_cache = self.crossattention(
                hidden_states, encoder_bias, head_mask, encoder_hidden_states, cross_past, output_attentions
            )
            cache = (*cache, *cross_cache)
        return self.feed_forward(hidden_states), attentions, cross_attentions, cache

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """x + output(intermediate(x)), on slices of `chunk_size_feed_forward` tokens if that is set."""
        if self.chunk_size == 0:
            return hidden_states + self.branch(hidden_states)
        checks.chunks(hidden_states.shape[1], self.chunk_size)
        slices = hidden_states.split(self.chunk_size, dim=1)
        return torch.cat([part + self.branch(part) for part in slices], dim=1)

    def branch(self, hidden_states: Tensor) -> Tensor:
        """output(intermediate(x)), in training without keeping what is between the two and cheap to compute anew."""
        activation = self.intermediate.intermediate_act_fn
        if not torch.is_grad_enabled() or not is_named(activation) or any(hooks(self.intermediate)):
            return self.output(self.intermediate(hidden_states))
        return self.output(self.intermediate.expand(hidden_states), activation)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing: dict[str, Any] | None = None  # options of PyTorch's checkpoint

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        head_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_bias: Tensor | None,
        past_key_values: tuple[LayerCache, ...] | None,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        places: Tensor | None,
    ) -> BaseModelOutput:
        """Run the layers; the record's `last_hidden_state` has not passed the final LayerNorm yet.

        With `places`, (B, M) or (1, M), the last layer computes the tokens there alone: its state is (B, M, D).
        """
        states, attentions, cross_attentions, caches = (hidden_states,), (), (), ()
        for i, layer in enumerate(self.layer):
            alone = places if i == len(self.layer) - 1 else None
            if alone is not None:
                bias, encoder_bias = bias_at(bias, alone), bias_at(encoder_bias, alone)
            run = layer
            if self.gradient_checkpointing is not None and torch.is_grad_enabled():
                run = partial(checkpoint, layer, **self.gradient_checkpointing)
            hidden_states, attention, cross_attention, cache = run(
                hidden_states,
                bias,
                None if head_mask is None else head_mask[i],
                encoder_hidden_states,
                encoder_bias,
                past_key_values[i] if past_key_values else None,
                output_attentions,
                alone,
            )
            states += (hidden_states,) if output_hidden_states else ()
            attentions += (attention,) if output_attentions else ()
            cross_attentions += (cross_attention,) if cross_attention is not None else ()
            caches += (cache,) if use_cache else ()
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=states if output_hidden_states else None,
            past_key_values=Cache(caches) if use_cache else None,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions or None,
        )

    def can_leave_out(self) -> bool:
        """Whether the last layer can compute a token without the others.

        Relative positions are counted from the last of them, slices of feed-forward take all, and so does whoever
        looks at what a layer returns.
        """
        last = self.layer[-1] if self.layer else None
        if kind_of(last) is not Layer or last.chunk_size or last.attention.self.relative_query:
            return False
        return not any(map(is_watched, (self, *last.modules())))


def kind_of(module: nn.Module | None) -> type:
    """The class of a module, under the one that `fully_shard` gives it."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed.fsdp"))
