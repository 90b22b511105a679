"""The base model: embeddings, encoder, final norm, pooler."""

import torch
from torch import Tensor, nn

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.outputs import BaseModelOutput
from roberta_pln.pt.attention import attention_bias, softmax_dtype
from roberta_pln.pt.embeddings import Embeddings, check_range, readable
from roberta_pln.pt.encoder import Encoder, LayerCache
from roberta_pln.pt.layers import Linear, is_watched, rows_at
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel


class Pooler(nn.Module):
    """tanh(dense(x)) of the first token, (B, T, D) -> (B, D)."""

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class RobertaPreLayerNormModel(RobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) without a head.

    Args:
        config: sizes and switches.
        add_pooling_layer: `False` leaves the pooler out, and `pooler_output` with it.
    """

    head = "Model"

    def __init__(self, config: RobertaPreLayerNormConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: tuple[LayerCache, ...] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        segment_ids: Tensor | None = None,
        places: Tensor | None = None,
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
            past_key_values: a decoder's cache from an earlier call, N items.
            use_cache: whether a decoder returns its cache; the config's value if not given.
            output_attentions, output_hidden_states, return_dict: the config's values if not given.
            segment_ids: (B, T), for several texts in each row, see `data.packing`: 1, 2, ... at the tokens of one after
                the other, and 0 at padding. A token sees its own segment alone. Positions that are not given are
                counted in every segment, so `max_position_embeddings` limits these and not the row, unless positions
                are relative. There is no `pooler_output` then and no cache, and `attention_mask`, `past_key_values` and
                `encoder_hidden_states` are refused.
            places: (B, M) or (1, M) in [0, T), for the states of some tokens: `last_hidden_state` is (B, M, D), with
                the numbers that these have among all, and the last layer leaves out the others where it can. The pooler
                reads the first of them.

        Returns:
            A `BaseModelOutput`, or with `return_dict=False` the tuple of its values.

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
            checks.shape("input_ids", tuple(input_ids.shape), (None, None))
            batch, queries = input_ids.shape
        else:
            checks.shape("inputs_embeds", tuple(inputs_embeds.shape), (None, None, config.hidden_size))
            batch, queries = inputs_embeds.shape[:2]
        encoder_hidden_states = self.states(encoder_hidden_states)
        if encoder_hidden_states is not None:
            checks.encoder_states(config)
            checks.shape("encoder_hidden_states", tuple(encoder_hidden_states.shape), (batch, None, config.hidden_size))
        past_length = self.past_length(past_key_values, batch, encoder_hidden_states)
        checks.sequence_length(queries, past_length, config, automatic=position_ids is None and segment_ids is None)
        segment_ids = self.segments(segment_ids, batch, queries)
        token_type_ids = self.ids("token_type_ids", token_type_ids, (batch, queries))
        position_ids = self.ids("position_ids", position_ids, (batch, queries), (1, queries))
        places = self.places(places, batch, queries)

        hidden_states = self.embeddings(
            input_ids, token_type_ids, position_ids, inputs_embeds, past_length, segment_ids
        )
        keys = past_length + queries
        bias = self.bias("attention_mask", attention_mask, hidden_states, keys, config.is_decoder, segment_ids)
        encoder_bias = None
        if encoder_hidden_states is not None:
            encoder_bias = self.bias(
                "encoder_attention_mask", encoder_attention_mask, hidden_states, encoder_hidden_states.shape[1], False
            )
        whole = output_attentions or output_hidden_states or is_watched(self.LayerNorm)
        alone = None if whole or not self.encoder.can_leave_out() else places
        record = self.encoder(
            hidden_states,
            bias,
            self.head_masks(head_mask),
            encoder_hidden_states,
            encoder_bias,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            alone,
        )
        record.last_hidden_state = self.LayerNorm(record.last_hidden_state)
        if places is not None and alone is None:
            record.last_hidden_state = rows_at(record.last_hidden_state, places)
        if self.pooler is not None and segment_ids is None:
            record.pooler_output = self.pooler(record.last_hidden_state)
        return self.returned(record, return_dict)

    def past_length(
        self, past_key_values: tuple[LayerCache, ...] | None, batch: int, encoder_hidden_states: Tensor | None
    ) -> int:
        """Check a cache and count its tokens."""
        if past_key_values is None:
            return 0
        encoder_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        checks.past_key_values(past_key_values, batch, encoder_tokens, self.config)
        return past_key_values[0][0].shape[2] if past_key_values else 0

    def segments(self, segment_ids: Tensor | None, batch: int, queries: int) -> Tensor | None:
        """Check the numbers of the texts."""
        segment_ids = self.ids("segment_ids", segment_ids, (batch, queries))
        if segment_ids is not None and segment_ids.numel() and readable(segment_ids):
            checks.segment_numbers(int(segment_ids.min()))
        return segment_ids

    def places(self, places: Tensor | None, batch: int, queries: int) -> Tensor | None:
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
        mask: Tensor | None,
        hidden_states: Tensor,
        keys: int,
        causal: bool,
        segments: Tensor | None = None,
    ) -> Tensor | None:
        """Check a mask and turn it into what is added to the scores; see `attention_bias`."""
        batch, queries = hidden_states.shape[:2]
        mask = self.tensor(mask)
        if mask is not None:
            checks.attention_mask(name, tuple(mask.shape), batch, queries, keys, self.config.num_attention_heads)
        dtype = softmax_dtype(hidden_states.dtype)
        return attention_bias(mask, queries, keys, causal, dtype, hidden_states.device, segments)

    def head_masks(self, head_mask: Tensor | None) -> Tensor | None:
        """Check a head mask and give every layer its row, (H,) or (N, H) -> (N, H)."""
        head_mask = self.tensor(head_mask)
        if head_mask is None:
            return None
        checks.head_mask(tuple(head_mask.shape), self.config)
        return head_mask.expand(self.config.num_hidden_layers, -1)
