"""From one checkpoint to another in any format, with what lies beside it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from roberta_pln import schema
from roberta_pln.checkpoint import atomic, fairseq_dictionary, formats, shards
from roberta_pln.checkpoint.hub import TOKENIZER_FILES
from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.reading import Checkpoint, open
from roberta_pln.checkpoint.stored import DTYPES, CheckpointError, Stored
from roberta_pln.checkpoint.writing import save
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.generation import GENERATION_CONFIG_FILE

COMPANIONS: Final = (*TOKENIZER_FILES, GENERATION_CONFIG_FILE, fairseq_dictionary.VOCABULARY)
"""Files beside the weights that travel along."""


class Cast(Mapping[str, Array]):
    """A checkpoint's tensors of one head in another type, one read at each access."""

    def __init__(self, source: Checkpoint, names: Mapping[str, object], dtype: str | None) -> None:
        self.source, self.names = source, names
        self.to = None if dtype is None else DTYPES[dtype]

    def __getitem__(self, name: str) -> Array:
        array = self.source[name]
        return array if self.to is None else array.astype(self.to, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def stored(self, name: str) -> Stored:
        """The tensor's shape, type and reader in one, as writers take them."""
        kept = self.source.stored(name)
        return kept if self.to is None else Stored(kept.shape, self.to, partial(self.__getitem__, name))


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    directory: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    config: RobertaPreLayerNormConfig | None = None,
    head: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = shards.DEFAULT_SIZE,
    overwrite: bool = False,
    from_format: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a checkpoint again, in another format, type or number of files; the tensors are the same, bit for bit.

    Tensors are read and written one at a time. The config, the tokenizer's files and `generation_config.json` travel
    along.

    Args:
        source: what `checkpoint.open` takes, or an open checkpoint.
        directory: made if it is not there.
        format: one of `FORMATS`.
        config: used instead of the one beside the weights.
        head: one of `schema.HEADS`; another than the source's keeps the tensors that both have. The source's if not
            given.
        dtype: one of `config.DTYPES`; the source's if not given.
        max_shard_size: see `save`.
        overwrite: whether the directory may hold a checkpoint already.
        from_format: the format to read where the source holds several.
        progress: called with the bytes written so far and those to write.

    Returns:
        The path of the weight file, or of the index.

    Raises:
        CheckpointError: when the source is no whole checkpoint of the head, the format cannot hold it, or the
            directory holds a checkpoint already.
    """
    formats.check(format)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    opened = source if isinstance(source, Checkpoint) else open(source, config, from_format)
    config = opened.needed_config()
    chosen, head = head is not None, head or opened.head
    schema.check_head(head)
    names = _names(opened, config, head)
    if not chosen:
        _warn_of_other_heads(opened, names)
    folder = Path(directory)
    if not overwrite and folder.is_dir() and (there := formats.weight_files(folder, format)):
        raise CheckpointError(
            f"{folder} holds a checkpoint already ({', '.join(there)}), which only overwrite replaces"
        )
    written = save(
        Cast(opened, names, dtype),
        folder,
        config,
        head,
        format,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    _copy_companions(opened.path.parent, folder)
    if format == "fairseq":
        _write_dictionaries(fairseq_dictionary.written(opened.path.parent, config, head), folder)
    return written


def _names(opened: Checkpoint, config: RobertaPreLayerNormConfig, head: str) -> dict[str, Any]:
    """The head's parameters; a missing pooler is left out, as other heads are; nothing else may be missing or lost."""
    wanted = schema.expand(config, head, add_pooling_layer=any(".pooler." in name for name in opened))
    missing = [name for name in wanted if name not in opened]
    parts = {_part(name) for name in wanted}
    extra = [name for name in opened if name not in wanted and _part(name) in parts] if head == opened.head else []
    if missing or extra or opened.foreign:
        problems = [f"missing: {name}" for name in missing] + [
            f"unexpected: {name}" for name in (*extra, *opened.foreign)
        ]
        raise CheckpointError(
            f"{opened.path} is no whole {schema.architecture(head)} of its config:\n  " + "\n  ".join(problems)
        )
    return wanted


def _part(name: str) -> str:
    """The base model, or the head's module, that a parameter belongs to."""
    return name.split(".")[0]


def _warn_of_other_heads(opened: Checkpoint, names: Mapping[str, object]) -> None:
    """Say what is left out when nobody has chosen: fairseq keeps the language-model head beside a classifier."""
    others = sorted({_part(name) for name in opened} - {_part(name) for name in names})
    if others:
        warnings.warn(
            f"{opened.path} also holds {', '.join(others)}, which {schema.architecture(opened.head)} does not have and "
            "which is left out; head= chooses another",
            stacklevel=3,
        )


def _write_dictionaries(texts: Mapping[str, str], folder: Path) -> None:
    """Write those that are not there: a dictionary that is belongs to data."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            with atomic.writing(path) as file:
                file.write(text.encode("utf-8"))


def _copy_companions(source: Path, folder: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shards.refuse_link(source / name, source)
            with atomic.replacing(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)
