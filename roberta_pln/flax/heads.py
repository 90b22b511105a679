"""The heads: each its extra modules and a short forward."""

from typing import Any

from flax import linen as nn
from jax import Array

from roberta_pln.flax.activations import gelu
from roberta_pln.flax.layers import Block
from roberta_pln.flax.losses import cross_entropy
from roberta_pln.flax.model import RobertaPreLayerNormModule
from roberta_pln.flax.pretrained import PreTrainedModule, RobertaPreLayerNormPreTrainedModel
from roberta_pln.outputs import MaskedLMOutput


class LMHead(Block):
    """decoder(LN(gelu(dense(x)))), (B, T, D) -> (B, T, V). The decoder shares the word embeddings unless untied."""

    def setup(self) -> None:
        config = self.config
        self.dense = self.linear(config.hidden_size)
        self.layer_norm = self.norm()
        self.bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), self.param_dtype)
        if not config.tie_word_embeddings:
            self.decoder = self.linear(config.vocab_size, use_bias=False)

    def __call__(self, hidden_states: Array, word_embeddings: Array) -> Array:
        hidden_states = self.layer_norm(gelu(self.dense(hidden_states)))
        if self.config.tie_word_embeddings:
            logits = hidden_states @ word_embeddings.astype(self.dtype).T
        else:
            logits = self.decoder(hidden_states)
        return logits + self.bias.astype(self.dtype)


class RobertaPreLayerNormForMaskedLMModule(PreTrainedModule):
    """The encoder with a language-model head that predicts every token from both sides, as a Linen module."""

    def setup(self) -> None:
        self.check()
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.roberta_prelayernorm = RobertaPreLayerNormModule(
            config, *dtypes, self.gradient_checkpointing, add_pooling_layer=False
        )
        self.lm_head = LMHead(config, *dtypes)

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
        labels: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, and

        Args:
            labels: (B, T) token ids to predict, -100 where nothing is.

        Returns:
            A `MaskedLMOutput`; its loss is None without labels and NaN when every label is -100.
        """
        record = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            deterministic=deterministic,
        )
        word_embeddings = self.roberta_prelayernorm.embeddings.word_embeddings.embedding
        logits = self.lm_head(record.last_hidden_state, word_embeddings)
        loss = None if labels is None else cross_entropy(logits, self.ids("labels", labels, logits.shape[:-1]))
        return self.returned(MaskedLMOutput(loss, logits, record.hidden_states, record.attentions), return_dict)


class RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a language-model head that predicts every token from both sides."""

    head = "ForMaskedLM"
    module_class = RobertaPreLayerNormForMaskedLMModule

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
        *,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) token ids to predict, -100 where nothing is.

        Returns:
            A `MaskedLMOutput`; its loss is None without labels and NaN when every label is -100.
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
            labels,
            output_attentions,
            output_hidden_states,
            return_dict,
        )
