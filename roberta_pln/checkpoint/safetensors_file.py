"""`model.safetensors`: header length, JSON header, raw data. The native format."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from roberta_pln.checkpoint.stored import BUFFER_DTYPES, DTYPES, CheckpointError, Contents, Stored, lying_at
from roberta_pln.names import Family

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    "F16": DTYPES["float16"],
    "I64": BUFFER_DTYPES["int64"],
    "I32": BUFFER_DTYPES["int32"],
    "I16": BUFFER_DTYPES["int16"],
    "I8": BUFFER_DTYPES["int8"],
    "U8": BUFFER_DTYPES["uint8"],
    "BOOL": BUFFER_DTYPES["bool"],
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}

_FAMILIES: Final[dict[str | None, Family]] = {
    None: "torch",  # files of the first safetensors versions
    "pt": "torch",
    "mlx": "torch",  # MLX keeps PyTorch's names and orientation
    "tf": "tf",
    "flax": "flax",
}
"""The three libraries share this file name; only the `format` in the metadata tells their files apart."""


def read(path: Path) -> Contents:
    """Open a safetensors file; the library checks the header against the size of the file."""
    try:
        file: Any = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or no safetensors file: {error}") from error
    kind = (file.metadata() or {}).get("format")
    if kind not in _FAMILIES:
        known = ", ".join(repr(name) for name in _FAMILIES if name)
        raise CheckpointError(f"the metadata of {path} must name one of the formats {known}, got {kind!r}")
    entries, start = _header(path)
    return Contents(_FAMILIES[kind], {name: _stored(path, name, entries[name], start) for name in file.keys()})  # noqa: SIM118


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, which the library has checked but does not give out whole, and where the data start."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)), 8 + size


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has type {entry['dtype']}; known are {', '.join(_DTYPES)}")
    return lying_at(path, start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write PyTorch's names, one tensor in memory at a time. Second names of tied tensors are left out.

    The bytes are those of the safetensors library: wider types first, which keeps every tensor aligned, then by name.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].bytes().data)


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files."""
    return {name: name for name in tensors}
