"""Features as padded batches: in a seeded order, from any position on.

What a batch holds depends on the features, the settings, the seed, and its position: the number of the epoch and its
own number in it. So a run that stops and goes on at a position sees the batches it would have seen, masks included.
Every process of a run with several makes the same batches, and takes its part of each; see `training/shares.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from roberta_pln.checks import InputError
from roberta_pln.data.evaluation import Label
from roberta_pln.data.features import Feature
from roberta_pln.data.masking import Scheme, mask_tokens
from roberta_pln.data.packing import BUCKET, fit, group, pad, side_by_side
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

Arrays = dict[str, NDArray[Any]]
"""Arguments of a model by name: int64, but float32 for the labels of a regression."""

_ORDER: Final = 0
"""Streams of randomness of an epoch: 0 is its order, and 1 + i its batch i."""


class Position(NamedTuple):
    """Where to go on. `_asdict()` is what JSON can hold, and `Position(**that)` the position again."""

    epoch: int = 0
    batch: int = 0


START: Final = Position()
"""The first batch of all."""


class Batches:
    """The batches of all epochs.

    The order of an epoch depends on the seed and the epoch only. Batches of similar lengths are drawn from rows whose
    lengths agree up to `packing.BUCKET`; all epochs have the same number of batches.

    Args:
        rows: features, such as `Features.rows`.
        pad_token_id: id of `<pad>`.
        batch_size: rows of a batch. The last batch of an epoch may have fewer.
        tokens: instead of it, most ids of a batch, padding included; a longer row is a batch by itself.
        seed: at least 0.
        shuffle: whether every epoch has an order of its own; otherwise it is that of the rows.
        by_length: whether rows of a shuffled batch have similar lengths; `tokens` needs it.
        lengths: the only lengths that batches are padded to, for programs compiled for fixed shapes (which also need
            `batch_size` and `drop_last`); each batch takes the least that is enough for its rows.
        multiple: without `lengths`, the length is the next multiple of this number.
        drop_last: leave out, in every epoch, as many rows as would not fill a batch of `batch_size`; when shuffled,
            others each time.
        pack: instead of a feature in each row, as many as fit into a row of so many ids, apart by `segment_ids`. Rows
            are then those of `batch_size`, and all have this length. Labels must be those of tokens.
        label: makes the labels of a batch while it is read, see `masker`. It draws from
            `numpy.random.default_rng([seed, epoch, 1 + batch])`.

    Raises:
        InputError: when an argument is not as above, a row is longer than all `lengths`, or there is no batch.
    """

    def __init__(
        self,
        rows: Sequence[Feature],
        pad_token_id: int,
        *,
        batch_size: int | None = None,
        tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        by_length: bool = True,
        lengths: Sequence[int] | None = None,
        multiple: int = 1,
        drop_last: bool = False,
        pack: int | None = None,
        label: Label | None = None,
    ) -> None:
        _at_least_one(batch_size=batch_size, tokens=tokens, multiple=multiple, rows=len(rows), pack=pack)
        if (batch_size is None) == (tokens is None):
            raise InputError(f"one of batch_size and tokens is needed, got {batch_size} and {tokens}")
        if tokens is not None and (drop_last or (shuffle and not by_length)):
            raise InputError("tokens makes batches of rows of similar length, all kept: leave by_length and drop_last")
        if seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.rows, self.pad_token_id = rows, pad_token_id
        self.seed, self.shuffle, self.label, self.pack = seed, shuffle, label, pack
        self._lengths, self._multiple = sorted(lengths or ()), multiple
        if pack is not None:
            _packable(rows, pack)
        # Rounded up before rows are grouped, so that groups of `tokens` have the same sizes whatever the shuffle.
        rounding = BUCKET if shuffle else 1
        sizes = [_choices(row["input_ids"]) * _next_multiple(self._width(longest(row)), rounding) for row in rows]
        self._grouping: dict[str, Any] = dict(
            lengths=sizes, tokens=tokens, rows=batch_size, by_length=by_length, drop_last=drop_last
        )
        self._order: tuple[int, list[list[list[int]]]] = (-1, [])
        if not self.order(0):
            raise InputError(
                f"drop_last needs at least {batch_size} rows, which fill a batch, got {len(rows)}: use smaller batches"
            )

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return len(self._order[1])

    def order(self, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch, each with its rows, each with the indices of its features."""
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, _ORDER]) if self.shuffle else None
            self._order = epoch, self._packed(rng) if self.pack else self._apart(rng)
        return self._order[1]

    def indices(self, position: Position) -> list[int]:
        """The indices of the features of a batch, in the order in which they stand there.

        Raises:
            InputError: when an epoch has no such batch.
        """
        return [index for row in self._places(position) for index in row]

    def _apart(self, rng: np.random.Generator | None) -> list[list[list[int]]]:
        """A feature in each row."""
        return [[[index] for index in batch] for batch in group(rng=rng, **self._grouping)]

    def _packed(self, rng: np.random.Generator | None) -> list[list[list[int]]]:
        """Several features in each row: as many rows in every epoch, since only equal lengths change places."""
        order = np.arange(len(self.rows)) if rng is None else rng.permutation(len(self.rows))
        assert self.pack is not None
        rows: dict[int, list[int]] = {}
        places = fit([len(self.rows[index]["input_ids"]) for index in order], self.pack)
        for index, (row, _) in sorted(zip(order.tolist(), places, strict=True), key=lambda pair: pair[1]):
            rows.setdefault(row, []).append(index)
        options = {**self._grouping, "lengths": [self.pack] * len(rows)}
        return [[rows[row] for row in batch] for batch in group(rng=rng, **options)]

    def _places(self, position: Position) -> list[list[int]]:
        if position.epoch < 0 or not 0 <= position.batch < len(self):
            raise InputError(
                f"a position must have an epoch of at least 0 and a batch in [0, {len(self)}), got {position}: is it "
                f"one of other data or settings?"
            )
        return self.order(position.epoch)[position.batch]

    def batch(self, position: Position) -> Arrays:
        """One batch.

        Returns:
            Arguments of a model: `input_ids` and `attention_mask` (1 token, 0 padding), both (B, T), or (B, C, T) of
            multiple choice; and the labels, padded with `IGNORE_INDEX` where they are (B, T). Where features share
            rows, `segment_ids` and `position_ids` are in the place of `attention_mask`.

        Raises:
            InputError: when an epoch has no such batch.
        """
        rows = [[self.rows[index] for index in row] for row in self._places(position)]
        if self.pack is not None:
            arrays = collate_packed(rows, self.pad_token_id, self.pack)
        else:
            apart = [row[0] for row in rows]
            arrays = collate(apart, self.pad_token_id, self._width(max(map(longest, apart))))
        if self.label is not None:
            rng = np.random.default_rng([self.seed, position.epoch, 1 + position.batch])
            arrays["input_ids"], arrays["labels"] = self.label(arrays["input_ids"], rng)
        return arrays

    def run(self, start: Position = START, epochs: int | None = None) -> Iterator[tuple[Arrays, Position]]:
        """The batches from a position on, each with the position behind it, where a run that stops here goes on.

        Args:
            start: the first batch.
            epochs: number of the epoch before which to stop; `None` goes on for ever.
        """
        position = Position(*start)
        while epochs is None or position.epoch < epochs:
            arrays, position = self.batch(position), self.behind(position)
            yield arrays, position

    def behind(self, position: Position) -> Position:
        """The position of the next batch."""
        epoch, batch = position
        return Position(epoch, batch + 1) if batch + 1 < len(self) else Position(epoch + 1)

    def _width(self, longest: int) -> int:
        if not self._lengths:
            return _next_multiple(longest, self._multiple)
        if longest > self._lengths[-1]:
            raise InputError(
                f"a row must fit into one of lengths {self._lengths}, got {longest} tokens: add a longer length, or "
                f"make features of a shorter max_length"
            )
        return next(length for length in self._lengths if longest <= length)


def masker(tokenizer: Tokenizer, rate: float, scheme: Scheme = "always", whole_words: bool = False) -> Label:
    """What hides tokens of a masked language model, see `masking.mask_tokens`.

    A row in which no token is predicted is masked once more by itself, so that every row has
    something to learn. Shorter rows are so predicted a little more often than `rate` says.

    Args:
        tokenizer: the model's.
        rate: in (0, 1].
        scheme: one of `masking.SCHEMES`.
        whole_words: whether all tokens of a word are predicted together.
    """
    starts = tokenizer.word_starts if whole_words else None
    settings = rate, tokenizer.mask_token_id, tokenizer.special_ids, scheme, tokenizer.vocab_size, starts

    def hide(ids: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        new, labels = mask_tokens(ids, rng, *settings)
        for row in np.flatnonzero((labels == IGNORE_INDEX).all(-1)):
            new[row], labels[row] = mask_tokens(ids[row], rng, *settings)
        return new, labels

    return hide


def collate(rows: Sequence[Feature], pad_token_id: int, length: int | None = None) -> Arrays:
    """Features as arrays, padded on the right.

    Args:
        rows: at least one feature; all have the same arguments.
        pad_token_id: id of `<pad>`.
        length: T; `None` is that of the longest row.

    Returns:
        Arguments of a model: `input_ids` and `attention_mask` (1 token, 0 padding), both (B, T), or (B, C, T) for
        multiple choice; what else the features hold, (B,) for numbers, or (B, T) padded with `IGNORE_INDEX` for lists.

    Raises:
        InputError: when rows have different numbers of choices.
    """
    length = max(map(longest, rows)) if length is None else length
    ids = [row["input_ids"] for row in rows]
    ones = [[[1] * len(choice) for choice in row] if _nested(row) else [1] * len(row) for row in ids]
    arrays: Arrays = {"input_ids": _pad(ids, length, pad_token_id), "attention_mask": _pad(ones, length, 0)}
    for name in rows[0].keys() - {"input_ids"}:
        values = [row[name] for row in rows]
        if isinstance(values[0], Sequence):
            arrays[name] = _pad(values, length, IGNORE_INDEX)
        else:
            arrays[name] = np.array(values, dtype=np.float32 if isinstance(values[0], float) else np.int64)
    return arrays


def collate_packed(rows: Sequence[Sequence[Feature]], pad_token_id: int, length: int) -> Arrays:
    """Features as arrays, several in each row, in which none sees another.

    Args:
        rows: for each row at least one feature; what they hold belongs to their tokens, and all hold the same.
        pad_token_id: id of `<pad>`.
        length: T, enough for every row.

    Returns:
        Arguments of a model, (B, T): `input_ids`; `segment_ids`, 1, 2, ... along each row and 0 at padding;
        `position_ids`, those that each feature has when it is alone; what else the features hold, padded with
        `IGNORE_INDEX`.
    """
    ids = [[feature["input_ids"] for feature in row] for row in rows]
    arrays = side_by_side(ids, pad_token_id, length)._asdict()
    for name in rows[0][0].keys() - {"input_ids"}:
        joined = [[value for feature in row for value in feature[name]] for row in rows]
        arrays[name] = pad(joined, length, IGNORE_INDEX)
    return arrays


def _packable(rows: Sequence[Feature], length: int) -> None:
    """Features can share rows."""
    for index, row in enumerate(rows):
        for name, value in row.items():
            if not isinstance(value, Sequence) or _nested(value):
                raise InputError(
                    f"rows that are packed hold what belongs to tokens, as masked-lm and token-classification have it, "
                    f"got {name} that does not: leave pack"
                )
        if not 1 <= len(row["input_ids"]) <= length:
            raise InputError(
                f"a feature must have from 1 to {length} tokens to be packed into a row, got "
                f"{len(row['input_ids'])} at index {index}: make features of a shorter max_length, or pack longer rows"
            )


def _pad(values: Sequence[Sequence[Any]], length: int, fill: int) -> NDArray[np.int64]:
    if _nested(values[0]):
        counts = sorted({len(value) for value in values})
        if len(counts) > 1:
            raise InputError(f"all rows of a batch must have the same number of choices, got {counts}")
        return np.stack([_pad(value, length, fill) for value in values])  # (B, C, T)
    return pad(values, length, fill)


def _nested(values: Sequence[Any]) -> bool:
    return isinstance(values[0], Sequence)


def _choices(ids: Sequence[Any]) -> int:
    return len(ids) if _nested(ids) else 1


def longest(row: Feature) -> int:
    """Tokens of a row, or of its longest choice."""
    ids = row["input_ids"]
    return max(map(len, ids)) if _nested(ids) else len(ids)


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
