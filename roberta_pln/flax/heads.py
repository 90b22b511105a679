"""The heads: each its extra modules and a short forward."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from roberta_pln import checks, schema
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.flax import cache
from roberta_pln.flax.activations import gelu
from roberta_pln.flax.cache import Cache
from roberta_pln.flax.generation import Generation
from roberta_pln.flax.layers import Block, Dropout, is_watched
from roberta_pln.flax.losses import (
    causal_cross_entropy,
    classification,
    cross_entropy,
    labelled_cross_entropy,
    labels_within,
    next_labels,
    span,
)
from roberta_pln.flax.model import RobertaPreLayerNormModule
from roberta_pln.flax.pretrained import PreTrainedModule, RobertaPreLayerNormPreTrainedModel
from roberta_pln.numerics import FIRST_PLACE
from roberta_pln.outputs import (
    CausalLMOutput,
    MaskedLMOutput,
    MultipleChoiceOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


class LMHead(Block):
    """decoder(LN(gelu(dense(x)))), (B, T, D) -> (B, T, V). The decoder shares the word embeddings unless untied.

    With labels (B, T) it returns their `labelled_cross_entropy` instead.
    """

    def setup(self) -> None:
        config = self.config
        self.dense = self.linear(config.hidden_size)
        self.layer_norm = self.norm()
        self.bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), self.param_dtype)
        if not config.tie_word_embeddings:
            self.decoder = self.linear(config.vocab_size, use_bias=False)

    def __call__(self, hidden_states: Array, word_embeddings: Array, labels: Array | None = None) -> Array:
        tied = self.config.tie_word_embeddings
        if labels is not None:
            if self.is_initializing() and not tied:  # Linen makes the kernel when the decoder is called
                self.decoder(hidden_states)
            table = word_embeddings if tied else self.decoder.variables["params"]["kernel"].T
            return labelled_cross_entropy(hidden_states, labels, self.transform, table, self.bias)
        hidden_states = self.transform(hidden_states)
        # Without a transposed table in the program: for one row XLA's processor backend would write one each time.
        logits = jnp.inner(hidden_states, word_embeddings.astype(self.dtype)) if tied else self.decoder(hidden_states)
        return logits + self.bias.astype(self.dtype)

    def transform(self, hidden_states: Array) -> Array:
        """What comes before the decoder."""
        return self.layer_norm(gelu(self.dense(hidden_states)))


class RobertaPreLayerNormForCausalLMModule(PreTrainedModule):
    """The decoder with a language-model head that predicts the next token, as a Linen module.

    With `is_decoder=False` in the config every token sees both sides, and there is no cache.
    """

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
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
        output_logits: bool | None = None,
        segment_ids: Array | None = None,
    ) -> CausalLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, and

        Args:
            labels: (B, T) token ids, -100 where nothing is predicted; those at t + 1 are what the logits at t predict.
                With labels there is no cache. Nothing predicts the first token of a segment, nor padding.
            output_logits: whether to return logits; if not given, unless it trains with labels (`deterministic=False`).
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
            deterministic=deterministic,
            segment_ids=segment_ids,
        )
        word_embeddings = self.roberta_prelayernorm.embeddings.word_embeddings.embedding
        hidden_states, logits, loss = record.last_hidden_state, None, None
        labels = self.ids("labels", labels, hidden_states.shape[:-1])
        if labels is not None and segment_ids is not None:
            labels = labels_within(labels, self.ids("segment_ids", segment_ids))
        if checks.wants_logits(output_logits, labels is not None, not deterministic):
            logits = self.lm_head(hidden_states, word_embeddings)
            loss = None if labels is None else causal_cross_entropy(logits, labels)
        elif labels is not None:
            loss = self.lm_head(hidden_states, word_embeddings, next_labels(labels))
        output = CausalLMOutput(
            loss, logits, record.past_key_values, record.hidden_states, record.attentions, record.cross_attentions
        )
        return self.returned(output, return_dict)


class RobertaPreLayerNormForCausalLM(Generation, RobertaPreLayerNormPreTrainedModel):
    """The decoder with a language-model head that predicts the next token; `generate` continues texts."""

    head = "ForCausalLM"
    module_class = RobertaPreLayerNormForCausalLMModule

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
        labels: Array | None = None,
        use_cache: bool | None = None,
        output_logits: bool | None = None,
        segment_ids: Array | None = None,
    ) -> CausalLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormForCausalLMModule`, and those of
        `RobertaPreLayerNormModel` about parameters and dropout.
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
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict,
            output_logits=output_logits,
            segment_ids=segment_ids,
        )

    def init_cache(self, batch_size: int, max_length: int) -> dict[str, Any]:
        """An empty cache; see `RobertaPreLayerNormModel.init_cache`."""
        return {schema.PREFIX: cache.init(self.config, batch_size, max_length, self.dtype)}


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
        output_logits: bool | None = None,
        segment_ids: Array | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, and

        Args:
            labels: (B, T) token ids to predict, -100 where nothing is.
            output_logits: whether to return logits; if not given, unless it trains with labels (`deterministic=False`).
                Without them only what has a label is decoded, and the loss has no second derivative.

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
            segment_ids=segment_ids,
        )
        word_embeddings = self.roberta_prelayernorm.embeddings.word_embeddings.embedding
        hidden_states, logits, loss = record.last_hidden_state, None, None
        labels = self.ids("labels", labels, hidden_states.shape[:-1])
        if checks.wants_logits(output_logits, labels is not None, not deterministic):
            logits = self.lm_head(hidden_states, word_embeddings)
            loss = None if labels is None else cross_entropy(logits, labels)
        elif labels is not None:
            loss = self.lm_head(hidden_states, word_embeddings, labels)
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
        output_logits: bool | None = None,
        segment_ids: Array | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormForMaskedLMModule`, and those of
        `RobertaPreLayerNormModel` about parameters and dropout.
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
            output_logits=output_logits,
            segment_ids=segment_ids,
        )


def classifier_dropout(config: RobertaPreLayerNormConfig) -> Dropout:
    """Dropout at the rate of the classification heads."""
    rate = config.classifier_dropout
    return Dropout(config.hidden_dropout_prob if rate is None else rate)


class ClassificationHead(Block):
    """out_proj(tanh(dense(x))) of the first token, (B, T, D) -> (B, L), with dropout before each layer."""

    def setup(self) -> None:
        config = self.config
        self.dense = self.linear(config.hidden_size)
        self.dropout = classifier_dropout(config)
        self.out_proj = self.linear(config.num_labels)

    def __call__(self, hidden_states: Array, deterministic: bool) -> Array:
        hidden_states = jnp.tanh(self.dense(self.dropout(hidden_states[:, 0], deterministic)))
        return self.out_proj(self.dropout(hidden_states, deterministic))


class RobertaPreLayerNormForSequenceClassificationModule(PreTrainedModule):
    """The encoder with a classifier, or a regression, of the whole sequence, as a Linen module."""

    def setup(self) -> None:
        self.check()
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.roberta_prelayernorm = RobertaPreLayerNormModule(
            config, *dtypes, self.gradient_checkpointing, add_pooling_layer=False
        )
        self.classifier = ClassificationHead(config, *dtypes)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, and

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
            deterministic=deterministic,
            places=None if is_watched() else FIRST_PLACE,
        )
        logits = self.classifier(record.last_hidden_state, deterministic)
        loss = None if labels is None else self.classification_loss(logits, labels)
        output = SequenceClassifierOutput(loss, logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def classification_loss(self, logits: Array, labels: Array) -> Array:
        """Settle the problem type, and compute its loss."""
        labels = self.tensor(labels)
        integers = not jnp.issubdtype(labels.dtype, jnp.inexact)
        kind = checks.problem_type(self.config, logits.shape[0], labels.shape, integers)
        self.config.problem_type = kind
        return classification(kind, logits, labels)


class RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a classifier, or a regression, of the whole sequence."""

    head = "ForSequenceClassification"
    module_class = RobertaPreLayerNormForSequenceClassificationModule

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        params: dict[str, Any] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormForSequenceClassificationModule`, and those of
        `RobertaPreLayerNormModel` about parameters and dropout.
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
            labels,
            output_attentions,
            output_hidden_states,
            return_dict,
        )


class RobertaPreLayerNormForMultipleChoiceModule(PreTrainedModule):
    """The encoder with a score for each of several continuations, as a Linen module; only one is right."""

    def setup(self) -> None:
        self.check()
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.roberta_prelayernorm = RobertaPreLayerNormModule(config, *dtypes, self.gradient_checkpointing)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = self.linear(1)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> MultipleChoiceOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule` with an axis of choices, and

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, C, T).
            inputs_embeds: (B, C, T, D).
            labels: (B,) the right choice, -100 to leave a row out.

        Returns:
            A `MultipleChoiceOutput`; its loss is None without labels and NaN when every label is -100.
        """
        checks.one_of_ids_and_embeds(input_ids is not None, inputs_embeds is not None)
        input_ids, inputs_embeds = self.ids("input_ids", input_ids), self.states(inputs_embeds)
        if self.is_initializing() and input_ids is not None and input_ids.ndim == 2:  # as other heads are initialised
            input_ids = input_ids[None]
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:3]
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
            deterministic=deterministic,
            places=None if is_watched() else FIRST_PLACE,
        )
        logits = self.classifier(self.dropout(record.pooler_output, deterministic)).reshape(shape[:2])
        labels = self.ids("labels", labels, (logits.shape[0],))
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MultipleChoiceOutput(loss, logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def choices(self, name: str, value: Array | None, shape: tuple[int, ...]) -> Array | None:
        """An argument of the shape of the ids."""
        value = self.tensor(value)
        if value is not None:
            checks.shape(name, value.shape, shape)
        return value


def flat(value: Array | None) -> Array | None:
    """Batch and choices as one axis, (B, C, ...) -> (B * C, ...)."""
    return None if value is None else value.reshape(-1, *value.shape[2:])


class RobertaPreLayerNormForMultipleChoice(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a score for each of several continuations; only one is right."""

    head = "ForMultipleChoice"
    module_class = RobertaPreLayerNormForMultipleChoiceModule

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        params: dict[str, Any] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
    ) -> MultipleChoiceOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormForMultipleChoiceModule`, and those of
        `RobertaPreLayerNormModel` about parameters and dropout.
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
            labels,
            output_attentions,
            output_hidden_states,
            return_dict,
        )


class RobertaPreLayerNormForTokenClassificationModule(PreTrainedModule):
    """The encoder with a classifier of every token, as a Linen module."""

    def setup(self) -> None:
        self.check()
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.roberta_prelayernorm = RobertaPreLayerNormModule(
            config, *dtypes, self.gradient_checkpointing, add_pooling_layer=False
        )
        self.dropout = classifier_dropout(config)
        self.classifier = self.linear(config.num_labels)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
        segment_ids: Array | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, and

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
            deterministic=deterministic,
            segment_ids=segment_ids,
        )
        logits = self.classifier(self.dropout(record.last_hidden_state, deterministic))
        labels = self.ids("labels", labels, logits.shape[:-1])
        loss = None if labels is None else cross_entropy(logits, labels)
        return self.returned(TokenClassifierOutput(loss, logits, record.hidden_states, record.attentions), return_dict)


class RobertaPreLayerNormForTokenClassification(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a classifier of every token."""

    head = "ForTokenClassification"
    module_class = RobertaPreLayerNormForTokenClassificationModule

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        params: dict[str, Any] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        segment_ids: Array | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormForTokenClassificationModule`, and those of
        `RobertaPreLayerNormModel` about parameters and dropout.
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
            labels,
            output_attentions,
            output_hidden_states,
            return_dict,
            segment_ids=segment_ids,
        )


class RobertaPreLayerNormForQuestionAnsweringModule(PreTrainedModule):
    """The encoder with two scores for every token, that the answer starts and ends there, as a Linen module."""

    def setup(self) -> None:
        self.check()
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        checks.two_labels(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModule(
            config, *dtypes, self.gradient_checkpointing, add_pooling_layer=False
        )
        self.qa_outputs = self.linear(config.num_labels)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        deterministic: bool = True,
    ) -> QuestionAnsweringOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModule`, and

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
            deterministic=deterministic,
        )
        logits = self.qa_outputs(record.last_hidden_state)
        start_logits, end_logits = logits[..., 0], logits[..., 1]  # each (B, T)
        shapes = (len(start_logits),), (len(start_logits), 1)
        start_positions = self.ids("start_positions", start_positions, *shapes)
        end_positions = self.ids("end_positions", end_positions, *shapes)
        known = start_positions is not None and end_positions is not None
        loss = span(start_logits, end_logits, start_positions, end_positions) if known else None
        output = QuestionAnsweringOutput(loss, start_logits, end_logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)


class RobertaPreLayerNormForQuestionAnswering(RobertaPreLayerNormPreTrainedModel):
    """The encoder with two scores for every token: that the answer starts there, and that it ends there."""

    head = "ForQuestionAnswering"
    module_class = RobertaPreLayerNormForQuestionAnsweringModule

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        head_mask: Array | None = None,
        params: dict[str, Any] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
    ) -> QuestionAnsweringOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormForQuestionAnsweringModule`, and those of
        `RobertaPreLayerNormModel` about parameters and dropout.
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
            start_positions,
            end_positions,
            output_attentions,
            output_hidden_states,
            return_dict,
        )
