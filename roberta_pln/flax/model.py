"""The base model: embeddings, encoder, final norm, pooler."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.flax import cache
from roberta_pln.flax.attention import attention_bias, softmax_dtype
from roberta_pln.flax.cache import Cache
from roberta_pln.flax.embeddings import Embeddings, check_range
from roberta_pln.flax.encoder import Encoder
from roberta_pln.flax.layers import Block, readable, rows_at
from roberta_pln.flax.pretrained import PreTrainedModule, RobertaPreLayerNormPreTrainedModel
from roberta_pln.outputs import BaseModelOutput


class Pooler(Block):
    """tanh(dense(x)) of the first token, (B, T, D) -> (B, D)."""

    def setup(self) -> None:
        self.dense = self.linear(self.config.hidden_size)

    def __call__(self, hidden_states: Array) -> Array:
        return jnp.tanh(self.dense(hidden_states[:, 0]))


class RobertaPreLayerNormModule(PreTrainedModule):
    """The encoder (or decoder) without a head, as a Linen module.

    Args:
        config, dtype, param_dtype, gradient_checkpointing: see `PreTrainedModule`.
        add_pooling_layer: `False` leaves the pooler out, and `pooler_output` with it.
    """

    add_pooling_layer: bool = True

    def setup(self) -> None:
        self.check()
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.embeddings = Embeddings(config, *dtypes)
        self.encoder = Encoder(config, *dtypes, self.gradient_checkpointing)
        self.LayerNorm = self.norm()
        self.pooler = Pooler(config, *dtypes) if self.add_pooling_layer else None

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
        places: Array | None = None,
    ) -> BaseModelOutput | tuple:
        """Run the model.

        Args:
            input_ids: (B, T) token ids in [0, vocab_size); this or `inputs_embeds`.
            attention_mask: (B, S) with 1 for tokens to attend to and 0 for padding, or the complete pattern as
                (B, T, S) or (B, H, T, S), to which a decoder adds no causal mask. Padding is not detected from ids.
            token_type_ids: (B, T) in [0, type_vocab_size); zeros if not given.
            position_ids: (B, T) or (1, T) in [0, max_position_embeddings); counted from the tokens that are not
                padding if not given.
            head_mask: (H,) or (N, H); multiplies each head's attention probabilities.
            inputs_embeds: (B, T, D) instead of the word embeddings of `input_ids`.
            encoder_hidden_states: (B, encoder tokens, D), read by the cross-attention of a decoder.
            encoder_attention_mask: as `attention_mask`, over the encoder's tokens.
            past_key_values: a decoder's cache from an earlier call, N items; or one from `init_cache`, whose arrays
                have `max_length` tokens at every step, as have then the masks (S = max_length).
            use_cache: whether a decoder returns its cache; the config's value if not given.
            output_attentions, output_hidden_states, return_dict: the config's values if not given.
            deterministic: `False` applies dropout, which draws from the `dropout` key of `rngs`.
            segment_ids: (B, T), for several texts in each row, see `data.packing`: 1, 2, ... at the tokens of one after
                the other, and 0 at padding. A token sees its own segment alone. Positions that are not given are
                counted in every segment, so `max_position_embeddings` limits these and not the row, unless positions
                are relative. There is no `pooler_output` then and no cache, and `attention_mask`, `past_key_values` and
                `encoder_hidden_states` are refused.
            places: (B, M) or (1, M) in [0, T), for the states of some tokens: `last_hidden_state` is (B, M, D), with
                the numbers that these have among all, and the last layer leaves out the others where it can. The pooler
                reads the first of them.

        Returns:
            A `BaseModelOutput`, or with `return_dict=False` the tuple of its values. A row with an id that is out of
            range is NaN when its value cannot be read, which is so in traced code; and so is every row when tokens do
            not fit into a cache from `init_cache`.

        Raises:
            InputError: when an argument breaks a rule of `checks`.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.is_decoder and (config.use_cache if use_cache is None else use_cache)
        checks.switches(
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if segment_ids is not None:
            checks.segments(
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                encoder_hidden_states=encoder_hidden_states,
            )
            use_cache = False
        if not config.is_decoder:
            past_key_values = encoder_hidden_states = None

        checks.one_of_ids_and_embeds(input_ids is not None, inputs_embeds is not None)
        input_ids = self.ids("input_ids", input_ids)
        inputs_embeds = self.states(inputs_embeds)
        if input_ids is not None:
            checks.shape("input_ids", input_ids.shape, (None, None))
            batch, queries = input_ids.shape
        else:
            checks.shape("inputs_embeds", inputs_embeds.shape, (None, None, config.hidden_size))
            batch, queries = inputs_embeds.shape[:2]
        encoder_hidden_states = self.states(encoder_hidden_states)
        if encoder_hidden_states is not None:
            checks.encoder_states(config)
            checks.shape("encoder_hidden_states", encoder_hidden_states.shape, (batch, None, config.hidden_size))
        past_length = self.past_length(past_key_values, batch, encoder_hidden_states)
        known = past_length if isinstance(past_length, int) else 0  # what a traced cache holds shows as NaN only
        checks.sequence_length(queries, known, config, automatic=position_ids is None and segment_ids is None)
        keys = cache.keys(past_key_values, past_length, queries)
        segment_ids = self.segments(segment_ids, batch, queries)
        token_type_ids = self.ids("token_type_ids", token_type_ids, (batch, queries))
        position_ids = self.ids("position_ids", position_ids, (batch, queries), (1, queries))
        places = self.places(places, batch, queries)

        hidden_states = self.embeddings(
            input_ids, token_type_ids, position_ids, inputs_embeds, past_length, deterministic, segment_ids
        )
        tokens = past_length + queries
        bias = self.bias("attention_mask", attention_mask, hidden_states, keys, config.is_decoder, tokens, segment_ids)
        encoder_bias = None
        if encoder_hidden_states is None and config.add_cross_attention and self.is_initializing():
            encoder_hidden_states = hidden_states  # Linen makes a layer when it is called; a model has all of them
        if encoder_hidden_states is not None:
            encoder_bias = self.bias(
                "encoder_attention_mask", encoder_attention_mask, hidden_states, encoder_hidden_states.shape[1], False
            )
        whole = output_attentions or output_hidden_states
        alone = None if whole or not self.encoder.can_leave_out() else places
        record = self.encoder(
            hidden_states,
            bias,
            self.head_masks(head_mask),
            encoder_hidden_states,
            encoder_bias,
            cache.unpack(past_key_values),
            use_cache,
            output_attentions,
            output_hidden_states,
            deterministic,
            alone,
        )
        if record.past_key_values is not None and isinstance(past_key_values, Mapping):
            record.past_key_values = cache.pack(record.past_key_values, past_key_values)
        record.last_hidden_state = self.LayerNorm(record.last_hidden_state, deterministic)
        if places is not None and alone is None:
            record.last_hidden_state = rows_at(record.last_hidden_state, places)
        if self.pooler is not None and segment_ids is None:
            record.pooler_output = self.pooler(record.last_hidden_state)
        return self.returned(record, return_dict)

    def past_length(
        self, past_key_values: Cache | None, batch: int, encoder_hidden_states: Array | None
    ) -> int | Array:
        """Check a cache and count its tokens."""
        if past_key_values is None:
            return 0
        if isinstance(past_key_values, Mapping):
            cache.check(past_key_values, batch, self.config, self.dtype)
            return cache.tokens(past_key_values)
        encoder_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        checks.past_key_values(past_key_values, batch, encoder_tokens, self.config)
        return cache.length(past_key_values[0][0]) if past_key_values else 0

    def segments(self, segment_ids: Array | None, batch: int, queries: int) -> Array | None:
        """Check the numbers of the texts."""
        segment_ids = self.ids("segment_ids", segment_ids, (batch, queries))
        if segment_ids is not None and segment_ids.size and readable(segment_ids):
            checks.segment_numbers(int(np.asarray(segment_ids).min()))
        return segment_ids

    def places(self, places: Array | None, batch: int, queries: int) -> Array | None:
        """Check which tokens are wanted."""
        places = self.ids("places", places, (batch, None), (1, None))
        if places is None:
            return None
        checks.some_places(places.shape[1])
        check_range("places", places, queries, "the number of tokens")
        return places

    def bias(
        self,
        name: str,
        mask: Array | None,
        hidden_states: Array,
        keys: int,
        causal: bool,
        tokens: int | Array | None = None,
        segments: Array | None = None,
    ) -> Array | None:
        """Check a mask and turn it into what is added to the scores; see `attention_bias`."""
        batch, queries = hidden_states.shape[:2]
        mask = self.tensor(mask)
        if mask is not None:
            checks.attention_mask(name, mask.shape, batch, queries, keys, self.config.num_attention_heads)
        return attention_bias(mask, queries, keys, causal, softmax_dtype(hidden_states.dtype), tokens, segments)

    def head_masks(self, head_mask: Array | None) -> Array | None:
        """Check a head mask and give every layer its row, (H,) or (N, H) -> (N, H)."""
        head_mask = self.tensor(head_mask)
        if head_mask is None:
            return None
        checks.head_mask(head_mask.shape, self.config)
        return jnp.broadcast_to(head_mask, (self.config.num_hidden_layers, head_mask.shape[-1]))


class RobertaPreLayerNormModel(RobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) without a head.

    Args:
        config, input_shape, seed, dtype, _do_init, param_dtype, gradient_checkpointing: see
            `RobertaPreLayerNormPreTrainedModel`.
        add_pooling_layer: `False` leaves the pooler out, and `pooler_output` with it.
    """

    head = "Model"
    module_class = RobertaPreLayerNormModule

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: DTypeLike = jnp.float32,
        _do_init: bool = True,
        param_dtype: DTypeLike | None = None,
        gradient_checkpointing: bool = False,
        add_pooling_layer: bool = True,
    ) -> None:
        super().__init__(
            config,
            input_shape,
            seed,
            dtype,
            _do_init,
            param_dtype,
            gradient_checkpointing,
            add_pooling_layer=add_pooling_layer,
        )

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        params: dict[str, Any] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        *,
        inputs_embeds: Array | None = None,
        use_cache: bool | None = None,
        segment_ids: Array | None = None,
        places: Array | None = None,
    ) -> BaseModelOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, in transformers' order, and

        Args:
            params: used instead of the model's own parameters.
            dropout_rng: the key that dropout draws from; needed with `train`.
            train: whether to apply dropout.
        """
        return self.apply(
            params,
            dropout_rng,
            train,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict,
            segment_ids=segment_ids,
            places=places,
        )

    def init_cache(self, batch_size: int, max_length: int) -> dict[str, Any]:
        """An empty cache, to be given as `past_key_values`, whose arrays keep their shapes at every step.

        Args:
            batch_size: B of the calls.
            max_length: the most tokens that it can hold.

        Raises:
            InputError: when the model is no decoder, or `max_length` exceeds `max_position_embeddings`.
        """
        return cache.init(self.config, batch_size, max_length, self.dtype)
