"""The pre-norm layer and the stack of them."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from roberta_pln import checks
from roberta_pln.flax.activations import activation, is_named
from roberta_pln.flax.attention import Attention, bias_at
from roberta_pln.flax.cache import LayerCache
from roberta_pln.flax.layers import Block, Dropout, dense_after, is_watched
from roberta_pln.outputs import BaseModelOutput


class Intermediate(Block):
    """The first half of the feed-forward branch: act(dense(LN(x)))."""

    def setup(self) -> None:
        self.LayerNorm = self.norm()
        self.dense = self.linear(self.config.intermediate_size)
        self.intermediate_act_fn = activation(self.config, self.param_dtype)

    def __call__(self, hidden_states: Array, deterministic: bool) -> Array:
        return self.intermediate_act_fn(self.expand(hidden_states, deterministic))

    def expand(self, hidden_states: Array, deterministic: bool) -> Array:
        """dense(LN(x)), before the activation."""
        (hidden_states,) = dense_after(self.LayerNorm, hidden_states, self.dense, deterministic=deterministic)
        return hidden_states


class Output(Block):
    """The second half of the feed-forward branch: dense(x), or dense(before(x))."""

    def setup(self) -> None:
        self.dense = self.linear(self.config.hidden_size)
        self.dropout = Dropout(self.config.hidden_dropout_prob)

    def __call__(
        self, hidden_states: Array, deterministic: bool, before: Callable[[Array], Array] | None = None
    ) -> Array:
        if before is None:
            return self.dropout(self.dense(hidden_states), deterministic)
        return self.dropout(*dense_after(before, hidden_states, self.dense, deterministic=False), deterministic)


class Layer(Block):
    """Self-attention, cross-attention if the config has it, and feed-forward, each added to the residual stream."""

    layer: int

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.chunk_size = config.chunk_size_feed_forward
        self.attention = Attention(config, *dtypes, self.layer, cross=False)
        if config.add_cross_attention:
            self.crossattention = Attention(config, *dtypes, self.layer, cross=True)
        self.intermediate = Intermediate(config, *dtypes)
        self.output = Output(config, *dtypes)

    def __call__(
        self,
        hidden_states: Array,
        bias: Array | None,
        head_mask: Array | None,
        encoder_hidden_states: Array | None,
        encoder_bias: Array | None,
        past: LayerCache | None,
        output_attentions: bool,
        deterministic: bool,
        places: Array | None = None,
    ) -> tuple[Array, Array | None, Array | None, LayerCache]:
        hidden_states, attentions, cache = self.attention(
            hidden_states,
            bias,
            head_mask,
            None,
            None if past is None else past[:2],
            output_attentions,
            deterministic,
            places,
        )
        cross_attentions = None
        if encoder_hidden_states is not None:
            cross_past = None if past is None or len(past) < 4 or past[2] is None else past[2:]
            hidden_states, cross_attentions, cross_cache = self.crossattention(
                hidden_states,
                encoder_bias,
                head_mask,
                encoder_hidden_states,
                cross_past,
                output_attentions,
                deterministic,
            )
            cache = (*cache, *cross_cache)
        return self.feed_forward(hidden_states, deterministic), attentions, cross_attentions, cache

    def feed_forward(self, hidden_states: Array, deterministic: bool) -> Array:
        """x + output(intermediate(x)), on slices of `chunk_size_feed_forward` tokens if that is set."""
        if self.chunk_size == 0 or self.is_initializing():  # a module is initialised on any number of tokens
            return hidden_states + self.branch(hidden_states, deterministic)
        checks.chunks(hidden_states.shape[1], self.chunk_size)
        slices = jnp.split(hidden_states, hidden_states.shape[1] // self.chunk_size, axis=1)
        return jnp.concatenate([part + self.branch(part, deterministic) for part in slices], axis=1)

    def branch(self, hidden_states: Array, deterministic: bool) -> Array:
        """output(intermediate(x)), in training without keeping what is between the two and cheap to compute anew."""
        activation = self.intermediate.intermediate_act_fn
        if deterministic or not is_named(activation):
            return self.output(self.intermediate(hidden_states, deterministic), deterministic)
        return self.output(self.intermediate.expand(hidden_states, deterministic), deterministic, activation)


class Layers(Block):
    """The layers under their numbers, as `layer.0`, which a list in Linen would name `layer_0`.

    Args:
        config, dtype, param_dtype: see `Block`.
        gradient_checkpointing: whether the backward pass computes each layer anew instead of keeping its insides.
    """

    gradient_checkpointing: bool

    def setup(self) -> None:
        kind = nn.remat(Layer, static_argnums=(7, 8)) if self.gradient_checkpointing else Layer  # the switches
        self.items = [
            kind(self.config, self.dtype, self.param_dtype, i, name=str(i))
            for i in range(self.config.num_hidden_layers)
        ]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.items)


class Encoder(Block):
    """The stack of layers."""

    gradient_checkpointing: bool

    def setup(self) -> None:
        self.layer = Layers(self.config, self.dtype, self.param_dtype, self.gradient_checkpointing)

    def __call__(
        self,
        hidden_states: Array,
        bias: Array | None,
        head_mask: Array | None,
        encoder_hidden_states: Array | None,
        encoder_bias: Array | None,
        past_key_values: tuple[LayerCache, ...] | None,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        deterministic: bool,
        places: Array | None,
    ) -> BaseModelOutput:
        """Run the layers; the record's `last_hidden_state` has not passed the final LayerNorm yet.

        With `places`, (B, M) or (1, M), the last layer computes the tokens there alone: its state is (B, M, D).
        """
        states, attentions, cross_attentions, caches = (hidden_states,), (), (), ()
        for i, layer in enumerate(self.layer):
            alone = places if i == self.config.num_hidden_layers - 1 else None
            if alone is not None:
                bias, encoder_bias = bias_at(bias, alone), bias_at(encoder_bias, alone)
            hidden_states, attention, cross_attention, cache = layer(
                hidden_states,
                bias,
                None if head_mask is None else head_mask[i],
                encoder_hidden_states,
                encoder_bias,
                past_key_values[i] if past_key_values else None,
                output_attentions,
                deterministic,
                alone,
            )
            states += (hidden_states,) if output_hidden_states else ()
            attentions += (attention,) if output_attentions else ()
            cross_attentions += (cross_attention,) if cross_attention is not None else ()
            caches += (cache,) if use_cache else ()
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=states if output_hidden_states else None,
            past_key_values=caches if use_cache else None,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions or None,
        )

    def can_leave_out(self) -> bool:
        """Whether the last layer can compute a token without the others.

        Relative positions are counted from the last of them, slices of feed-forward take all, and so does whoever
        looks at what a layer returns.
        """
        config = self.config
        if config.position_embedding_type != "absolute" or config.chunk_size_feed_forward:
            return False
        return config.num_hidden_layers > 0 and not is_watched() and not self.is_initializing()
