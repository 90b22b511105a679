"""Lines of text as rows `<s> ... </s>` of bounded length, and rows as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from roberta_pln.data.corpus import Document
from roberta_pln.tokenizer import Tokenizer

SHORT_ROWS: Final = 0.25
"""Share of the training rows that are cut off early, so that the model meets rows of every length."""
SHORTEST: Final = 8
_BUCKET: Final = 8


class Line(NamedTuple):
    """The ids of one line, as they are at the start of a row and after a space. They differ in the first word."""

    first: list[int]
    inner: list[int]


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Line]]:
    """Encode every line of every document, without special tokens."""
    return [
        [Line(tokenizer.encode(line)[1:-1], tokenizer.encode(" " + line)[1:-1]) for line in document]
        for document in documents
    ]


def pack(
    documents: Sequence[Sequence[Line]],
    length: int,
    bos_token_id: int,
    eos_token_id: int,
    rng: np.random.Generator | None = None,
) -> list[list[int]]:
    """Fill rows with lines that follow one another; no row spans two documents.

    A row takes whole lines while they fit; a line that does not fit into a row of its own is cut. With `rng`, a row is
    short with probability `SHORT_ROWS`: its length is then drawn uniformly from [SHORTEST, length], which also moves
    the borders of all rows after it, so that every pass over a text is different.

    Args:
        documents: from `encode_documents`.
        length: most ids of a row, `<s>` and `</s>` included.
        bos_token_id, eos_token_id: ids of `<s>` and `</s>`.
        rng: source of the short rows; `None` makes none.

    Returns:
        Rows of at least 3 and at most `length` ids, in the order of the text.
    """
    rows: list[list[int]] = []
    for document in documents:
        row: list[int] = []
        room = _room(length, rng)
        for line in document:
            if row and len(row) + len(line.inner) > room:
                rows.append(row)
                row, room = [], _room(length, rng)
            row = row + line.inner if row else list(line.first)
            while len(row) > length - 2:
                rows.append(row[: length - 2])
                row = row[length - 2 :]
        if row:
            rows.append(row)
    return [[bos_token_id, *row, eos_token_id] for row in rows]


def _room(length: int, rng: np.random.Generator | None) -> int:
    if rng is None or rng.random() >= SHORT_ROWS:
        return length - 2
    return int(rng.integers(min(SHORTEST, length), length + 1)) - 2


def batches(
    rows: Sequence[Sequence[int]], tokens: int, pad_token_id: int, rng: np.random.Generator | None = None
) -> Iterator[NDArray[np.int64]]:
    """Group rows of similar length into padded batches.

    Args:
        rows: from `pack`.
        tokens: most ids of a batch, padding included; a longer row is a batch of its own.
        pad_token_id: id of `<pad>`.
        rng: shuffles rows of similar length, and the batches; `None` keeps the order of the rows.

    Yields:
        Arrays (B, T) of int64.
    """
    groups = _groups([len(row) for row in rows], tokens, rng)
    for group in groups:
        width = max(len(rows[index]) for index in group)
        batch = np.full((len(group), width), pad_token_id, dtype=np.int64)  # (B, T)
        for place, index in enumerate(group):
            batch[place, : len(rows[index])] = rows[index]
        yield batch


def _groups(lengths: list[int], tokens: int, rng: np.random.Generator | None) -> list[list[int]]:
    order = np.arange(len(lengths))
    if rng is not None:
        order = rng.permutation(order)
        order = order[np.argsort(np.array(lengths)[order] // _BUCKET, kind="stable")]
    groups: list[list[int]] = []
    width = 0
    for index in order.tolist():
        width = max(width, lengths[index])
        if not groups or width * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            width = lengths[index]
        groups[-1].append(index)
    return groups if rng is None else [groups[index] for index in rng.permutation(len(groups))]
