"""The heads: each its extra modules and a short forward."""

from typing import Any

import keras
import tensorflow as tf

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.outputs import MaskedLMOutput
from roberta_pln.tf import weights
from roberta_pln.tf.activations import gelu
from roberta_pln.tf.layers import Dense, LayerNorm, Module, Shared, linear
from roberta_pln.tf.losses import cross_entropy
from roberta_pln.tf.model import RobertaPreLayerNormModel
from roberta_pln.tf.pretrained import RobertaPreLayerNormPreTrainedModel


class LMHead(Module):
    """decoder(LN(gelu(dense(x)))), (B, T, D) -> (B, T, V). The decoder is the word table unless untied."""

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.dense = Dense(config.hidden_size, config.hidden_size, shared)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, shared)
        tied = config.tie_word_embeddings
        self.decoder = None if tied else Dense(config.hidden_size, config.vocab_size, shared, bias=False)
        self.bias = self.add_weight((config.vocab_size,), initializer="zeros", name="bias")

    def call(self, hidden_states: tf.Tensor, word_embeddings: tf.Tensor) -> tf.Tensor:
        hidden_states = self.layer_norm(gelu(self.dense(hidden_states)))
        if self.decoder is not None:
            return self.decoder(hidden_states) + tf.cast(self.bias, self.compute_dtype)
        table, bias = (tf.cast(value, self.compute_dtype) for value in (word_embeddings, self.bias))
        return linear(hidden_states, table, bias, transpose=True)


@keras.saving.register_keras_serializable("roberta_pln")
class RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a language-model head that predicts every token from both sides.

    Args:
        config: sizes and switches.
        **options: `seed`, `name`, `dtype`, `trainable`; see `RobertaPreLayerNormPreTrainedModel`.
    """

    head = "ForMaskedLM"

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any) -> None:
        super().__init__(config, **options)
        with weights.left_blank():
            self.roberta_prelayernorm = RobertaPreLayerNormModel(
                config, add_pooling_layer=False, seed=self.seed_generator, dtype=self.dtype_policy
            )
        self.lm_head = LMHead(config, self.shared)
        self.post_init()

    def call(  # the arguments are in the order that TensorFlow users know, which is not PyTorch's
        self,
        input_ids: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: tf.Tensor | None = None,
        training: bool = False,
        encoder_hidden_states: tf.Tensor | None = None,
        encoder_attention_mask: tf.Tensor | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

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
        )
        table = self.roberta_prelayernorm.embeddings.word_embeddings.embeddings.value
        logits = self.lm_head(record.last_hidden_state, table)
        loss = None if labels is None else self.own_loss(logits, labels)
        return self.returned(MaskedLMOutput(loss, logits, record.hidden_states, record.attentions), return_dict)

    def own_loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The loss that `fit` uses unless `compile` was given another."""
        return cross_entropy(logits, self.ids("labels", labels, tuple(logits.shape[:-1])))
