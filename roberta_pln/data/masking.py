"""The tokens that a language model has to predict: those hidden from a masked one, the next ones for a causal one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from roberta_pln.numerics import IGNORE_INDEX

SCHEMES: Final = ("always", "80-10-10")
Scheme = Literal["always", "80-10-10"]


def mask_tokens(
    input_ids: NDArray[Any],
    rng: np.random.Generator,
    rate: float,
    mask_token_id: int,
    special_ids: Collection[int],
    scheme: Scheme = "always",
    vocab_size: int | None = None,
    word_starts: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hide a random part of the tokens, or of the words.

    Every token that is not special is predicted with probability `rate`, independently of the others. If that picks
    none, one of them is picked uniformly, so a batch always has a label.

    With `word_starts` the same holds for whole words, the tokens of which are predicted together: every word is picked
    with probability `rate`, whatever its length, so that every token, too, is predicted with this probability. If that
    picks none, the word of a uniformly picked token is. A word goes on until, along the last axis, a token begins the
    next one or a special token stands.

    A predicted token is then replaced, each for itself:

    - `"always"`: by `<mask>` (Wettig et al. 2023, "Should You Mask 15% in Masked Language Modeling?");
    - `"80-10-10"`: by `<mask>` with probability 0.8, by a token drawn uniformly from the vocabulary less the special
      ids with probability 0.1, and kept otherwise (Devlin et al. 2019, section 3.1).

    Args:
        input_ids: integers of any shape, usually (B, T); not changed.
        rng: the only source of randomness. Draws, in this order: one uniform number per id, of which a word uses that
            of its first token; one integer, only if none was picked; for `"80-10-10"` one uniform number per id, then
            one integer per id.
        rate: in (0, 1].
        mask_token_id: id of `<mask>`.
        special_ids: ids that are never predicted; must hold `<pad>`, `<s>` and `</s>`.
        scheme: one of `SCHEMES`.
        vocab_size: number of ids; only `"80-10-10"` needs it.
        word_starts: (V,), whether an id begins a word, as `Tokenizer.word_starts` has it; `None` for single tokens.

    Returns:
        The new ids and the labels, int64, both of the shape of `input_ids`. Labels are the old ids where a token is
        predicted and `IGNORE_INDEX` elsewhere.

    Raises:
        ValueError: when `rate` or `scheme` is not as above, when all ids are special, or when `"80-10-10"` has no
            `vocab_size` or no id that is not special.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    ids = np.array(input_ids, dtype=np.int64)
    special = np.array(sorted(special_ids), dtype=np.int64)
    candidates = ~np.isin(ids, special)
    if not candidates.any():
        raise ValueError("at least one token must not be special, or nothing can be predicted")

    unit = np.arange(ids.size).reshape(ids.shape) if word_starts is None else _words(ids, candidates, word_starts)
    predicted = candidates & (rng.random(ids.size)[unit] < rate)
    if not predicted.any():
        predicted = candidates & (unit == unit.flat[rng.choice(np.flatnonzero(candidates))])
    labels = np.where(predicted, ids, IGNORE_INDEX)
    if scheme == "always":
        return np.where(predicted, mask_token_id, ids), labels

    if vocab_size is None:
        raise ValueError("scheme '80-10-10' draws random tokens: pass vocab_size")
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    if not ordinary.size:
        raise ValueError(f"at least one of the {vocab_size} ids must not be special to draw random tokens")
    fate = rng.random(ids.shape)
    drawn = rng.choice(ordinary, size=ids.shape)
    replaced = np.where(fate < 0.8, mask_token_id, np.where(fate < 0.9, drawn, ids))
    return np.where(predicted, replaced, ids), labels


def _words(ids: NDArray[np.int64], ordinary: NDArray[np.bool_], starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each id the index, in the flat array, of the first token of its word."""
    before = np.zeros_like(ordinary)
    before[..., 1:] = ordinary[..., :-1]  # a word ends at a special token and at the end of a row
    first = starts[ids] | ~before | ~ordinary
    return np.maximum.accumulate(np.where(first, np.arange(ids.size).reshape(ids.shape), 0), axis=-1)


def next_tokens(input_ids: NDArray[Any], pad_token_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Let every token predict the one behind it, unless that is padding.

    Args:
        input_ids: (B, T) integers; not changed.
        pad_token_id: id of `<pad>`.

    Returns:
        The same ids and the labels, int64, both (B, T). Each label is the next id, and stands where that is predicted;
        it is `IGNORE_INDEX` before padding and in the last column. (A model's own argument `labels` is not shifted.)
    """
    ids = np.array(input_ids, dtype=np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = np.where(ids[:, 1:] == pad_token_id, IGNORE_INDEX, ids[:, 1:])
    return ids, labels
