"""How well masked tokens are predicted, by a model or by a table of counts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from roberta_pln.data.corpus import Document
from roberta_pln.data.masking import mask_tokens
from roberta_pln.data.packing import batches, encode_documents, pack
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

SEED: Final = 0
BATCH_TOKENS: Final = 4096
"""Constants of every evaluation, so that numbers of different runs can be compared."""

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


def masked_documents(documents: Sequence[Document], tokenizer: Tokenizer, length: int, rate: float) -> list[Masked]:
    """Documents as masked batches, the same ones at every call.

    The lines fill rows of at most `length` tokens in their order, and the rows batches of at most `BATCH_TOKENS`; batch
    i is masked with `numpy.random.default_rng([SEED, i])`, always by `<mask>`.

    Args:
        documents: lines of text, see `corpus.read_documents`.
        tokenizer: the model's.
        length: most tokens of a row, special tokens included.
        rate: probability that a token is predicted, in (0, 1].
    """
    rows = pack(encode_documents(documents, tokenizer), length, tokenizer.bos_token_id, tokenizer.eos_token_id)
    masked = []
    for index, batch in enumerate(batches(rows, BATCH_TOKENS, tokenizer.pad_token_id)):
        rng = np.random.default_rng([SEED, index])
        input_ids, labels = mask_tokens(batch, rng, rate, tokenizer.mask_token_id, tokenizer.special_ids)
        masked.append((input_ids, (batch != tokenizer.pad_token_id).astype(np.int64), labels))
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
        guessed = np.ones(vocab_size, dtype=bool)
        for row in rows:
            np.add.at(pairs, (row[:-1], row[1:]), 1)
            guessed[[row[0], row[-1]]] = False
        following = pairs * guessed  # (V, V)
        preceding = pairs * guessed[:, None]  # (V, V)
        after = np.where(following.any(1), following.argmax(1), -1)
        before = np.where(preceding.any(0), preceding.argmax(0), -1)
        return cls(int(following.sum(0).argmax()), after, before)

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
        chosen = labels != IGNORE_INDEX
        right += int((guess(input_ids)[chosen] == labels[chosen]).sum())
        total += int(chosen.sum())
    return right / total


# ---------------------------------------------------------------------- sentences to show

EXAMPLES: Final = 8
EXAMPLE_WORDS: Final = range(8, 21)
_WORD: Final = re.compile(r"(?<= )[a-z]{4,}\b")


class Example(TypedDict):
    """A sentence with one `<mask>`, and the word that stood there."""

    text: str
    answer: str


def examples(documents: Sequence[Document], tokenizer: Tokenizer, count: int = EXAMPLES) -> list[Example]:
    """Sentences with one word masked, chosen by a rule that knows no model.

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
            found.append({"text": f"{line[: word.start()]}<mask>{line[word.end() :]}", "answer": word[0]})
    return found


def rank(predict: Predict, tokenizer: Tokenizer, example: Example) -> int:
    """How many tokens a model finds likelier than the answer; 0 is the best."""
    batch = tokenizer(example["text"])
    logits = np.asarray(predict(batch["input_ids"], batch["attention_mask"]))  # (1, T, V)
    at_mask = logits[batch["input_ids"] == tokenizer.mask_token_id][0]  # (V,)
    return int((at_mask > at_mask[tokenizer.encode(" " + example["answer"])[1]]).sum())
