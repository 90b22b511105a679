"""The tasks: what each reads, which head learns it, and how its predictions are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from roberta_pln.data import features, windows
from roberta_pln.data.features import Features
from roberta_pln.data.records import Record
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer
from roberta_pln.training import metrics

if TYPE_CHECKING:
    from roberta_pln.training.settings import Settings

Outputs = Mapping[str, Sequence[NDArray[Any]]]
"""What a model says, by name and row, as `Trainer.predict` gives it; and `labels` where these are made in the batch."""
Metrics = dict[str, float]
LOWER_IS_BETTER: Final = ("loss", "perplexity", "mse")


@dataclass(frozen=True)
class Task:
    """One kind of problem."""

    head: str
    """One of `schema.HEADS`."""
    metrics: tuple[str, ...]
    """The names of what is measured; the first chooses the best model."""
    features: Callable[[Sequence[Record], Tokenizer, int, Settings, Sequence[str] | None], Features]
    """Records, tokenizer, most tokens of a row, settings, names of the labels (None: those of the records)."""
    measure: Callable[[Sequence[Record], Any, Outputs, Settings], Metrics]
    """Records, their features, what the model says of the rows, settings."""
    config: Callable[[Features], dict[str, Any]]
    """Fields of the model's config that the training data decide."""


def _classes(found: Features) -> dict[str, Any]:
    names = dict(enumerate(found.label_names))
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def _measure_classes(records: Sequence[Record], found: Features, outputs: Outputs, settings: Settings) -> Metrics:
    labels = [row["labels"] for row in found.rows]
    return metrics.classification(labels, [int(np.argmax(row)) for row in outputs["logits"]])


def _measure_numbers(records: Sequence[Record], found: Features, outputs: Outputs, settings: Settings) -> Metrics:
    return metrics.regression([row["labels"] for row in found.rows], [float(row[0]) for row in outputs["logits"]])


def _measure_words(
    records: Sequence[Record], found: windows.WordFeatures, outputs: Outputs, settings: Settings
) -> Metrics:
    predicted = found.word_labels([np.argmax(row, -1) for row in outputs["logits"]])
    return metrics.entities([record["labels"] for record in records], predicted)


def _measure_answers(
    records: Sequence[Record], found: windows.AnswerFeatures, outputs: Outputs, settings: Settings
) -> Metrics:
    ranked = found.answers(outputs["start_logits"], outputs["end_logits"], no_answer=settings.no_answer)
    return metrics.answers(
        [record["answers"]["text"] for record in records], [row[0].text if row else "" for row in ranked]
    )


def _measure_choices(records: Sequence[Record], found: Features, outputs: Outputs, settings: Settings) -> Metrics:
    return {"accuracy": _measure_classes(records, found, outputs, settings)["accuracy"]}


def _measure_tokens(records: Sequence[Record], found: Features, outputs: Outputs, settings: Settings) -> Metrics:
    labels, losses, best = (np.concatenate(outputs[name]) for name in ("labels", "losses", "best"))
    if TASKS[settings.task].head == "ForCausalLM":  # nothing predicts the first token of a row
        first = np.concatenate([np.arange(len(row)) == 0 for row in outputs["labels"]])
        labels = np.where(first, IGNORE_INDEX, labels)
    chosen = labels != IGNORE_INDEX
    return metrics.language_model(losses[chosen], best[chosen] == labels[chosen])


_TOKENS: Final = ("loss", "perplexity", "accuracy")

TASKS: Final[Mapping[str, Task]] = {
    "classification": Task(
        "ForSequenceClassification",
        ("accuracy", "f1", "matthews"),
        lambda records, tokenizer, length, settings, names: features.classification(records, tokenizer, length, names),
        _measure_classes,
        lambda found: {**_classes(found), "problem_type": "single_label_classification"},
    ),
    "regression": Task(
        "ForSequenceClassification",
        ("pearson", "spearman", "mse"),
        lambda records, tokenizer, length, settings, names: features.regression(records, tokenizer, length),
        _measure_numbers,
        lambda found: {"num_labels": 1, "problem_type": "regression"},
    ),
    "token-classification": Task(
        "ForTokenClassification",
        ("f1", "precision", "recall", "accuracy"),
        lambda records, tokenizer, length, settings, names: windows.token_classification(
            records, tokenizer, length, names
        ),
        _measure_words,
        _classes,
    ),
    "question-answering": Task(
        "ForQuestionAnswering",
        ("f1", "exact_match"),
        lambda records, tokenizer, length, settings, names: windows.question_answering(
            records, tokenizer, length, settings.stride
        ),
        _measure_answers,
        lambda found: {"num_labels": 2},
    ),
    "multiple-choice": Task(
        "ForMultipleChoice",
        ("accuracy",),
        lambda records, tokenizer, length, settings, names: features.multiple_choice(records, tokenizer, length),
        _measure_choices,
        lambda found: {},
    ),
    "masked-lm": Task(
        "ForMaskedLM",
        _TOKENS,
        lambda records, tokenizer, length, settings, names: features.masked_lm(
            records, tokenizer, length, settings.join
        ),
        _measure_tokens,
        lambda found: {"is_decoder": False},
    ),
    "causal-lm": Task(
        "ForCausalLM",
        _TOKENS,
        lambda records, tokenizer, length, settings, names: features.causal_lm(records, tokenizer, length),
        _measure_tokens,
        lambda found: {"is_decoder": True},
    ),
}
