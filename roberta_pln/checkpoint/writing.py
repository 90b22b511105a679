"""From canonical names to a directory: one weight file or several, and the config, which change together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from roberta_pln import names, schema
from roberta_pln.checkpoint import atomic, formats, shards
from roberta_pln.checkpoint.formats import Format
from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.stored import DTYPES, CheckpointError, Stored
from roberta_pln.config import CONFIG_FILE, RobertaPreLayerNormConfig
from roberta_pln.generation import GENERATION_CONFIG_FILE, GenerationConfig


def save(
    tensors: Mapping[str, Array],
    directory: str | os.PathLike[str],
    config: RobertaPreLayerNormConfig,
    head: str,
    format: str = "safetensors",
    *,
    max_shard_size: int | str = shards.DEFAULT_SIZE,
    generation_config: GenerationConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a checkpoint under the names that transformers gives this head in this format, and its `config.json`.

    The new files take their places together or not at all, also when the process is killed or the power fails.
    Weight files of other formats are removed with that, since an older one may win when the directory is loaded.

    Args:
        tensors: canonical names to arrays, such as a `Checkpoint`; exactly those of `schema.expand`, with or
            without the pooler. They are read one at a time.
        directory: made if it is not there.
        config: written with `dtype` and `architectures` set from what is saved.
        head: one of `schema.HEADS`.
        format: one of `FORMATS`.
        max_shard_size: bytes, or a text such as `5GB`; a larger checkpoint becomes several files with an index, where
            the format knows that.
        generation_config: written to `generation_config.json`, if given.
        progress: called with the bytes written so far and those to write.

    Returns:
        The path of the weight file, or of the index.

    Raises:
        CheckpointError: when tensors are missing, unexpected, mis-shaped, or of a type the format cannot hold, or the
            disk has not enough room.
    """
    row = formats.check(format)
    outgoing = _outgoing(tensors, config, head)
    dtype = next(iter(outgoing.values())).dtype
    config = config.replace(dtype=dtype.name, architectures=[schema.architecture(head)])
    text = config.to_json_string()  # refuses what no file can hold before any is written
    said = {} if row.settings is None else {"settings": row.settings(config, head)}
    renamed, ties = _renamed(row, outgoing, config, head)
    groups = shards.split(renamed, shards.size_in_bytes(max_shard_size)) if row.shards else [renamed]

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in renamed.values())
    _check_room(folder, total)
    if row.marker and (folder / row.file).exists() and not row.there(folder / row.file):
        raise CheckpointError(f"{folder / row.file} is there already and is no checkpoint: move it, or save elsewhere")
    with atomic.changing(folder, formats.saved) as change:
        there = set(os.listdir(folder))
        sharded = len(groups) > 1
        files = shards.file_names(row.file, len(groups), there) if sharded else [row.file]
        done = 0
        for file, group in zip(files, groups, strict=True):
            with change.replacing(file) as temporary:
                own = {alias: name for alias, name in ties.items() if name in group}
                row.codec.write(temporary, group, own, head, sharded, **said)
            done += sum(tensor.nbytes for tensor in group.values())
            progress(done, total)
        if sharded:
            files.append(row.index)
            with change.writing(row.index) as stream:
                stream.write(
                    shards.index(
                        dict(zip(files, groups, strict=False)), row.codec.index_keys(renamed, ties, head)
                    ).encode()
                )
        with change.writing(CONFIG_FILE) as stream:
            stream.write(text.encode())
        if generation_config is not None:
            with change.writing(GENERATION_CONFIG_FILE) as stream:
                stream.write(generation_config.to_json_string().encode())
        change.remove(name for name in formats.weight_files(folder, format) if name not in files)
    return folder / files[-1]


def _renamed(
    row: Format, outgoing: Mapping[str, Stored], config: RobertaPreLayerNormConfig, head: str
) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors under the names of a format, and the second names of tied ones."""
    renamed = {}
    for name, tensor in outgoing.items():
        target = names.stored(row.writes, name, head)
        renamed[target.name] = tensor.transposed() if target.transposed else tensor
    if row.writes != "torch":
        return renamed, {}  # the other families have one name for each, and no constants
    dtype = next(iter(outgoing.values())).dtype
    for name, value in schema.constants(config).items():
        renamed[schema.path(name, head)] = Stored((), dtype, partial(np.array, value, dtype))
    ties = schema.ties(config, head).items()
    return renamed, {schema.path(alias, head): schema.path(name, head) for alias, name in ties}


def _check_room(folder: Path, size: int) -> None:
    """Refuse to start what would fill the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(
            f"{folder} has room for {free:,} bytes, and the checkpoint needs {size:,} beside what is there: free some, "
            f"or save elsewhere"
        )


def _outgoing(tensors: Mapping[str, Array], config: RobertaPreLayerNormConfig, head: str) -> dict[str, Stored]:
    """Check what is to be saved against the schema, without reading more than shapes and types."""
    expected = schema.expand(config, head, add_pooling_layer=any(".pooler." in name for name in tensors))
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    outgoing = {name: _as_stored(tensors, name) for name in expected if name in tensors}
    for name, tensor in outgoing.items():
        if tensor.shape != expected[name].shape:
            problems.append(f"shape of {name}: {tensor.shape} given, {expected[name].shape} in the config")
        if tensor.dtype not in DTYPES.values():
            problems.append(f"type of {name}: {tensor.dtype} given, one of {', '.join(DTYPES)} can be saved")
    if problems:
        raise CheckpointError(f"these tensors are no {head} of this config:\n  " + "\n  ".join(problems))
    return outgoing


def _as_stored(tensors: Mapping[str, Array], name: str) -> Stored:
    if hasattr(tensors, "stored"):  # a checkpoint, which knows shapes without reading
        stored: Stored = tensors.stored(name)
        return stored
    array = tensors[name]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"tensors to save are NumPy arrays, got {type(array).__name__} for {name}")
    return Stored(array.shape, array.dtype.newbyteorder("<"), partial(tensors.__getitem__, name))
