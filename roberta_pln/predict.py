"""Fill `<mask>` in text with any backend."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roberta_pln.backends import BACKENDS, choose
from roberta_pln.checkpoint import hub
from roberta_pln.tokenizer import MASK, Tokenizer

BATCH_SIZE = 32


def fill_mask(
    path: str | os.PathLike[str],
    texts: Iterable[str],
    backend: str | None = None,
    top: int = 5,
    dtype: str = "float32",
) -> Iterator[dict[str, Any]]:
    """The most probable tokens for every `<mask>` of every text.

    Args:
        path: a checkpoint with its tokenizer: a directory or a hub id.
        texts: texts with at least one `<mask>`; read lazily.
        backend: `pt`, `tf` or `flax`; the first that is installed if not given.
        top: how many tokens to give for each mask.
        dtype: what to compute in.

    Yields:
        For each text its `text`, and `masks`: a list with, for each mask, the `tokens` as `token`, `id`,
        `probability` and the `text` with this mask filled.

    Raises:
        BackendError: when the backend is not installed.
        FileNotFoundError: when there is no checkpoint or no tokenizer.
        ValueError: when a text has no `<mask>` or is longer than the position table.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    name = choose([backend] if backend else None)[0]
    folder = hub.find_checkpoint(path)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = BACKENDS[name].model_class("ForMaskedLM").from_pretrained(folder, dtype=dtype)
    probe = importlib.import_module(f"roberta_pln.{name}.probe")
    lines = iter(texts)
    while batch := list(itertools.islice(lines, BATCH_SIZE)):
        inputs = encode(tokenizer, batch, model.config.max_sequence_length)
        logits = probe.run(model, inputs, gradients=False)["logits"]
        for text, ids, row in zip(batch, inputs["input_ids"], logits, strict=True):
            masks = np.flatnonzero(ids == tokenizer.mask_token_id)
            yield {"text": text, "masks": [_filled(tokenizer, text, n, row[at], top) for n, at in enumerate(masks)]}


def encode(tokenizer: Tokenizer, texts: list[str], max_length: int | None = None) -> dict[str, NDArray[np.int64]]:
    """The model's inputs for some texts.

    Raises:
        ValueError: when a text has no `<mask>`, or is longer than `max_length` tokens.
    """
    for text in texts:
        if MASK not in text:
            raise ValueError(f"a text must hold {MASK} where a token is to be filled in, got {text!r}")
    return tokenizer(texts, max_length=max_length)


def most_probable(logits: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Ids and probabilities of the largest logits (V,), most probable first; equal ones by id."""
    scores = np.asarray(logits, np.float64)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(int(index), float(probabilities[index])) for index in order]


def _filled(tokenizer: Tokenizer, text: str, number: int, logits: np.ndarray, top: int) -> dict[str, Any]:
    pieces = text.split(MASK)
    before, after = MASK.join(pieces[: number + 1]), MASK.join(pieces[number + 1 :])
    tokens = []
    for index, probability in most_probable(logits, top):
        token = tokenizer.decode([index], skip_special_tokens=False)
        filled = before.rstrip() + token + after  # <mask> takes the space before it along, as the tokenizer does
        tokens.append({"token": token, "id": index, "probability": probability, "text": filled})
    return {"tokens": tokens}
