"""From records to the arguments of a model, for tasks in which an example is a row (`windows.py` has the other two).

A feature holds the arguments of one row by their names, as lists without padding and plain numbers; `batches.py` pads
them. `attention_mask` comes with the padding.

| task | columns of a record | feature |
|---|---|---|
| `classification` | `text`, perhaps `text_pair`, `label` (string or integer) | `input_ids` (T,), `labels`: index |
| `regression` | `text`, perhaps `text_pair`, `label` (number) | `input_ids` (T,), `labels`: float |
| `multiple_choice` | perhaps `prompt`, `choices`, `label` (index) | `input_ids` (C, T), `labels`: index |
| `masked_lm` | `text` | `input_ids` (T,); the labels come with the masks of a batch |
| `causal_lm` | `text` | `input_ids` (T,), `labels` (T,): the same ids, which the model shifts |

Every feature has something to learn; examples without are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from roberta_pln.checks import InputError
from roberta_pln.data.packing import encode_documents, pack
from roberta_pln.data.records import Record, check
from roberta_pln.tokenizer import Tokenizer

Feature = dict[str, Any]
"""Arguments of a model for one row: `input_ids`, and labels if there are any."""

LEAST_LENGTH: Final = 8
"""Room for the special tokens of a pair, and for some text."""


@dataclass(frozen=True)
class Features:
    """Features of a list of records, and what happened to those that did not fit."""

    rows: tuple[Feature, ...]
    """At least one."""
    label_names: tuple[str, ...] = ()
    """Names of the classes, by their index; none for other tasks."""
    cut: int = 0
    """Number of examples that lost tokens, because they are too long."""
    left_out: int = 0
    """Number of examples or, of a language model, texts and rows that have nothing to learn, and are not in `rows`."""

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError(
                f"at least one example must have something to learn, got {self.left_out} that have nothing"
            )


def classification(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int, label_names: Sequence[str] | None = None
) -> Features:
    """Texts, or pairs of texts, with a class.

    Args:
        records: as in the table above; all of them have a `text_pair`, or none.
        tokenizer: the model's.
        max_length: most tokens of a row; a longer one is cut, tokens at the end of the longer text first.
        label_names: names of the classes, such as those of the training data. `None` takes those of the records, in
            order: of integers by value, of strings (and both) by the alphabet.

    Raises:
        InputError: when a record does not fit the task, or its label is not among the names.
    """
    check(records, "classification")
    names = name_labels([record["label"] for record in records], label_names)
    rows, cut = _texts(records, tokenizer, max_length)
    indices = label_indices([str(record["label"]) for record in records], names)
    return Features(_labelled(rows, indices), names, cut)


def regression(records: Sequence[Record], tokenizer: Tokenizer, max_length: int) -> Features:
    """Texts, or pairs of texts, with a number; arguments and errors as those of `classification`."""
    check(records, "regression")
    rows, cut = _texts(records, tokenizer, max_length)
    return Features(_labelled(rows, [float(record["label"]) for record in records]), cut=cut)


def multiple_choice(records: Sequence[Record], tokenizer: Tokenizer, max_length: int) -> Features:
    """A prompt that goes on in several ways, one of which is right: every row is prompt and choice as a pair.

    Without a prompt, or with an empty one, every row is a choice alone.

    Args:
        records: as in the table above, all with as many choices.
        tokenizer: the model's.
        max_length: most tokens of a row; a longer one is cut as for `classification`.

    Raises:
        InputError: when a record does not fit the task, has fewer than two choices or another number than the first
            record, or has a label that is the index of none.
    """
    check(records, "multiple-choice")
    count = len(records[0]["choices"])
    rows, cut = [], 0
    require_room(max_length)
    for number, record in enumerate(records, 1):
        choices, label, prompt = record["choices"], record["label"], record.get("prompt")
        if len(choices) != count or count < 2:
            raise InputError(
                f"all examples must have the same number of choices, at least two, got {len(choices)} in record "
                f"{number} and {count} in the first: split the data by their number"
            )
        if not 0 <= label < count:
            raise InputError(f"label must be the index of one of {count} choices, got {label} in record {number}")
        texts, pairs = ([prompt] * count, choices) if prompt else (choices, None)
        ids, shortened = tokenizer.encode_rows(texts, pairs, max_length)
        rows.append({"input_ids": ids, "labels": label})
        cut += shortened > 0
    return Features(tuple(rows), cut=cut)


def masked_lm(records: Sequence[Record], tokenizer: Tokenizer, max_length: int, join: bool = True) -> Features:
    """Texts as rows `<s> ... </s>`. Nothing is lost but white space around lines: a long text goes on in the next row.

    Args:
        records: as in the table above. A line break in a text separates what may stand in different rows.
        tokenizer: the model's.
        max_length: most tokens of a row.
        join: whether texts that follow one another share rows, with a space between them; otherwise each has its own.

    Raises:
        InputError: when a record does not fit the task.
    """
    texts, empty = _not_empty(records, "masked-lm", max_length)
    documents = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    if join:
        documents = [[line for document in documents for line in document]]
    found = pack(encode_documents(documents, tokenizer), max_length, tokenizer.bos_token_id, tokenizer.eos_token_id)
    special = set(tokenizer.special_ids)
    rows = tuple({"input_ids": row} for row in found if not special.issuperset(row))
    return Features(rows, left_out=empty + len(found) - len(rows))


def causal_lm(records: Sequence[Record], tokenizer: Tokenizer, max_length: int) -> Features:
    """Texts, each as `<s> ... </s>`, one behind the other, cut into rows of `max_length` tokens; the last is shorter.

    Rows go on where those before them end, so they start and end anywhere in a text. A last row of one token, which is
    always `</s>`, has nothing to predict and is left out.

    Args:
        records: as in the table above.
        tokenizer: the model's.
        max_length: tokens of a row.

    Raises:
        InputError: when a record does not fit the task.
    """
    texts, empty = _not_empty(records, "causal-lm", max_length)
    encoded, _ = tokenizer.encode_rows(texts) if texts else ([], 0)
    stream = [index for row in encoded for index in row]
    found = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    rows = tuple({"input_ids": row, "labels": list(row)} for row in found if len(row) > 1)
    return Features(rows, left_out=empty + len(found) - len(rows))


# ---------------------------------------------------------------------- what several tasks need


def label_indices(labels: Iterable[str], names: Sequence[str]) -> list[int]:
    """The index of each label among the names of the classes.

    Raises:
        InputError: when a label is none of them.
    """
    index_of = {name: index for index, name in enumerate(names)}
    indices = []
    for label in labels:
        if label not in index_of:
            raise InputError(
                f"a label must be one of the known ones ({', '.join(names)}), got {label!r}: correct it, or train with "
                f"examples of it"
            )
        indices.append(index_of[label])
    return indices


def name_labels(labels: Iterable[str | int], given: Sequence[str] | None) -> tuple[str, ...]:
    """The given names of the classes, or those of the labels in order.

    Raises:
        InputError: when there are fewer than two, or one twice.
    """
    if given is None:
        found = set(labels)
        numbers = sorted(label for label in found if isinstance(label, int))
        names = [str(label) for label in numbers] if len(numbers) == len(found) else sorted({str(x) for x in found})
    else:
        names = list(given)
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"at least two different label names are needed, each once, got {', '.join(names) or 'none'}")
    return tuple(names)


def require_room(max_length: int) -> None:
    """Rows have room for something besides special tokens."""
    if max_length < LEAST_LENGTH:
        raise InputError(f"max_length must be at least {LEAST_LENGTH} tokens, got {max_length}")


def _texts(records: Sequence[Record], tokenizer: Tokenizer, max_length: int) -> tuple[list[list[int]], int]:
    require_room(max_length)
    pairs = [record.get("text_pair") for record in records]
    if None in pairs and any(pair is not None for pair in pairs):
        raise InputError(
            f"all records must have a text_pair, or none, got {pairs.count(None)} of {len(pairs)} without: complete or "
            f"remove the column"
        )
    texts = [record["text"] for record in records]
    return tokenizer.encode_rows(texts, None if None in pairs else [str(pair) for pair in pairs], max_length)


def _labelled(rows: Sequence[list[int]], labels: Sequence[float]) -> tuple[Feature, ...]:
    return tuple({"input_ids": ids, "labels": label} for ids, label in zip(rows, labels, strict=True))


def _not_empty(records: Sequence[Record], task: str, max_length: int) -> tuple[list[str], int]:
    check(records, task)
    require_room(max_length)
    texts = [record["text"] for record in records if record["text"].strip()]
    return texts, len(records) - len(texts)
