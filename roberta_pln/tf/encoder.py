"""The pre-norm layer and the stack of them."""

from collections.abc import Callable
from functools import partial

import tensorflow as tf

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.tf.activations import activation, in_training, is_named
from roberta_pln.tf.attention import Attention, bias_at
from roberta_pln.tf.layers import Dense, Dropout, LayerNorm, Module, Shared, dense_after, recomputed
from roberta_pln.tf.records import BaseModelOutput

LayerCache = tuple[tf.Tensor, ...]
"""Self keys and values, and with cross-attention also cross keys and values; each (B, H, S, K)."""


class Intermediate(Module):
    """The first half of the feed-forward branch: act(dense(LN(x)))."""

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, shared)
        self.dense = Dense(config.hidden_size, config.intermediate_size, shared)
        self.intermediate_act_fn = activation(config, shared)

    def call(self, hidden_states: tf.Tensor, training: bool = False) -> tf.Tensor:
        if training:
            return self.intermediate_act_fn(self.expand(hidden_states))
        return self.dense(self.LayerNorm(hidden_states), activation=self.intermediate_act_fn)

    def expand(self, hidden_states: tf.Tensor) -> tf.Tensor:
        """dense(LN(x)) in training, before the activation."""
        (hidden_states,) = dense_after(self.LayerNorm, hidden_states, self.dense, training=True)
        return hidden_states


class Output(Module):
    """The second half of the feed-forward branch: dense(x), or dense(before(x))."""

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.dense = Dense(config.activated_size, config.hidden_size, shared)
        self.dropout = Dropout(config.hidden_dropout_prob, shared)

    def call(self, hidden_states: tf.Tensor, before: Callable[[tf.Tensor], tf.Tensor] | None = None) -> tf.Tensor:
        if before is None:
            return self.dropout(self.dense(hidden_states))
        return self.dropout(*dense_after(before, hidden_states, self.dense, training=True))


class Layer(Module):
    """Self-attention, cross-attention if the config has it, and feed-forward, each added to the residual stream."""

    def __init__(self, config: RobertaPreLayerNormConfig, layer: int, shared: Shared) -> None:
        super().__init__(shared)
        self.chunk_size = config.chunk_size_feed_forward
        self.attention = Attention(config, layer, cross=False, shared=shared)
        if config.add_cross_attention:
            self.crossattention = Attention(config, layer, cross=True, shared=shared)
        self.intermediate = Intermediate(config, shared)
        self.feed_forward_output = Output(config, shared)

    @property
    def output(self) -> Output:
        """The second half of the feed-forward branch. See `Attention.output`."""
        return self.feed_forward_output

    def call(
        self,
        hidden_states: tf.Tensor,
        bias: tf.Tensor | None,
        head_mask: tf.Tensor | None,
        encoder_hidden_states: tf.Tensor | None,
        encoder_bias: tf.Tensor | None,
        past: LayerCache | None,
        output_attentions: bool,
        use_cache: bool,  # what a recomputed layer returns is kept, so it returns no more than is asked for
        places: tf.Tensor | None = None,
        training: bool = False,  # Keras hands it on to the layers inside, a second time only if it is given again
    ) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor | None, LayerCache | None]:
        hidden_states, attentions, cache = self.attention(
            hidden_states,
            bias,
            head_mask,
            None,
            None if past is None else past[:2],
            output_attentions=output_attentions,
            places=places,
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
                output_attentions=output_attentions,
            )
            cache = (*cache, *cross_cache)
        hidden_states = self.feed_forward(hidden_states, training)
        return hidden_states, attentions, cross_attentions, cache if use_cache else None

    def feed_forward(self, hidden_states: tf.Tensor, training: bool) -> tf.Tensor:
        """x + output(intermediate(x)), on slices of `chunk_size_feed_forward` tokens if that is set."""
        if self.chunk_size == 0:
            return hidden_states + self.branch(hidden_states, training)
        length = hidden_states.shape[1]
        checks.chunks(length, self.chunk_size)
        if length is None:  # a graph of open length has no fixed number of slices, and whole gives the same numbers
            return hidden_states + self.branch(hidden_states, training)
        slices = tf.split(hidden_states, length // self.chunk_size, axis=1)
        return tf.concat([part + self.branch(part, training) for part in slices], axis=1)

    def branch(self, hidden_states: tf.Tensor, training: bool) -> tf.Tensor:
        """output(intermediate(x)), in training without keeping what is between the two and cheap to compute anew."""
        activation = self.intermediate.intermediate_act_fn
        if not training or not is_named(activation):
            return self.output(self.intermediate(hidden_states))
        return self.output(self.intermediate.expand(hidden_states), before=in_training(activation))


class Encoder(Module):
    """The stack of layers."""

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.layer = [Layer(config, i, shared) for i in range(config.num_hidden_layers)]
        for i, layer in enumerate(self.layer):  # tf.train.Checkpoint does not look into lists that Keras tracks
            self._track_trackable(layer, f"layer.{i}")
        self.seed_generator = shared.seed_generator
        self.gradient_checkpointing = False

    def call(
        self,
        hidden_states: tf.Tensor,
        bias: tf.Tensor | None,
        head_mask: tf.Tensor | None,
        encoder_hidden_states: tf.Tensor | None,
        encoder_bias: tf.Tensor | None,
        past_key_values: tuple[LayerCache, ...] | None,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        places: tf.Tensor | None,
        training: bool = False,
    ) -> BaseModelOutput:
        """Run the layers; the record's `last_hidden_state` has not passed the final LayerNorm yet.

        With `places`, (B, M) or (1, M), the last layer computes the tokens there alone: its state is (B, M, D).
        """
        states, attentions, cross_attentions, caches = (hidden_states,), (), (), ()
        for i, layer in enumerate(self.layer):
            alone = places if i == len(self.layer) - 1 else None
            if alone is not None:
                bias, encoder_bias = bias_at(bias, alone), bias_at(encoder_bias, alone)
            run = partial(recomputed, layer, self.seed_generator) if self.gradient_checkpointing else layer
            hidden_states, attention, cross_attention, cache = run(
                hidden_states,
                bias,
                None if head_mask is None else head_mask[i],
                encoder_hidden_states,
                encoder_bias,
                past_key_values[i] if past_key_values else None,
                output_attentions=output_attentions,
                use_cache=use_cache,
                places=alone,
                training=training,
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

        Relative positions are counted from the last of them, and slices of feed-forward take all.
        """
        last = self.layer[-1] if self.layer else None
        return type(last) is Layer and not last.chunk_size and not last.attention.self.relative_query
