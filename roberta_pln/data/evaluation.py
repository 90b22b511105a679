"""How well masked tokens are predicted, by a model or by a table of counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roberta_pln.data.masking import IGNORED, mask_tokens
from roberta_pln.tokenizer import Tokenizer

Predict = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]]
"""(input_ids, attention_mask), both (B, T) -> logits (B, T, V), as an array that NumPy can read."""

Masked = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""input_ids, attention_mask, labels, all (B, T)."""


@dataclass(frozen=True)
class Scores:
    """Quality of the predictions of masked tokens."""

    accuracy: float
    """Share of the predicted tokens whose best guess is right."""
    perplexity: float
    """exp of the mean cross-entropy of the predicted tokens."""
    tokens: int
    """Number of predicted tokens."""

    def to_dict(self) -> dict[str, float]:
        """Rounded to four digits after the point, for JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def masked_batches(batches: Iterable[NDArray[np.int64]], tokenizer: Tokenizer, rate: float, seed: int) -> list[Masked]:
    """Mask batches the same way every time: always `<mask>`, batch i with `default_rng([seed, i])`."""
    masked = []
    for index, batch in enumerate(batches):
        rng = np.random.default_rng([seed, index])
        ids, labels = mask_tokens(batch, rng, rate, tokenizer.mask_token_id, tokenizer.special_ids)
        masked.append((ids, (batch != tokenizer.pad_token_id).astype(np.int64), labels))
    return masked


def evaluate(predict: Predict, masked: Sequence[Masked]) -> Scores:
    """Score a model on masked batches; softmax and sums are taken in float64.

    Raises:
        ValueError: when there is no batch.
    """
    if not masked:
        raise ValueError("at least one batch is needed to score a model, got none")
    right = total = 0
    loss = 0.0
    for input_ids, attention_mask, labels in masked:
        chosen = labels != IGNORED
        logits = np.asarray(predict(input_ids, attention_mask))[chosen].astype(np.float64)  # (M, V)
        targets = labels[chosen]  # (M,)
        highest = logits.max(-1, keepdims=True)
        normaliser = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
        loss += float((normaliser - logits[np.arange(len(targets)), targets]).sum())
        right += int((logits.argmax(-1) == targets).sum())
        total += len(targets)
    return Scores(right / total, math.exp(loss / total), total)


@dataclass(frozen=True)
class Counts:
    """The strongest guesses that counting tokens allows.

    Attributes:
        commonest: the most frequent token.
        after, before: (V,) the most frequent successor and predecessor of every token, -1 where there is none.
    """

    commonest: int
    after: NDArray[np.int64]
    before: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], vocab_size: int) -> Counts:
        """Count the tokens of rows `<s> ... </s>`; the two ends serve as neighbours and are never guessed."""
        pairs = np.zeros((vocab_size, vocab_size), dtype=np.int32)
        for row in rows:
            np.add.at(pairs, (row[:-1], row[1:]), 1)
            bos, eos = row[0], row[-1]
        single = pairs.sum(0)
        single[eos] = 0
        pairs[:, eos] = pairs[:, eos] * 0
        after = np.where(pairs.any(1), pairs.argmax(1), -1)
        pairs[bos] = 0
        before = np.where(pairs.any(0), pairs.argmax(0), -1)
        return cls(int(single.argmax()), after, before)

    def unigram_accuracy(self, masked: Sequence[Masked]) -> float:
        """Accuracy of always guessing the most frequent token."""
        return _accuracy(masked, lambda ids: np.full_like(ids, self.commonest))

    def bigram_accuracy(self, masked: Sequence[Masked], mask_token_id: int) -> float:
        """Accuracy of the most frequent successor of the left neighbour, else predecessor of the right one.

        A neighbour that is itself masked, or was never seen, tells nothing; with neither, the guess is the most
        frequent token.
        """

        def guess(ids: NDArray[np.int64]) -> NDArray[np.int64]:
            left, right = np.roll(ids, 1, axis=-1), np.roll(ids, -1, axis=-1)  # ends are never masked
            from_left = np.where(left == mask_token_id, -1, self.after[left])
            from_right = np.where(right == mask_token_id, -1, self.before[right])
            return np.where(from_left >= 0, from_left, np.where(from_right >= 0, from_right, self.commonest))

        return _accuracy(masked, guess)


def _accuracy(masked: Sequence[Masked], guess: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> float:
    right = total = 0
    for input_ids, _, labels in masked:
        chosen = labels != IGNORED
        right += int((guess(input_ids)[chosen] == labels[chosen]).sum())
        total += int(chosen.sum())
    return right / total
