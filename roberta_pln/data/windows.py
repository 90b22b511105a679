"""Token classification and question answering: a long example becomes several rows, and these one answer again.

| task | columns of a record | feature |
|---|---|---|
| `token_classification` | `words`, `labels` (as many) | `input_ids` (T,), `labels` (T,): index of a name |
| `question_answering` | `question`, `context`, `answers` as SQuAD has them, perhaps `id` | `input_ids` (T,), \
`start_positions`, `end_positions` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roberta_pln.checks import InputError
from roberta_pln.data.features import Feature, Features, label_indices, name_labels, require_room
from roberta_pln.data.records import Record, check
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

# ---------------------------------------------------------------------- a label for each word


@dataclass(frozen=True)
class WordFeatures(Features):
    """Rows of whole words, each of which is in one row."""

    owners: tuple[int, ...] = ()
    """For each row, the example it is of."""
    examples: int = 0
    """Number of examples, those without words included."""

    def word_labels(self, predictions: Sequence[ArrayLike]) -> list[list[str]]:
        """The label of every word of every example.

        Args:
            predictions: for each row the indices of the predicted classes, (T,) or longer by its padding.

        Raises:
            InputError: when there are not as many, or not as long, as the rows.
        """
        _as_many("predictions", len(predictions), len(self.rows))
        found: list[list[str]] = [[] for _ in range(self.examples)]
        for owner, row, predicted in zip(self.owners, self.rows, predictions, strict=True):
            labelled = np.flatnonzero(np.array(row["labels"]) != IGNORE_INDEX)
            chosen = _of_row("predictions", predicted, row)[labelled]
            found[owner] += [self.label_names[index] for index in chosen]
        return found


def token_classification(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int, label_names: Sequence[str] | None = None
) -> WordFeatures:
    """Words with a class each: the first token of a word carries it, its other tokens `IGNORE_INDEX`.

    Words stand with a space between them. Those of an example fill rows `<s> ... </s>` in order, so that each word is
    in one row; a word longer than a row is cut. An example without words is left out.

    Args:
        records: as in the table above.
        tokenizer: the model's.
        max_length: most tokens of a row.
        label_names: names of the classes, such as those of the training data; `None` takes those of the records, in
            the order of the alphabet.

    Raises:
        InputError: when a record does not fit the task, has an empty word, has not as many labels as words, or a label
            is not among the names.
    """
    check(records, "token-classification")
    require_room(max_length)
    for number, record in enumerate(records, 1):
        words, labels = record["words"], record["labels"]
        if len(words) != len(labels) or "" in words:
            seen = "an empty word" if "" in words else f"{len(words)} words and {len(labels)} labels"
            raise InputError(f"every word needs a label, and a character, got {seen} in record {number}: correct it")
    names = name_labels([label for record in records for label in record["labels"]], label_names)
    encode = lru_cache(maxsize=None)(lambda text: tokenizer.encode(text)[1:-1])
    rows: list[Feature] = []
    owners: list[int] = []
    cut = 0
    for number, record in enumerate(records):
        windows, too_long = _word_rows(record["words"], label_indices(record["labels"], names), encode, max_length - 2)
        for ids, marks in windows:
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            rows.append({"input_ids": ids, "labels": [IGNORE_INDEX, *marks, IGNORE_INDEX]})
            owners.append(number)
        cut += too_long
    empty = sum(not record["words"] for record in records)
    return WordFeatures(tuple(rows), names, cut, empty, tuple(owners), len(records))


def _word_rows(
    words: Sequence[str], labels: Sequence[int], encode: Any, room: int
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Ids and labels of each row of an example, and whether a word was cut."""
    rows: list[tuple[list[int], list[int]]] = []
    cut = False
    for word, label in zip(words, labels, strict=True):
        ids = encode(" " + word)
        if not rows or len(rows[-1][0]) + len(ids) > room:
            rows.append(([], []))
            ids = encode(word)
        cut = cut or len(ids) > room
        rows[-1][0].extend(ids[:room])
        rows[-1][1].extend([label] + [IGNORE_INDEX] * (len(ids[:room]) - 1))
    return rows, cut


# ---------------------------------------------------------------------- an answer in a text


class Window(NamedTuple):
    """A part of a context in a row."""

    example: int
    first: int
    """The place in the row of the first token of the context."""
    spans: list[tuple[int, int]]
    """For each token of the context that is in the row, the characters `[start, end)` it stands for."""


class Answer(NamedTuple):
    """A part of a context, `context[start:end]`; empty text is no answer."""

    text: str
    score: float
    """Sum of the logits of its first and its last token."""
    start: int
    end: int


@dataclass(frozen=True)
class AnswerFeatures(Features):
    """Windows over contexts."""

    windows: tuple[Window, ...] = ()
    """For each row, what of its context is in it."""
    contexts: tuple[str, ...] = field(default=(), repr=False)
    ids: tuple[str | int, ...] = ()
    """For each example its `id`, or its index where it has none."""

    def answers(
        self,
        start_logits: Sequence[ArrayLike],
        end_logits: Sequence[ArrayLike],
        best: int = 20,
        longest: int = 30,
        no_answer: bool = False,
    ) -> list[list[Answer]]:
        """The best answers of every example, from all its windows.

        An answer goes from a token of the context to the same or a later one; where windows overlap, the higher score
        counts. No answer scores as `<s>` does in the window where that is lowest: an answer in any window will do.

        Args:
            start_logits, end_logits: for each row (T,), or longer by its padding.
            best: most answers of an example, besides no answer.
            longest: most tokens of an answer.
            no_answer: whether there may be none; it then stands in the list of every example, last if not better.

        Returns:
            For each example its answers, best first. Without `no_answer`, the list of a context without words is empty.

        Raises:
            InputError: when the logits are not as many, or not as long, as the rows, or a number is not positive.
        """
        if best < 1 or longest < 1:
            raise InputError(f"best and longest must be at least 1, got best={best} and longest={longest}")
        _as_many("start_logits", len(start_logits), len(self.rows))
        _as_many("end_logits", len(end_logits), len(self.rows))
        scores: list[dict[tuple[int, int], float]] = [{} for _ in self.contexts]
        nothing = [np.inf] * len(self.contexts)
        for window, row, starts, ends in zip(self.windows, self.rows, start_logits, end_logits, strict=True):
            start, end = _of_row("start_logits", starts, row), _of_row("end_logits", ends, row)
            nothing[window.example] = min(nothing[window.example], float(start[0] + end[0]))
            found = scores[window.example]
            for span, score in _best_spans(window, start, end, best, longest).items():
                found[span] = max(score, found.get(span, -np.inf))
        ranked = []
        for context, found, empty in zip(self.contexts, scores, nothing, strict=True):
            some = [Answer(context[start:end], score, start, end) for (start, end), score in found.items()]
            some = sorted(some, key=lambda answer: -answer.score)[:best]
            none = [Answer("", empty, 0, 0)] if no_answer else []
            ranked.append(sorted(some + none, key=lambda answer: -answer.score))
        return ranked


def question_answering(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int, stride: int | None = None
) -> AnswerFeatures:
    """Questions about texts: windows `<s> question </s></s> part of the context </s>`.

    The positions are those of the first and the last token that share a character with the first answer. A window that
    does not hold both, and every one of an example without answer, points at position 0, `<s>`.

    Args:
        records: as in the table above; `answers` may be empty, `{"text": [], "answer_start": []}`.
        tokenizer: the model's.
        max_length: most tokens of a row. A question that takes more than half of it is cut.
        stride: how many tokens of the context a window starts behind the one before it; `None` is a quarter of
            `max_length`. What is not longer than the room for the context less `stride` is whole in some window; an
            example the answer of which is in none is counted as cut.

    Raises:
        InputError: when a record does not fit the task, an answer is not in its context at its place, or `stride` is
            not positive or would skip tokens.
    """
    check(records, "question-answering")
    require_room(max_length)
    half = (max_length - 4) // 2
    stride = max_length // 4 if stride is None else stride
    if not 1 <= stride <= max_length - 4 - half:
        raise InputError(f"stride must be from 1 to {max_length - 4 - half}, half of max_length, got {stride}")
    rows: list[Feature] = []
    windows: list[Window] = []
    cut = 0
    for number, record in enumerate(records):
        asked = tokenizer.encode(record["question"].strip())[1:-1]
        head = [tokenizer.bos_token_id, *asked[:half], tokenizer.eos_token_id, tokenizer.eos_token_id]
        ids, spans = tokenizer.encode_with_spans(record["context"])
        wanted = _answer_tokens(record, number + 1, spans)
        whole = wanted is None
        for start, end in _ranges(len(ids), max_length - 1 - len(head), stride):
            inside = wanted is not None and start <= wanted[0] and wanted[1] < end
            first, last = (token - start + len(head) for token in wanted) if wanted and inside else (0, 0)
            input_ids = [*head, *ids[start:end], tokenizer.eos_token_id]
            rows.append({"input_ids": input_ids, "start_positions": first, "end_positions": last})
            windows.append(Window(number, len(head), spans[start:end]))
            whole = whole or inside
        cut += len(asked) > half or not whole
    contexts = tuple(record["context"] for record in records)
    names = tuple(index if record.get("id") is None else record["id"] for index, record in enumerate(records))
    return AnswerFeatures(tuple(rows), cut=cut, windows=tuple(windows), contexts=contexts, ids=names)


def _answer_tokens(record: Record, number: int, spans: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token of the first answer; None without one."""
    context, answers = record["context"], record["answers"]
    places = list(zip(answers["text"], answers["answer_start"], strict=True))
    for text, start in places:
        if start < 0 or not text.strip() or context[start : start + len(text)] != text:
            raise InputError(
                f"an answer must stand in its context at answer_start, counted in characters from 0, got {text!r} at "
                f"{start}, where {context[max(start, 0) : max(start, 0) + len(text)]!r} stands, in record {number}: "
                f"correct the place"
            )
    if not places:
        return None
    text, start = places[0]
    sharing = [i for i, (left, right) in enumerate(spans) if max(left, start) < min(right, start + len(text))]
    return sharing[0], sharing[-1]


def _ranges(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Windows of `room` tokens that start `stride` apart; the last one is the first to reach the end."""
    last = max(0, -(-(tokens - room) // stride))
    return [(index * stride, min(index * stride + room, tokens)) for index in range(last + 1)]


def _best_spans(
    window: Window, start: NDArray[np.float64], end: NDArray[np.float64], best: int, longest: int
) -> dict[tuple[int, int], float]:
    """Characters and scores of the best answers in a window."""
    count = len(window.spans)
    if not count:
        return {}
    places = slice(window.first, window.first + count)
    solid = np.array([right > left for left, right in window.spans])  # a lone space is no end of an answer
    starts = np.where(solid, start[places], -np.inf)
    ends = np.concatenate([np.where(solid, end[places], -np.inf), np.full(longest - 1, -np.inf)])
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)  # (tokens, tokens behind)
    found: dict[tuple[int, int], float] = {}  # a character of several tokens gives the same answer several times
    for index in np.argsort(-scores, axis=None, kind="stable").tolist():
        score = float(scores.flat[index])
        if len(found) == best or score == -np.inf:
            break
        first, behind = divmod(index, longest)
        found.setdefault((window.spans[first][0], window.spans[first + behind][1]), score)
    return found


def _as_many(name: str, seen: int, rows: int) -> None:
    """Outputs are given for every row, in order."""
    if seen != rows:
        raise InputError(f"{name} must be those of all {rows} rows, in order, got {seen}")


def _of_row(name: str, values: ArrayLike, row: Feature) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or len(array) < len(row["input_ids"]):
        raise InputError(f"{name} of a row must be at least ({len(row['input_ids'])},), got {array.shape}")
    return array
