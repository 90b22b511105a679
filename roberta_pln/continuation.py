"""Continue texts with any backend."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from roberta_pln.backends import BACKENDS, choose
from roberta_pln.checkpoint import hub
from roberta_pln.tokenizer import Tokenizer

BATCH_SIZE = 8


def continue_texts(
    path: str | os.PathLike[str],
    texts: Iterable[str],
    backend: str | None = None,
    dtype: str = "float32",
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """What a decoder writes behind every text.

    Args:
        path: a checkpoint with its tokenizer: a directory or a hub id.
        texts: the beginnings, read lazily; an empty one lets the model begin.
        backend: `pt`, `tf` or `flax`; the first that is installed if not given.
        dtype: what to compute in.
        options: those of `generate`: `max_new_tokens`, `num_beams`, `do_sample`, `seed`, ...

    Yields:
        For each text its `text`, and `continuations`: a list with the `text` that is new, its number of `tokens`, and
        its `log_probability`.

    Raises:
        BackendError: when the backend is not installed.
        FileNotFoundError: when there is no checkpoint or no tokenizer.
        InputError: when the model is no decoder, the options do not fit, or a text is too long.
    """
    name = choose([backend] if backend else None)[0]
    folder = hub.find_checkpoint(path)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = BACKENDS[name].model_class("ForCausalLM").from_pretrained(folder, dtype=dtype)
    lines = iter(texts)
    while batch := list(itertools.islice(lines, BATCH_SIZE)):
        prompts = tokenizer(batch)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        open_ended = np.where(ids == tokenizer.eos_token_id, tokenizer.pad_token_id, ids)  # the text goes on
        mask = mask * (open_ended == ids)
        found = model.generate(open_ended, attention_mask=mask, return_dict_in_generate=True, **options)
        rows = np.asarray(found.sequences)[:, ids.shape[1] :]
        log_probs = np.asarray(found.log_probs, np.float64).sum(axis=1)
        lengths = [_tokens(row, tokenizer) for row in rows]
        new = [
            {"text": tokenizer.decode(row[:length]), "tokens": length, "log_probability": float(log_prob)}
            for row, length, log_prob in zip(rows, lengths, log_probs, strict=True)
        ]
        each = len(new) // len(batch)
        for index, text in enumerate(batch):
            yield {"text": text, "continuations": new[index * each : (index + 1) * each]}


def _tokens(row: np.ndarray, tokenizer: Tokenizer) -> int:
    """How many tokens come before the end."""
    ends = np.flatnonzero((row == tokenizer.eos_token_id) | (row == tokenizer.pad_token_id))
    return int(ends[0]) if ends.size else len(row)
