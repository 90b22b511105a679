"""Texts of different lengths in arrays: as padded batches, or several in one row, where little is left to pad.

`pack` and `batches` are for pretraining: lines become rows `<s> ... </s>` of bounded length, and these padded batches.
`pack_sequences` puts whole sequences, which stay apart, into rows of one size for a call with `segment_ids`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roberta_pln.data.corpus import Document
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

SHORT_ROWS: Final = 0.25
"""Share of the training rows that are cut off early, so that the model meets rows of every length."""
SHORTEST: Final = 8
BUCKET: Final = 8
"""Rows whose lengths divided by this agree, rounded down, are of similar length."""


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
    for indices in group([len(row) for row in rows], rng, tokens):
        chosen = [rows[index] for index in indices]
        yield pad(chosen, max(map(len, chosen)), pad_token_id)


def pad(rows: Sequence[Sequence[int]], length: int, fill: int) -> NDArray[np.int64]:
    """Rows as one array (B, length), filled up on the right."""
    array = np.full((len(rows), length), fill, dtype=np.int64)
    for place, row in zip(array, rows, strict=True):
        place[: len(row)] = row
    return array


def group(
    lengths: Sequence[int],
    rng: np.random.Generator | None,
    tokens: int | None = None,
    rows: int | None = None,
    by_length: bool = True,
    drop_last: bool = False,
) -> list[list[int]]:
    """Which rows share a batch.

    Args:
        lengths: of the rows.
        rng: shuffles the rows and the batches; `None` keeps the order of the rows.
        tokens: most ids of a batch, padding included; a longer row is a batch of its own.
        rows: most rows of a batch.
        by_length: whether shuffled rows meet only others of similar length.
        drop_last: leave out as many rows, the last ones of the shuffled order, as would not fill a batch of `rows`.

    Returns:
        The indices of the rows of each batch.
    """
    order = np.arange(len(lengths))
    if rng is not None:
        order = rng.permutation(order)
    if drop_last and rows is not None:
        order = order[: len(order) - len(order) % rows]
    if rng is not None and by_length:
        order = order[np.argsort(np.array(lengths)[order] // BUCKET, kind="stable")]
    groups: list[list[int]] = []
    width = 0
    for index in order.tolist():
        width = max(width, lengths[index])
        if not groups or len(groups[-1]) == rows or (tokens is not None and width * (len(groups[-1]) + 1) > tokens):
            groups.append([])
            width = lengths[index]
        groups[-1].append(index)
    return groups if rng is None else [groups[index] for index in rng.permutation(len(groups))]


# ------------------------------------------------------------- several sequences in a row


class Batch(NamedTuple):
    """Arguments of a call, as in `model(**batch._asdict())`; each (rows, length) of int64."""

    input_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int64]  # 1, 2, ... along each row, 0 at padding
    position_ids: NDArray[np.int64]  # those that each sequence has when it is alone


class Place(NamedTuple):
    """Where a sequence lies: at `[row, start : start + length]` of the arrays of a batch."""

    batch: int
    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Packed:
    """Sequences in rows.

    Attributes:
        batches: arguments of the calls, all of one shape.
        places: where each sequence lies, in the order in which they were given.
    """

    batches: tuple[Batch, ...]
    places: tuple[Place, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of batches, rows of each, and length of a row."""
        return (len(self.batches), *self.batches[0].input_ids.shape)

    @property
    def fill(self) -> float:
        """The share of the places that hold tokens, in (0, 1]."""
        return sum(place.length for place in self.places) / math.prod(self.shape)

    def unpack(self, outputs: Sequence[Any]) -> list[Any]:
        """Take apart what a model returned for every token.

        Args:
            outputs: for each batch an array, or a tensor of any framework, (rows, length, ...).

        Returns:
            For each sequence, in the order in which they were given, its part (tokens, ...).

        Raises:
            ValueError: when the outputs are not those of the batches.
        """
        seen = [tuple(output.shape[:2]) for output in outputs]
        count, rows, length = self.shape
        if seen != [(rows, length)] * count:
            raise ValueError(f"outputs must be {count} of ({rows}, {length}, ...), one for each batch, got {seen}")
        return [outputs[at.batch][at.row, at.start : at.start + at.length] for at in self.places]

    def labels(self, labels: Sequence[ArrayLike]) -> list[NDArray[np.int64]]:
        """Put labels where their tokens are.

        Args:
            labels: for each sequence, in the order in which they were given, (tokens,) integers.

        Returns:
            For each batch (rows, length) of int64, `IGNORE_INDEX` at padding.

        Raises:
            ValueError: when there is not one integer for each token.
        """
        arrays = [np.asarray(some) for some in labels]
        if len(arrays) != len(self.places):
            raise ValueError(f"labels must be those of {len(self.places)} sequences, got {len(arrays)}")
        for index, (array, at) in enumerate(zip(arrays, self.places, strict=True)):
            if array.shape != (at.length,) or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"labels must be an integer for each token, ({at.length},), got {array.shape} of {array.dtype} at "
                    f"index {index}"
                )
        return list(_lay_out(arrays, self.places, self.shape, IGNORE_INDEX))


def pack_sequences(sequences: Sequence[ArrayLike], length: int, pad_token_id: int, rows: int | None = None) -> Packed:
    """Put several sequences into each row, for calls with `segment_ids`, in which none sees another.

    The longest come first, and each goes where it leaves the least room, or into a new row if it fits nowhere. This
    takes at worst about 11/9 of the fewest possible rows (Johnson et al. 1974, "Worst-case performance bounds for
    simple one-dimensional packing algorithms"), and leaves hardly any padding in many rows.

    Args:
        sequences: each (tokens,) integers, special tokens included.
        length: ids of a row. Models with relative positions allow `max_position_embeddings`; others limit the
            sequences alone.
        pad_token_id: id of `<pad>`, which is also where positions begin.
        rows: rows of every batch, the last filled up with empty ones, so that compiled code meets one shape; if not
            given, all rows are one batch.

    Raises:
        ValueError: when there are no sequences, or one is empty, longer than a row, or not of integers; or no rows.
    """
    arrays = [_checked(index, sequence, length) for index, sequence in enumerate(sequences)]
    if not arrays or (rows is not None and rows < 1):
        raise ValueError(f"at least one sequence and one row are needed, got {len(arrays)} and rows={rows}")
    fitted = fit([len(array) for array in arrays], length)
    total = 1 + max(row for row, _ in fitted)
    rows = rows or total
    places = tuple(
        Place(*divmod(row, rows), start, len(array)) for array, (row, start) in zip(arrays, fitted, strict=True)
    )
    count = -(-total // rows)
    grouped: list[list[NDArray[np.int64]]] = [[] for _ in range(count * rows)]
    for (row, _), array in sorted(zip(fitted, arrays, strict=True), key=lambda pair: pair[0]):
        grouped[row].append(array)
    batches = zip(*(np.split(array, count) for array in side_by_side(grouped, pad_token_id, length)), strict=True)
    return Packed(tuple(Batch(*batch) for batch in batches), places)


def side_by_side(rows: Sequence[Sequence[ArrayLike]], pad_token_id: int, length: int) -> Batch:
    """Sequences one behind the other, those of each row in their order.

    Args:
        rows: for each row the ids of its sequences, together at most `length`; perhaps none.
        pad_token_id: id of `<pad>`, which is also where positions begin.
        length: ids of a row.
    """
    batch = Batch(*(np.full((len(rows), length), fill, dtype=np.int64) for fill in (pad_token_id, 0, pad_token_id)))
    for number, row in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(row, 1):
            ids = np.asarray(sequence)
            at, tokens = (number, slice(start, start + len(ids))), ids != pad_token_id
            batch.input_ids[at], batch.segment_ids[at] = ids, segment
            batch.position_ids[at] = tokens.cumsum() * tokens + pad_token_id
            start += len(ids)
    return batch


def _checked(index: int, sequence: ArrayLike, length: int) -> NDArray[np.int64]:
    array = np.asarray(sequence)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(
            f"a sequence must be the ids of one text, (tokens,) integers, got {array.shape} of {array.dtype} at index "
            f"{index}"
        )
    if not 1 <= len(array) <= length:
        raise ValueError(
            f"a sequence must have from 1 to {length} tokens, the length of a row, got {len(array)} at index {index}: "
            f"leave an empty one out, cut or split a long one, or make the rows longer"
        )
    return array.astype(np.int64)


def fit(lengths: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The row and the start of each sequence, see `pack_sequences`; equal lengths in their order."""
    found = [(0, 0)] * len(lengths)
    having: defaultdict[int, list[int]] = defaultdict(list)  # rows by the room that is left in them
    rooms: list[int] = []  # keys that have rows, in order
    total = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            row, room, total = total, length, total + 1
        else:
            room = rooms[at]
            row = having[room].pop()
            if not having[room]:
                del rooms[at]
        found[index] = row, length - room
        left = room - lengths[index]
        if not having[left]:
            insort(rooms, left)
        having[left].append(row)
    return found


def _lay_out(
    values: Sequence[ArrayLike], places: Sequence[Place], shape: tuple[int, int, int], fill: int
) -> NDArray[np.int64]:
    """Values of each sequence in its place, (batches, rows, length)."""
    array = np.full(shape, fill, dtype=np.int64)
    for some, at in zip(values, places, strict=True):
        array[at.batch, at.row, at.start : at.start + at.length] = some
    return array
