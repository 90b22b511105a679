"""Checkpoints of several files, with an index that says which tensor is in which: `model.safetensors.index.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from roberta_pln.checkpoint.stored import CheckpointError, Contents, Stored
from roberta_pln.config import ConfigError, read_json

DEFAULT_SIZE: Final = "5GB"
"""Largest shard where nothing else is asked for, which is transformers' default too."""

_LONGEST_NAME: Final = 200
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


# ------------------------------------------------------------------ reading


def read(index: Path, read_file: Callable[[Path], Contents]) -> Contents:
    """Open every shard; together they hold exactly the tensors that the index names, each once.

    Args:
        index: the index.
        read_file: opens one shard.

    Raises:
        CheckpointError: when the index is damaged, names files outside of its folder, or disagrees with the shards.
    """
    places = _places(index)
    tensors: dict[str, Stored] = {}
    problems = []
    for file in dict.fromkeys(places.values()):
        contents = read_file(_shard(index, file))
        wanted = {name for name, place in places.items() if place == file}
        found = {_key(wanted, name): tensor for name, tensor in contents.tensors.items()}
        problems += [f"{file} lacks {name}" for name in sorted(wanted - found.keys())]
        problems += [f"{file} holds {name} beside what the index names" for name in sorted(found.keys() - wanted)]
        tensors |= contents.tensors
    if problems:
        raise CheckpointError(f"{index} and its shards disagree:\n  " + "\n  ".join(problems))
    return Contents(contents.family, tensors)


def _places(index: Path) -> dict[str, str]:
    """Tensor to file, as the index has it."""
    try:
        values = read_json(index)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    places = values.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} must hold a weight_map from the name of each tensor to its file")
    return places


def _shard(index: Path, name: str) -> Path:
    """The path of a shard: a plain file beside the index, or where the hub's cache keeps its content."""
    path = index.parent / name
    if name in ("", ".", "..") or "\\" in name or Path(name).name != name or len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{index} may name files of its own folder only, got {name!r}")
    if not path.is_file():
        raise CheckpointError(f"{index} names {name!r}, which is not there: the checkpoint is incomplete")
    refuse_link(path, index.parent)
    return path


def refuse_link(path: Path, folder: Path) -> None:
    """Refuse a file that is not in a folder, unless the hub's cache keeps its content in another.

    Raises:
        CheckpointError: when it is a link out of the folder.
    """
    file, home = path.resolve(), folder.resolve()
    if not file.is_relative_to(home) and file.parent not in [above / "blobs" for above in home.parents]:
        raise CheckpointError(f"{path} is a link out of its folder, which is refused; put the file itself there")


def _key(wanted: set[str], name: str) -> str:
    """A tensor's name as the index has it: TensorFlow puts the model's name before it."""
    return name if name in wanted else next((key for key in wanted if key.partition("/")[2] == name), name)


# ------------------------------------------------------------------ writing


def size_in_bytes(size: int | str) -> int:
    """The number of bytes that `5GB`, `200 MiB` or a plain number means.

    Raises:
        CheckpointError: when it means none.
    """
    match = _SIZE.fullmatch(str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"a size must be a number with one of KB, MB, GB, TB, KiB, MiB, GiB, got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def split(tensors: Mapping[str, Stored], largest: int) -> list[dict[str, Stored]]:
    """The tensors in groups of at most so many bytes, in order; a larger tensor is a group of its own."""
    groups: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > largest:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def file_names(file: str, count: int, taken: set[str]) -> list[str]:
    """What some shards are called: `model-00001-of-00003.safetensors`, and otherwise where such a file is there."""
    stem, _, ending = file.partition(".")
    version = 0
    while True:
        part = f"{stem}-v{version}" if version else stem
        found = [f"{part}-{number:05}-of-{count:05}.{ending}" for number in range(1, count + 1)]
        if not taken.intersection(found):
            return found
        version += 1


def index(groups: Mapping[str, Mapping[str, Stored]], keys: Mapping[str, str]) -> str:
    """The text of an index.

    Args:
        groups: the tensors in each file.
        keys: the names in the index, and the name in the files of each.
    """
    size = sum(tensor.nbytes for group in groups.values() for tensor in group.values())
    files = {name: file for file, group in groups.items() for name in group}
    places = {key: files[name] for key, name in keys.items()}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2, sort_keys=True) + "\n"
