"""The heads: each its extra modules and a short forward."""

from typing import Any

import keras
import tensorflow as tf

from roberta_pln import checks
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.numerics import FIRST_PLACE
from roberta_pln.outputs import (
    CausalLMOutput,
    MaskedLMOutput,
    MultipleChoiceOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from roberta_pln.tf import weights
from roberta_pln.tf.activations import gelu
from roberta_pln.tf.encoder import LayerCache
from roberta_pln.tf.generation import Generation
from roberta_pln.tf.layers import Dense, Dropout, LayerNorm, Module, Shared, linear, shape_of
from roberta_pln.tf.losses import (
    causal_cross_entropy,
    classification,
    cross_entropy,
    labelled_cross_entropy,
    labelled_places,
    labels_at,
    labels_within,
    next_labels,
    span,
)
from roberta_pln.tf.model import RobertaPreLayerNormModel
from roberta_pln.tf.pretrained import RobertaPreLayerNormPreTrainedModel


def base_model(config: RobertaPreLayerNormConfig, shared: Shared, add_pooling_layer: bool) -> RobertaPreLayerNormModel:
    """The base model of a head, which the head initialises with the rest."""
    with weights.left_blank():
        return RobertaPreLayerNormModel(
            config, add_pooling_layer=add_pooling_layer, seed=shared.seed_generator, dtype=shared.dtype
        )


class LMHead(Module):
    """decoder(LN(gelu(dense(x)))), (B, T, D) -> (B, T, V). The decoder is the word table unless untied.

    With labels (B, T) it returns their `labelled_cross_entropy` instead.
    """

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.dense = Dense(config.hidden_size, config.hidden_size, shared)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, shared)
        tied = config.tie_word_embeddings
        self.decoder = None if tied else Dense(config.hidden_size, config.vocab_size, shared, bias=False)
        self.bias = self.add_weight((config.vocab_size,), "bias")

    def call(
        self,
        hidden_states: tf.Tensor,
        word_embeddings: tf.Tensor,
        labels: tf.Tensor | None = None,
        training: bool = False,
    ) -> tf.Tensor:
        if labels is not None:
            table = word_embeddings if self.decoder is None else tf.transpose(self.decoder.kernel)
            return labelled_cross_entropy(hidden_states, labels, self.transform, table, self.bias, training)
        hidden_states = self.transform(hidden_states)
        if self.decoder is not None:
            return self.decoder(hidden_states) + tf.cast(self.bias, self.compute_dtype)
        table, bias = (tf.cast(value, self.compute_dtype) for value in (word_embeddings, self.bias))
        return linear(hidden_states, table, bias, transpose=True)

    def transform(self, hidden_states: tf.Tensor) -> tf.Tensor:
        """What comes before the decoder."""
        return self.layer_norm(self.dense(hidden_states, activation=gelu))


@keras.saving.register_keras_serializable("roberta_pln")
class RobertaPreLayerNormForCausalLM(Generation, RobertaPreLayerNormPreTrainedModel):
    """The decoder with a language-model head that predicts the next token; `generate` continues texts.

    With `is_decoder=False` in the config every token sees both sides, and there is no cache.

    Args:
        config: sizes and switches.
        **options: `seed`, `name`, `dtype`, `trainable`; see `RobertaPreLayerNormPreTrainedModel`.
    """

    head = "ForCausalLM"

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.roberta_prelayernorm = base_model(config, self.shared, add_pooling_layer=False)
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
        encoder_hidden_states: tf.Tensor | None = None,
        encoder_attention_mask: tf.Tensor | None = None,
        past_key_values: tuple[LayerCache, ...] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: tf.Tensor | None = None,
        training: bool = False,
        output_logits: bool | None = None,
        segment_ids: tf.Tensor | None = None,
    ) -> CausalLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) token ids, -100 where nothing is predicted; those at t + 1 are what the logits at t predict.
                With labels there is no cache. Nothing predicts the first token of a segment, nor padding.
            output_logits: whether to return logits; if not given, unless it trains with labels (`training=True`).
                Without them only what has a label is decoded, and the loss has no second derivative.

        Returns:
            A `CausalLMOutput`; its loss is None without labels and NaN when no label is left.
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
            past_key_values,
            use_cache=use_cache if labels is None else False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            segment_ids=segment_ids,
        )
        table = self.roberta_prelayernorm.embeddings.word_embeddings.embeddings.value
        hidden_states, logits, loss = record.last_hidden_state, None, None
        labels = self.ids("labels", labels, tuple(hidden_states.shape[:-1]))
        if labels is not None and segment_ids is not None:
            labels = labels_within(labels, self.ids("segment_ids", segment_ids))
        if checks.wants_logits(output_logits, labels is not None, training):
            logits = self.lm_head(hidden_states, table)
            loss = None if labels is None else self.own_loss(logits, labels)
        elif labels is not None:
            loss = self.lm_head(hidden_states, table, next_labels(labels))
        output = CausalLMOutput(
            loss, logits, record.past_key_values, record.hidden_states, record.attentions, record.cross_attentions
        )
        return self.returned(output, return_dict)

    def own_loss(self, logits: tf.Tensor, labels: tf.Tensor, segment_ids: tf.Tensor | None = None) -> tf.Tensor:
        """The loss that `fit` uses unless `compile` was given another."""
        labels = self.ids("labels", labels, tuple(logits.shape[:-1]))
        if segment_ids is not None:
            labels = labels_within(labels, self.ids("segment_ids", segment_ids))
        return causal_cross_entropy(logits, labels)


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
        self.roberta_prelayernorm = base_model(config, self.shared, add_pooling_layer=False)
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
        output_logits: bool | None = None,
        segment_ids: tf.Tensor | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) token ids to predict, -100 where nothing is.
            output_logits: whether to return logits; if not given, unless it trains with labels (`training=True`).
                Without them only what has a label is decoded, and the loss has no second derivative.

        Returns:
            A `MaskedLMOutput`; its loss is None without labels and NaN when every label is -100.
        """
        labels = self.ids("labels", labels, (None, None))
        wants_logits = checks.wants_logits(output_logits, labels is not None, training)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        places = None if labels is None or wants_logits else self.places(labels, tokens)
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
            segment_ids=segment_ids,
            places=places,
        )
        table = self.roberta_prelayernorm.embeddings.word_embeddings.embeddings.value
        hidden_states, logits, loss = record.last_hidden_state, None, None
        if places is None:
            labels = self.ids("labels", labels, tuple(hidden_states.shape[:-1]))
        if wants_logits:
            logits = self.lm_head(hidden_states, table)
            loss = None if labels is None else self.own_loss(logits, labels)
        elif labels is not None:
            loss = self.lm_head(hidden_states, table, labels_at(labels, places))
        return self.returned(MaskedLMOutput(loss, logits, record.hidden_states, record.attentions), return_dict)

    def places(self, labels: tf.Tensor, tokens: tf.Tensor | None) -> tf.Tensor | None:
        """Places of the tokens that the loss reads, (B, M), see `labelled_places`; None if all are to be computed.

        Those are computed for another head than this library's. Whether the shapes of labels (B, T) and tokens
        (B, T, ...) are wrong is told later.
        """
        fits = tokens is not None and tokens.shape[:2].is_compatible_with(labels.shape)
        return labelled_places(labels) if type(self.lm_head) is LMHead and fits else None

    def own_loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The loss that `fit` uses unless `compile` was given another."""
        return cross_entropy(logits, self.ids("labels", labels, tuple(logits.shape[:-1])))


def classifier_dropout(config: RobertaPreLayerNormConfig, shared: Shared) -> Dropout:
    """Dropout at the rate of the classification heads."""
    rate = config.classifier_dropout
    return Dropout(config.hidden_dropout_prob if rate is None else rate, shared)


class ClassificationHead(Module):
    """out_proj(tanh(dense(x))) of the first token, (B, T, D) -> (B, L), with dropout before each layer."""

    def __init__(self, config: RobertaPreLayerNormConfig, shared: Shared) -> None:
        super().__init__(shared)
        self.dense = Dense(config.hidden_size, config.hidden_size, shared)
        self.dropout = classifier_dropout(config, shared)
        self.out_proj = Dense(config.hidden_size, config.num_labels, shared)

    def call(self, hidden_states: tf.Tensor) -> tf.Tensor:
        hidden_states = tf.tanh(self.dense(self.dropout(hidden_states[:, 0])))
        return self.out_proj(self.dropout(hidden_states))


@keras.saving.register_keras_serializable("roberta_pln")
class RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a classifier, or a regression, of the whole sequence.

    Args:
        config: sizes and switches.
        **options: `seed`, `name`, `dtype`, `trainable`; see `RobertaPreLayerNormPreTrainedModel`.
    """

    head = "ForSequenceClassification"

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.roberta_prelayernorm = base_model(config, self.shared, add_pooling_layer=False)
        self.classifier = ClassificationHead(config, self.shared)
        self.post_init()

    def call(
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
    ) -> SequenceClassifierOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: by `config.problem_type`, which is set at the first call with labels if it is None: (B,) classes,
                -100 to leave one out; (B,) or (B, L) values of a regression; or (B, L) targets in [0, 1].

        Returns:
            A `SequenceClassifierOutput`; its loss is None without labels.
        """
        record = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            places=FIRST_PLACE,
        )
        logits = self.classifier(record.last_hidden_state)
        loss = None if labels is None else self.classification_loss(logits, labels)
        output = SequenceClassifierOutput(loss, logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def classification_loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Settle the problem type, and compute its loss."""
        integers = labels.dtype.is_integer
        kind = checks.problem_type(self.config, logits.shape[0], tuple(labels.shape), integers)
        self.config.problem_type = kind
        return classification(kind, logits, labels)

    own_loss = classification_loss


@keras.saving.register_keras_serializable("roberta_pln")
class RobertaPreLayerNormForMultipleChoice(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a score for each of several continuations; only one is right.

    Args:
        config: sizes and switches.
        **options: `seed`, `name`, `dtype`, `trainable`; see `RobertaPreLayerNormPreTrainedModel`.
    """

    head = "ForMultipleChoice"

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.roberta_prelayernorm = base_model(config, self.shared, add_pooling_layer=True)
        self.dropout = Dropout(config.hidden_dropout_prob, self.shared)
        self.classifier = Dense(config.hidden_size, 1, self.shared)
        self.post_init()

    def call(
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
    ) -> MultipleChoiceOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel` with an axis of choices, and

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, C, T).
            inputs_embeds: (B, C, T, D).
            labels: (B,) the right choice, -100 to leave a row out.

        Returns:
            A `MultipleChoiceOutput`; its loss is None without labels and NaN when every label is -100.
        """
        checks.one_of_ids_and_embeds(input_ids is not None, inputs_embeds is not None)
        first = input_ids if inputs_embeds is None else inputs_embeds
        shape = tuple(first.shape[:3] if inputs_embeds is not None else first.shape)
        checks.shape("input_ids or inputs_embeds", shape, (None, None, None))
        record = self.roberta_prelayernorm(
            flat(input_ids),
            flat(self.choices("attention_mask", attention_mask, shape)),
            flat(self.choices("token_type_ids", token_type_ids, shape)),
            flat(self.choices("position_ids", position_ids, shape)),
            head_mask,
            flat(inputs_embeds),
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            places=FIRST_PLACE,
        )
        logits = tf.reshape(self.classifier(self.dropout(record.pooler_output)), shape_of(first)[:2])
        loss = None if labels is None else self.own_loss(logits, labels)
        output = MultipleChoiceOutput(loss, logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def choices(self, name: str, value: tf.Tensor | None, shape: tuple[int | None, ...]) -> tf.Tensor | None:
        """An argument of the shape of the ids."""
        if value is not None:
            checks.shape(name, tuple(value.shape), shape)
        return value

    def own_loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The loss that `fit` uses unless `compile` was given another."""
        return cross_entropy(logits, self.ids("labels", labels, tuple(logits.shape[:1])))


def flat(value: tf.Tensor | None) -> tf.Tensor | None:
    """Batch and choices as one axis, (B, C, ...) -> (B * C, ...)."""
    if value is None:
        return None
    batch, choices, *rest = shape_of(value)
    return tf.reshape(value, (batch * choices, *rest))


@keras.saving.register_keras_serializable("roberta_pln")
class RobertaPreLayerNormForTokenClassification(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a classifier of every token.

    Args:
        config: sizes and switches.
        **options: `seed`, `name`, `dtype`, `trainable`; see `RobertaPreLayerNormPreTrainedModel`.
    """

    head = "ForTokenClassification"

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.roberta_prelayernorm = base_model(config, self.shared, add_pooling_layer=False)
        self.dropout = classifier_dropout(config, self.shared)
        self.classifier = Dense(config.hidden_size, config.num_labels, self.shared)
        self.post_init()

    def call(
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
        segment_ids: tf.Tensor | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) classes, -100 to leave a token out.

        Returns:
            A `TokenClassifierOutput`; its loss is None without labels and NaN when every label is -100.
        """
        record = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            segment_ids=segment_ids,
        )
        logits = self.classifier(self.dropout(record.last_hidden_state))
        loss = None if labels is None else self.own_loss(logits, labels)
        return self.returned(TokenClassifierOutput(loss, logits, record.hidden_states, record.attentions), return_dict)

    def own_loss(self, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """The loss that `fit` uses unless `compile` was given another."""
        return cross_entropy(logits, self.ids("labels", labels, tuple(logits.shape[:-1])))


@keras.saving.register_keras_serializable("roberta_pln")
class RobertaPreLayerNormForQuestionAnswering(RobertaPreLayerNormPreTrainedModel):
    """The encoder with two scores for every token: that the answer starts there, and that it ends there.

    Args:
        config: sizes and switches.
        **options: `seed`, `name`, `dtype`, `trainable`; see `RobertaPreLayerNormPreTrainedModel`.
    """

    head = "ForQuestionAnswering"
    label_names = ("start_positions", "end_positions")
    logits_names = ("start_logits", "end_logits")

    def __init__(self, config: RobertaPreLayerNormConfig, **options: Any) -> None:
        super().__init__(config, **options)
        checks.two_labels(config)
        self.roberta_prelayernorm = base_model(config, self.shared, add_pooling_layer=False)
        self.qa_outputs = Dense(config.hidden_size, config.num_labels, self.shared)
        self.post_init()

    def call(
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
        start_positions: tf.Tensor | None = None,
        end_positions: tf.Tensor | None = None,
        training: bool = False,
    ) -> QuestionAnsweringOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            start_positions, end_positions: (B,) or (B, 1) first and last token of the answer; a position outside of
                the tokens is left out. Both are needed for a loss.

        Returns:
            A `QuestionAnsweringOutput`; its loss is None without positions and NaN when all are left out.
        """
        record = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        start_logits, end_logits = tf.unstack(self.qa_outputs(record.last_hidden_state), axis=-1)  # each (B, T)
        known = start_positions is not None and end_positions is not None
        loss = self.own_loss((start_logits, end_logits), (start_positions, end_positions)) if known else None
        output = QuestionAnsweringOutput(loss, start_logits, end_logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def own_loss(self, logits: tuple[tf.Tensor, tf.Tensor], labels: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """The loss that `fit` uses unless `compile` was given another."""
        shapes = (logits[0].shape[0],), (logits[0].shape[0], 1)
        positions = [self.ids(name, value, *shapes) for name, value in zip(self.label_names, labels, strict=True)]
        return span(*logits, *positions)
