"""How well tokens are predicted, by a model or by a table of counts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from roberta_pln.data.corpus import Document
from roberta_pln.data.masking import mask_tokens, next_tokens
from roberta_pln.data.packing import batches, encode_documents, pack
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import MASK, Tokenizer

SEED: Final = 0
BATCH_TOKENS: Final = 4096
"""Constants of every evaluation, so that numbers of different runs can be compared."""

Predict = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]]
"""(input_ids, attention_mask), both (B, T) -> logits (B, T, V), as an array that NumPy can read."""

Batch = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""input_ids, attention_mask, labels, all (B, T). A label is what the logits at its own place should predict."""

Label = Callable[[NDArray[np.int64], np.random.Generator], tuple[NDArray[np.int64], NDArray[np.int64]]]
"""(input_ids, source of randomness) -> input_ids, labels, all (B, T)."""


@dataclass(frozen=True)
class Scores:
    """Quality of predictions."""

    accuracy: float
    """Share of the predicted tokens whose best guess is right."""
    perplexity: float
    """exp of the mean cross-entropy of the predicted tokens."""
    tokens: int
    """Number of predicted tokens."""

    def to_dict(self) -> dict[str, float]:
        """Rounded to four digits after the point, for JSON."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def masked_documents(documents: Sequence[Document], tokenizer: Tokenizer, length: int, rate: float) -> list[Batch]:
    """Documents as masked batches, the same ones at every call.

    The lines fill rows of at most `length` tokens in their order, and the rows batches of at most `BATCH_TOKENS`; batch
    i is masked with `numpy.random.default_rng([SEED, i])`, always by `<mask>`.

    Args:
        documents: lines of text, see `corpus.read_documents`.
        tokenizer: the model's.
        length: most tokens of a row, special tokens included.
        rate: probability that a token is predicted, in (0, 1].
    """

    def hide(ids: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return mask_tokens(ids, rng, rate, tokenizer.mask_token_id, tokenizer.special_ids)

    return _labelled(documents, tokenizer, length, hide)


def continued_documents(documents: Sequence[Document], tokenizer: Tokenizer, length: int) -> list[Batch]:
    """Documents as batches in which every token predicts the next one, `</s>` included.

    Rows and batches are those of `masked_documents`, so a row starts with `<s>` and without what stands before it.

    Args:
        documents: lines of text, see `corpus.read_documents`.
        tokenizer: the model's.
        length: most tokens of a row, special tokens included.
    """
    return _labelled(documents, tokenizer, length, lambda ids, rng: next_tokens(ids, tokenizer.pad_token_id))


def _labelled(documents: Sequence[Document], tokenizer: Tokenizer, length: int, label: Label) -> list[Batch]:
    rows = pack(encode_documents(documents, tokenizer), length, tokenizer.bos_token_id, tokenizer.eos_token_id)
    labelled = []
    for index, batch in enumerate(batches(rows, BATCH_TOKENS, tokenizer.pad_token_id)):
        input_ids, labels = label(batch, np.random.default_rng([SEED, index]))
        labelled.append((input_ids, (batch != tokenizer.pad_token_id).astype(np.int64), labels))
    return labelled


def evaluate(predict: Predict, labelled: Sequence[Batch]) -> Scores:
    """Score a model on labelled batches; softmax and sums are taken in float64.

    Raises:
        ValueError: when there is no batch.
    """
    if not labelled:
        raise ValueError("at least one batch is needed to score a model, got none")
    right = total = 0
    loss = 0.0
    for input_ids, attention_mask, labels in labelled:
        chosen = labels != IGNORE_INDEX
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
    """The strongest guesses of masked tokens that counting tokens allows.

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
        rows = list(rows)
        pairs = _pairs(rows, vocab_size)
        guessed = np.ones(vocab_size, dtype=bool)
        guessed[[end for row in rows for end in (row[0], row[-1])]] = False
        following = pairs * guessed  # (V, V)
        preceding = pairs * guessed[:, None]  # (V, V)
        after = np.where(following.any(1), following.argmax(1), -1)
        before = np.where(preceding.any(0), preceding.argmax(0), -1)
        return cls(int(following.sum(0).argmax()), after, before)

    def unigram_accuracy(self, masked: Sequence[Batch]) -> float:
        """Accuracy of always guessing the most frequent token."""
        return _accuracy(masked, lambda ids: np.full_like(ids, self.commonest))

    def bigram_accuracy(self, masked: Sequence[Batch], mask_token_id: int) -> float:
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


def _accuracy(masked: Sequence[Batch], guess: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> float:
    right = total = 0
    for input_ids, _, labels in masked:
        chosen = labels != IGNORE_INDEX
        right += int((guess(input_ids)[chosen] == labels[chosen]).sum())
        total += int(chosen.sum())
    return right / total


DISCOUNT: Final = 0.75
"""What is taken from the count of every pair of tokens that was seen, for those that were not."""


def next_token_baselines(rows: Iterable[Sequence[int]], vocab_size: int) -> dict[str, Predict]:
    """Log-probabilities of the next token from counts: `bigram` looks at one token, `unigram` at none.

    Bigram has interpolated Kneser-Ney smoothing. With c(v, w) the count of w behind v, n(v) the number of different
    tokens behind v, p(w) the share of w in the ends of all different pairs, and d the `DISCOUNT`:

        p(w | v) = (max(c(v, w) - d, 0) + d n(v) p(w)) / sum_u c(v, u), or p(w) where nothing stands behind v

    Unigram and p(w) count every token once more than it was seen, so that no probability is zero.

    Args:
        rows: rows `<s> ... </s>`; every token of a row but the first is a next token.
        vocab_size: V.

    Returns:
        Functions (input_ids, attention_mask), both (B, T) -> (B, T, V).

    Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2.7.
    """
    pairs = _pairs(rows, vocab_size)
    seen = pairs > 0
    lower = _shares(seen.sum(0) + 1)  # (V,)
    total = pairs.sum(1, keepdims=True)  # (V, 1)
    kept = np.maximum(pairs - DISCOUNT, 0) + DISCOUNT * seen.sum(1, keepdims=True) * lower  # (V, V)
    bigram = np.log(np.where(total > 0, kept / np.maximum(total, 1), lower))
    unigram = np.log(_shares(pairs.sum(0) + 1))
    return {
        "bigram": lambda ids, mask: bigram[ids],
        "unigram": lambda ids, mask: np.broadcast_to(unigram, (*ids.shape, vocab_size)),
    }


def _pairs(rows: Iterable[Sequence[int]], vocab_size: int) -> NDArray[np.int32]:
    """(V, V): how often the second token stands behind the first."""
    pairs = np.zeros((vocab_size, vocab_size), dtype=np.int32)
    for row in rows:
        np.add.at(pairs, (row[:-1], row[1:]), 1)
    return pairs


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts.astype(np.float64) / float(counts.sum())


# ---------------------------------------------------------------------- sentences to show

EXAMPLES: Final = 8
EXAMPLE_WORDS: Final = range(8, 21)
_WORD: Final = re.compile(r"(?<= )[a-z]{4,}\b")


class Example(TypedDict):
    """A sentence with one `<mask>`, or the start of one, and the word that stood there."""

    text: str
    answer: str


def examples(
    documents: Sequence[Document], tokenizer: Tokenizer, count: int = EXAMPLES, cut: bool = False
) -> list[Example]:
    """Sentences with one word masked (with `cut`, ended before it), chosen by a rule that knows no model.

    Of at most `count` documents at equal distances: the first line whose number of words is in `EXAMPLE_WORDS`; masked
    is, of its words of four or more small letters that are one token, the one nearest to the middle of the line. A
    document without one gives no example.
    """
    stride = max(1, len(documents) // count)
    found: list[Example] = []
    for document in documents[::stride][:count]:
        line = next((line for line in document if len(line.split()) in EXAMPLE_WORDS), "")
        words = [word for word in _WORD.finditer(line) if len(tokenizer.encode(f" {word[0]}")) == 3]
        if words:
            word = min(words, key=lambda word: abs(word.start() + word.end() - len(line)))
            before, after = line[: word.start()], line[word.end() :]
            found.append({"text": before.rstrip() if cut else f"{before}{MASK}{after}", "answer": word[0]})
    return found


def rank(predict: Predict, tokenizer: Tokenizer, example: Example) -> int:
    """How many tokens a model finds likelier than the answer; 0 is the best.

    Without `<mask>` the answer is the next token, predicted where the text ends, before its `</s>`.
    """
    batch = tokenizer(example["text"])
    logits = np.asarray(predict(batch["input_ids"], batch["attention_mask"]))[0]  # (T, V)
    masks = np.flatnonzero(batch["input_ids"][0] == tokenizer.mask_token_id)
    found = logits[masks[0] if masks.size else -2]  # (V,)
    return int((found > found[tokenizer.encode(" " + example["answer"])[1]]).sum())
