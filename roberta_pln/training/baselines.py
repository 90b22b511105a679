"""What a guess reaches that counts the training examples and looks at nothing else: what a model has to be better than.

| task | guess |
|---|---|
| classification, multiple choice | the most frequent label |
| regression | the mean |
| token classification | of each word the most frequent label; of a new one the most frequent of all |
| question answering | a word of the context, drawn at random |
| language models | every token with its own frequency, counted once more than seen |
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from roberta_pln.data import records
from roberta_pln.data.records import Record
from roberta_pln.tokenizer import Tokenizer
from roberta_pln.training import metrics

Paths = str | os.PathLike[str]
T = TypeVar("T")


def guess(task: str, train: Paths, evaluated: Paths, model: Paths) -> dict[str, float]:
    """What the guess reaches, by the names of `tasks.TASKS`.

    Args:
        task: one of `tasks.TASKS`.
        train, evaluated: files of examples.
        model: a directory with the tokenizer, for language models.
    """
    known, asked = records.read(train, task), records.read(evaluated, task)
    if task in ("masked-lm", "causal-lm"):
        return _tokens(known, asked, Tokenizer.from_pretrained(model))
    if task == "token-classification":
        return _words(known, asked)
    if task == "question-answering":
        return _answers(asked)
    labels = [record["label"] for record in asked]
    if task == "regression":
        mean = float(np.mean([record["label"] for record in known]))
        return metrics.regression(labels, [mean] * len(labels))
    names = sorted({record["label"] for record in known})
    common = names.index(_commonest([record["label"] for record in known]))
    return metrics.classification([names.index(label) for label in labels], [common] * len(labels))


def _commonest(values: Sequence[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _words(known: Sequence[Record], asked: Sequence[Record]) -> dict[str, float]:
    seen: dict[str, list[str]] = defaultdict(list)
    for record in known:
        for word, label in zip(record["words"], record["labels"], strict=True):
            seen[word].append(label)
    commonest = _commonest([label for labels in seen.values() for label in labels])
    best = {word: _commonest(labels) for word, labels in seen.items()}
    predicted = [[best.get(word, commonest) for word in record["words"]] for record in asked]
    return metrics.entities([record["labels"] for record in asked], predicted)


def _answers(asked: Sequence[Record]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    drawn = [str(rng.choice(record["context"].split())) for record in asked]
    return metrics.answers([record["answers"]["text"] for record in asked], drawn)


def _tokens(known: Sequence[Record], asked: Sequence[Record], tokenizer: Tokenizer) -> dict[str, float]:
    seen, there = (
        np.bincount(
            [i for record in part for i in tokenizer.encode(record["text"])[1:-1]], minlength=tokenizer.vocab_size
        )
        for part in (known, asked)
    )
    losses = -np.log((seen + 1) / (seen + 1).sum())
    right = np.arange(len(seen)) == seen.argmax()
    return metrics.language_model(np.repeat(losses, there), np.repeat(right, there))
