"""The heads: each its extra modules and a short forward."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from roberta_pln.pt.embeddings import table_handed_on
from roberta_pln.pt.encoder import LayerCache
from roberta_pln.pt.generation import Generation
from roberta_pln.pt.layers import Dropout, Linear, hooks, is_alone, is_transformed, is_watched
from roberta_pln.pt.losses import (
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
from roberta_pln.pt.model import RobertaPreLayerNormModel
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel


class LMHead(nn.Module):
    """decoder(LN(gelu(dense(x)))), (B, T, D) -> (B, T, V). The decoder shares the word embeddings unless untied.

    With labels (B, T) it returns their `labelled_cross_entropy` instead, by word embeddings that are handed on to it.
    """

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(
        self, hidden_states: Tensor, labels: Tensor | None = None, word_embeddings: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            return self.decoder(self.transform(hidden_states))
        if not is_alone(self.decoder):  # what is there in its place, or a hook, may compute more than a product
            return cross_entropy(self.decoder(self.transform(hidden_states)), labels)
        table = self.decoder.weight if word_embeddings is None else word_embeddings
        return labelled_cross_entropy(hidden_states, labels, self.transform, table, self.decoder.bias)

    def transform(self, hidden_states: Tensor) -> Tensor:
        """What comes before the decoder."""
        return self.layer_norm(F.gelu(self.dense(hidden_states)))


def shared_table(
    base: RobertaPreLayerNormModel, head: LMHead, trains: bool
) -> AbstractContextManager[Sequence[Tensor]]:
    """A block in which a model that trains puts the word embeddings into the sequence that this gives, for its decoder.

    Not if the decoder has others, nor where somebody may look at the lookup or has put another in its place.
    """
    words = base.embeddings.word_embeddings
    plain = type(head) is LMHead and type(words) is nn.Embedding and not any(hooks(words))
    plain = plain and words.max_norm is None and not words.scale_grad_by_freq and not words.sparse
    plain = plain and type(words.weight) is nn.Parameter and words.weight is head.decoder.weight
    return table_handed_on() if trains and plain and not is_transformed() else nullcontext(())


class RobertaPreLayerNormForCausalLM(Generation, RobertaPreLayerNormPreTrainedModel):
    """The decoder with a language-model head that predicts the next token; `generate` continues texts.

    With `is_decoder=False` in the config every token sees both sides, and there is no cache.
    """

    head = "ForCausalLM"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        self.lm_head = LMHead(config)
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
        labels: Tensor | None = None,
        past_key_values: tuple[LayerCache, ...] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
        segment_ids: Tensor | None = None,
    ) -> CausalLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) token ids, -100 where nothing is predicted; those at t + 1 are what the logits at t predict.
                With labels there is no cache. Nothing predicts the first token of a segment, nor padding.
            output_logits: whether to return logits; if not given, unless it trains with labels (`model.train()`).
                Without them only what has a label is decoded, and the loss has no second derivative.

        Returns:
            A `CausalLMOutput`; its loss is None without labels and NaN when no label is left.
        """
        wants_logits = checks.wants_logits(output_logits, labels is not None, self.training)
        decodes_labelled = labels is not None and not wants_logits
        with shared_table(self.roberta_prelayernorm, self.lm_head, decodes_labelled) as tables:
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
        hidden_states, logits, loss = record.last_hidden_state, None, None
        labels = self.ids("labels", labels, tuple(hidden_states.shape[:-1]))
        if labels is not None and segment_ids is not None:
            labels = labels_within(labels, self.ids("segment_ids", segment_ids))
        if wants_logits:
            logits = self.lm_head(hidden_states)
            loss = None if labels is None else causal_cross_entropy(logits, labels)
        elif decodes_labelled:
            loss = self.lm_head(hidden_states, next_labels(labels), *tables)
        output = CausalLMOutput(
            loss, logits, record.past_key_values, record.hidden_states, record.attentions, record.cross_attentions
        )
        return self.returned(output, return_dict)


class RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a language-model head that predicts every token from both sides."""

    head = "ForMaskedLM"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        self.lm_head = LMHead(config)
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
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_logits: bool | None = None,
        segment_ids: Tensor | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) token ids to predict, -100 where nothing is.
            output_logits: whether to return logits; if not given, unless it trains with labels (`model.train()`).
                Without them only what has a label is decoded, and the loss has no second derivative.

        Returns:
            A `MaskedLMOutput`; its loss is None without labels and NaN when every label is -100.
        """
        labels = self.ids("labels", labels, (None, None))
        wants_logits = checks.wants_logits(output_logits, labels is not None, self.training)
        decodes_labelled = labels is not None and not wants_logits
        tokens = self.tensor(input_ids if inputs_embeds is None else inputs_embeds)
        places = self.places(labels, tokens) if decodes_labelled else None
        with shared_table(self.roberta_prelayernorm, self.lm_head, decodes_labelled) as tables:
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
        hidden_states, logits, loss = record.last_hidden_state, None, None
        if places is None:
            labels = self.ids("labels", labels, tuple(hidden_states.shape[:-1]))
        if wants_logits:
            logits = self.lm_head(hidden_states)
            loss = None if labels is None else cross_entropy(logits, labels)
        elif decodes_labelled:
            loss = self.lm_head(hidden_states, labels_at(labels, places), *tables)
        return self.returned(MaskedLMOutput(loss, logits, record.hidden_states, record.attentions), return_dict)

    def places(self, labels: Tensor, tokens: Tensor | None) -> Tensor | None:
        """Places of the tokens that the loss reads, (B, M), see `labelled_places`; None if all are to be computed.

        Those are computed for somebody who looks at them and for another head than this library's. Whether the shapes
        of labels (B, T) and tokens (B, T, ...) are wrong is told later.
        """
        base, head = self.roberta_prelayernorm, self.lm_head
        plain = type(head) is LMHead and is_alone(head.decoder) and not is_watched(head) and not is_watched(base)
        fits = tokens is not None and tokens.shape[:2] == labels.shape
        return labelled_places(labels) if plain and fits else None


def classifier_dropout(config: RobertaPreLayerNormConfig) -> Dropout:
    """Dropout at the rate of the classification heads."""
    rate = config.classifier_dropout
    return Dropout(config.hidden_dropout_prob if rate is None else rate)


class ClassificationHead(nn.Module):
    """out_proj(tanh(dense(x))) of the first token, (B, T, D) -> (B, L), with dropout before each layer."""

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = classifier_dropout(config)
        self.out_proj = Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = torch.tanh(self.dense(self.dropout(hidden_states[:, 0])))
        return self.out_proj(self.dropout(hidden_states))


class RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a classifier, or a regression, of the whole sequence."""

    head = "ForSequenceClassification"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        self.classifier = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
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
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=False,
            return_dict=True,
            places=None if is_watched(self.roberta_prelayernorm) else FIRST_PLACE,
        )
        logits = self.classifier(record.last_hidden_state)
        loss = None if labels is None else self.classification_loss(logits, labels)
        output = SequenceClassifierOutput(loss, logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Settle the problem type, and compute its loss."""
        labels = self.tensor(labels)
        integers = not (labels.is_floating_point() or labels.is_complex())
        kind = checks.problem_type(self.config, logits.shape[0], tuple(labels.shape), integers)
        self.config.problem_type = kind
        return classification(kind, logits, labels)


class RobertaPreLayerNormForMultipleChoice(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a score for each of several continuations; only one is right."""

    head = "ForMultipleChoice"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, 1)
        self.post_init()

    def forward(  # the arguments are in the order that PyTorch users know
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
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
        input_ids, inputs_embeds = self.ids("input_ids", input_ids), self.states(inputs_embeds)
        shape = tuple(input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:3])
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
            places=None if is_watched(self.roberta_prelayernorm) else FIRST_PLACE,
        )
        logits = self.classifier(self.dropout(record.pooler_output)).reshape(shape[:2])
        labels = self.ids("labels", labels, (logits.shape[0],))
        loss = None if labels is None else cross_entropy(logits, labels)
        output = MultipleChoiceOutput(loss, logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)

    def choices(self, name: str, value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """An argument of the shape of the ids."""
        value = self.tensor(value)
        if value is not None:
            checks.shape(name, tuple(value.shape), shape)
        return value


def flat(value: Tensor | None) -> Tensor | None:
    """Batch and choices as one axis, (B, C, ...) -> (B * C, ...)."""
    return None if value is None else value.flatten(0, 1)


class RobertaPreLayerNormForTokenClassification(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a classifier of every token."""

    head = "ForTokenClassification"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        segment_ids: Tensor | None = None,
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
        labels = self.ids("labels", labels, tuple(logits.shape[:-1]))
        loss = None if labels is None else cross_entropy(logits, labels)
        return self.returned(TokenClassifierOutput(loss, logits, record.hidden_states, record.attentions), return_dict)


class RobertaPreLayerNormForQuestionAnswering(RobertaPreLayerNormPreTrainedModel):
    """The encoder with two scores for every token: that the answer starts there, and that it ends there."""

    head = "ForQuestionAnswering"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        checks.two_labels(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        self.qa_outputs = Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
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
        start_logits, end_logits = self.qa_outputs(record.last_hidden_state).unbind(-1)  # each (B, T)
        batch = start_logits.shape[0]
        shapes = (batch,), (batch, 1)
        start_positions = self.ids("start_positions", start_positions, *shapes)
        end_positions = self.ids("end_positions", end_positions, *shapes)
        known = start_positions is not None and end_positions is not None
        loss = span(start_logits, end_logits, start_positions, end_positions) if known else None
        output = QuestionAnsweringOutput(loss, start_logits, end_logits, record.hidden_states, record.attentions)
        return self.returned(output, return_dict)
