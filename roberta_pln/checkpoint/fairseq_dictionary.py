"""fairseq's dictionaries, which lie beside a checkpoint: of the vocabulary, and of the names of the classes.

A line is a symbol and how often it occurs. In a vocabulary the first line has id 4, behind `SPECIAL`; `<mask>` follows
the last line, unless it has one of its own. The first line of the classes is class 0.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final

from roberta_pln.checkpoint import shards
from roberta_pln.checkpoint.stored import CheckpointError
from roberta_pln.config import RobertaPreLayerNormConfig

VOCABULARY: Final = "dict.txt"
LABELS: Final = ("label/dict.txt", "label_dict.txt")
"""Where the names of the classes may be; the folders of fairseq's data have the first."""
INPUTS: Final = "input0/dict.txt"
"""Where a task that classifies looks for the vocabulary."""

SPECIAL: Final = ("<s>", "<pad>", "</s>", "<unk>")
MASK: Final = "<mask>"


def labels(folder: Path, count: int) -> list[str] | None:
    """The names of some classes, where there is a dictionary of them; lines that only fill it up come last.

    Raises:
        CheckpointError: when it does not name them all.
    """
    file = next((file for name in LABELS if (file := folder / name).is_file()), None)
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is no dictionary: {error}") from error
    found = [line.rstrip().rpartition(" ")[0] for line in lines[:count]]
    if len(set(found)) != count or "" in found:
        raise CheckpointError(
            f"{file} must name the {count} classes, each in a line of its own before a number, got {found}: correct it "
            "or take it away"
        )
    return found


def written(source: Path, config: RobertaPreLayerNormConfig, head: str) -> dict[str, str]:
    """The dictionaries that fairseq needs beside a checkpoint, name to text.

    The vocabulary is the one beside the source. Where there is only a tokenizer, each symbol is the token's id: so does
    fairseq's `hf_byte_bpe` name the tokens of `vocab.json` and `merges.txt`. Warns of what cannot be written.

    Args:
        source: the folder that the checkpoint comes from.
        config: the model's config.
        head: one of `schema.HEADS`.
    """
    found = {}
    vocabulary = _vocabulary(source, config.vocab_size)
    if vocabulary is not None:
        found[VOCABULARY] = vocabulary
    if head == "ForSequenceClassification":
        if vocabulary is not None:
            found[INPUTS] = vocabulary
        names = [config.id2label[index] for index in sorted(config.id2label)]
        if len(set(names)) == len(names) and all(
            name == name.strip() and len(name.splitlines()) == 1 for name in names
        ):
            found[LABELS[0]] = "".join(f"{name} 0\n" for name in names)
        else:
            warnings.warn(f"{LABELS[0]} is not written: the classes must have names of one line each", stacklevel=3)
    return found


def _vocabulary(source: Path, size: int) -> str | None:
    if (source / VOCABULARY).is_file():
        shards.refuse_link(source / VOCABULARY, source)
        return (source / VOCABULARY).read_text(encoding="utf-8")
    tokens = _tokens(source)
    if tokens is None:
        return None
    *special, mask = [tokens.get(token, -1) for token in (*SPECIAL, MASK)]
    if special != [0, 1, 2, 3] or not len(SPECIAL) <= mask < size:
        warnings.warn(
            f"{VOCABULARY} is not written: fairseq's ids of {', '.join(SPECIAL)} are 0 to 3, and that of {MASK} is "
            f"below vocab_size ({size}), but the tokenizer has {special} and {mask}",
            stacklevel=4,
        )
        return None
    lines = [MASK if index == mask else str(index) for index in range(len(SPECIAL), size)]
    return "".join(f"{symbol} 0\n" for symbol in (lines[:-1] if lines[-1] == MASK else lines))


def _tokens(source: Path) -> dict[str, int] | None:
    """Token to id, of the tokenizer in a folder."""
    try:
        if (source / "tokenizer.json").is_file():
            tokenizer: Any = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
            return {
                **tokenizer["model"]["vocab"],
                **{token["content"]: token["id"] for token in tokenizer["added_tokens"]},
            }
        if (source / "vocab.json").is_file():
            return dict(json.loads((source / "vocab.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{VOCABULARY} is not written: the tokenizer of {source} cannot be read: {error!r}", stacklevel=5)
    return None
