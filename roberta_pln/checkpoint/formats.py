"""The formats on disk: what their files are called, and which module reads and writes each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from roberta_pln import names
from roberta_pln.checkpoint import (
    fairseq,
    fairseq_settings,
    flax_msgpack,
    keras_h5,
    npz,
    orbax,
    safetensors_file,
    tf_h5,
    torch_pickle,
)
from roberta_pln.checkpoint.stored import CheckpointError, Contents, Stored
from roberta_pln.config import CONFIG_FILE, RobertaPreLayerNormConfig
from roberta_pln.generation import GENERATION_CONFIG_FILE

INDEX_ENDING: Final = ".index.json"


class Codec(Protocol):
    """What the module of each format offers."""

    def read(self, path: Path) -> Contents:
        """Open one file; only its header is read."""

    def write(self, path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool) -> None:
        """Write a new file, which is whole or one shard."""

    def index_keys(self, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
        """Name in an index of shards to name in the files."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        file: what its file in a directory is called.
        endings: of its files.
        writes: whose names it uses.
        codec: the module that reads and writes it.
        shards: whether several files with an index may stand for the one.
        marker: the file by which a folder is known, where the format is a folder.
        signature: tells a file from those of other formats with the same ending.
        settings: what its file says of the model beside the tensors, a further argument of `write`; raises
            CheckpointError for a model that the format cannot hold.
        stays: whether a file stays where another format is saved beside it, since it may hold more than a model.
    """

    file: str
    endings: tuple[str, ...]
    writes: names.Family
    codec: Codec
    shards: bool = True
    marker: str = ""
    signature: Callable[[Path], bool] | None = None
    settings: Callable[[RobertaPreLayerNormConfig, str], Mapping[str, Any]] | None = None
    stays: bool = False

    @property
    def index(self) -> str:
        """What the index of its shards is called."""
        return self.file + INDEX_ENDING

    def owns(self, path: Path) -> bool:
        """Whether a path is the weight file, or folder, a shard, or an index."""
        return self.has_name(path.name) and (not self.marker or self.there(path))

    def has_name(self, name: str) -> bool:
        """Whether the weight file, or folder, a shard, or an index can be called so."""
        if self.marker:
            return name == self.file
        stem, _, ending = self.file.partition(".")
        pattern = rf"{stem}(-v\d+)?(-\d{{5}}-of-\d{{5}})?\.{re.escape(ending)}({re.escape(INDEX_ENDING)})?"
        return re.fullmatch(pattern, name) is not None

    def recognises(self, path: Path) -> bool:
        """Whether a file with one of the endings is of this format and no other."""
        return self.signature is None or self.signature(path)

    def there(self, path: Path) -> bool:
        """Whether there is a weight file, or a folder with its marker."""
        return (path / self.marker).is_file()


FORMATS: Final[dict[str, Format]] = {
    "safetensors": Format("model.safetensors", (".safetensors",), "torch", safetensors_file),
    "torch": Format("pytorch_model.bin", (".bin", ".pt", ".pth"), "torch", torch_pickle),
    "h5": Format("tf_model.h5", (".h5",), "tf", tf_h5),
    "msgpack": Format("flax_model.msgpack", (".msgpack",), "flax", flax_msgpack),
    "keras": Format("model.weights.h5", (".h5", ".keras"), "tf", keras_h5, shards=False, signature=keras_h5.is_layout),
    "orbax": Format("orbax", (), "flax", orbax, shards=False, marker=orbax.METADATA),
    "npz": Format("model.npz", (".npz",), "torch", npz),
    "fairseq": Format(
        "model.pt",
        (".pt",),
        "torch",  # the codec renames
        fairseq,
        shards=False,
        signature=fairseq.is_layout,
        settings=fairseq_settings.settings,
        stays=True,
    ),
}
"""In the order in which a directory is searched."""


def find(path: Path, format: str | None) -> tuple[str, Path]:
    """The format and the weight file, or the index, that a path stands for.

    Args:
        path: a directory, a weight file or folder, or an index.
        format: the one to look for in a directory that holds several, and of a file whose ending says nothing.

    Raises:
        FileNotFoundError: when there is no such path, or no weight file in the directory.
        CheckpointError: when the format is none of `FORMATS`, or the ending of a file is of none.
    """
    if format is not None:
        check(format)
    if path.is_file():
        return format or _format_of(path), path
    folder = next((name for name, row in FORMATS.items() if row.marker and row.there(path)), None)
    if folder is not None and format in (None, folder):
        return folder, path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}")
    wanted = FORMATS if format is None else {format: FORMATS[format]}
    files = [(name, path / file) for name, row in wanted.items() for file in (row.file, row.index)]
    found = [(name, file) for name, file in files if FORMATS[name].there(file)]
    if not found:
        looked_for = ", ".join(row.file for row in wanted.values())
        raise FileNotFoundError(f"no weight file in {path}: looked for {looked_for}, and for their indices")
    if len(found) > 1:  # a file that stays is perhaps not ours
        ours = [(name, file) for name, file in found if not FORMATS[name].stays or FORMATS[name].recognises(file)]
        found = ours or found
    if len(found) > 1:
        rest = ", ".join(file.name for _, file in found[1:])
        warnings.warn(f"{path} holds {found[0][1].name}, which is used, and also {rest}; format= decides", stacklevel=4)
    return found[0]


def check(format: str) -> Format:
    """The row of a format.

    Raises:
        CheckpointError: when it is none of `FORMATS`.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]


def weight_files(folder: Path, format: str) -> list[str]:
    """What in a folder a save in some format replaces: the weights of a model in any, with shards and indices."""
    rows = [row for name, row in FORMATS.items() if name == format or not row.stays]
    return sorted(path.name for path in folder.iterdir() if any(row.owns(path) for row in rows))


def saved(name: str) -> bool:
    """Whether a save may write, replace or remove what has that name."""
    return name in (CONFIG_FILE, GENERATION_CONFIG_FILE) or any(row.has_name(name) for row in FORMATS.values())


def _format_of(file: Path) -> str:
    stem = file.name.removesuffix(INDEX_ENDING)
    same = {name: row for name, row in FORMATS.items() if stem.endswith(row.endings)}
    for name, row in sorted(same.items(), key=lambda item: item[1].signature is None):
        if row.recognises(file):
            return name
    known = ", ".join(ending for row in FORMATS.values() for ending in row.endings)
    raise CheckpointError(f"the ending of a weight file must be one of {known}, got {file.name!r}")
