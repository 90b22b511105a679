"""`orbax/`: a folder as Orbax writes it for Flax, a nested dict of arrays under Flax's names.

`_METADATA` lists the arrays. Each is in zarr's format, in a folder of its own or in one database (OCDBT) with the
others. What is written here are folders without compression, which takes no library to write or read; what Orbax
itself writes is read with tensorstore, the library that Orbax is built on. Packed numbers have no checksums, and
tensorstore makes room for as much as they announce; from strangers, other formats are better.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from roberta_pln.checkpoint import shards
from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.stored import DTYPES, CheckpointError, Contents, Stored, lying_at
from roberta_pln.config import ConfigError, read_json

METADATA: Final = "_METADATA"
"""The file by which such a folder is known."""

_DATABASE: Final = "manifest.ocdbt"
_HEADER: Final = ".zarray"
_LONGEST_NAME: Final = 250
_MOST_PACKED: Final = 100
"""How many times smaller a folder can be than its arrays; random numbers can hardly be packed at all."""
_PARAMS: Final = "params"
"""Where Flax's variables and its training state have the parameters."""
_DICT_KEY: Final = 2
"""Orbax's number for a key of a dict."""
_TYPES: Final = {"bfloat16": DTYPES["bfloat16"]} | {
    dtype.str: dtype for name, dtype in DTYPES.items() if name != "bfloat16"
}
_TYPE_NAMES: Final = {dtype: name for name, dtype in _TYPES.items()}
_FORM: Final = {"compressor": None, "filters": None, "order": "C", "zarr_format": 2}
"""What the header of an array says beside shape and type, if its numbers lie there as they are."""


# ------------------------------------------------------------------ reading


def read(path: Path) -> Contents:
    """Open a folder of Orbax; only headers are read.

    Where `params` is at the top of the tree, as in Flax's training state, that is read and all else is left out.
    """
    try:
        metadata = read_json(path / METADATA)
        leaves = [_keys(leaf) for leaf in metadata["tree_metadata"].values() if _is_array(leaf)]
    except (ConfigError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / METADATA} does not list arrays as Orbax does: {error!r}") from error
    _check_files(path)
    nested = any(keys[0] == _PARAMS for keys in leaves)
    taken = {"/".join(keys[nested:]): ".".join(keys) for keys in leaves if keys[0] == _PARAMS or not nested}
    left_out = dict.fromkeys(keys[0] for keys in leaves if nested and keys[0] != _PARAMS)
    database = (path / _DATABASE).is_file()
    plain = {} if database else {name: _plain(path / place) for name, place in taken.items()}
    others = _through_tensorstore(path, metadata, [place for name, place in taken.items() if plain.get(name) is None])
    tensors = {name: plain.get(name) or others[place] for name, place in taken.items()}
    return Contents("flax", tensors, left_out=tuple(left_out))


def _is_array(leaf: Any) -> bool:
    return not leaf["value_metadata"]["skip_deserialize"]


def _keys(leaf: Any) -> tuple[str, ...]:
    """The path of an array in the tree; joined by dots it is its place on disk."""
    keys = tuple(str(step["key"]) for step in leaf["key_metadata"])
    place = ".".join(keys)
    if not all(keys) or set(place) & set("/\\\0") or place in ("", ".", "..") or len(place) > _LONGEST_NAME:
        raise KeyError(f"{keys} is no path of names")
    return keys


def _check_files(folder: Path) -> None:
    """Refuse links out of a folder, and what is no file; all in it is of the checkpoint."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            shards.refuse_link(path, folder)
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is neither a file nor a folder, but a device or a pipe; remove it")


def _plain(folder: Path) -> Stored | None:
    """An array whose numbers lie in one file as they are; None for any other."""
    if not (folder / _HEADER).is_file():
        return None  # of zarr's version 3, perhaps
    try:
        header = read_json(folder / _HEADER)
        shape, dtype = tuple(header["shape"]), _TYPES.get(str(header["dtype"]))
        other = header["chunks"] != header["shape"] or any(header[key] != value for key, value in _FORM.items())
    except (ConfigError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _HEADER} is cut short or no header of zarr: {error!r}") from error
    if other or dtype is None:
        return None
    if not all(type(length) is int and length > 0 for length in shape):
        raise CheckpointError(f"{folder / _HEADER} gives a shape that no array has: {shape}")
    file = folder / ("/" if header.get("dimension_separator") == "/" else ".").join("0" for _ in shape)
    tensor = lying_at(file, 0, shape, dtype)
    if not file.is_file() or file.stat().st_size != tensor.nbytes:
        raise CheckpointError(
            f"{file} is cut short or not there: its array of shape {shape} needs {tensor.nbytes} bytes"
        )
    return tensor


def _through_tensorstore(path: Path, metadata: Mapping[str, Any], places: list[str]) -> dict[str, Stored]:
    """Arrays of any other form, by their places."""
    if not places:
        return {}
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            f"{path} is compressed or a database, which needs tensorstore: pip install 'roberta_pln[orbax]'"
        ) from error

    def store(place: str) -> dict[str, Any]:
        if (path / _DATABASE).is_file():
            return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.resolve()}/"}, "path": place}
        return {"driver": "file", "path": f"{path.resolve()}/{place}"}

    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    try:
        listed = tensorstore.KvStore.open(store("")).result().list().result()
        chunks = Counter(key.decode().partition("/")[0] for key in listed)
        opening = {
            place: tensorstore.open({"driver": driver, "kvstore": store(f"{place}/")}, open=True, read=True)
            for place in places
        }
        arrays: dict[str, Any] = {place: array.result() for place, array in opening.items()}
    except (ValueError, UnicodeDecodeError) as error:  # what tensorstore makes of broken files
        raise CheckpointError(f"{path} is cut short or no folder of Orbax: {error}") from error
    _check_packed(path, arrays)
    for place, array in arrays.items():
        chunk = array.chunk_layout.write_chunk.shape
        needed = math.prod(-(-length // step) for length, step in zip(array.shape, chunk, strict=True))
        if metadata.get("store_array_data_equal_to_fill_value") and chunks[place] != needed + 1:  # and a header
            raise CheckpointError(f"{path} is cut short: {place} has {chunks[place] - 1} of {needed} chunks")
    return {
        place: Stored(array.shape, array.dtype.numpy_dtype, _reader(path, place, array))
        for place, array in arrays.items()
    }


def _check_packed(path: Path, arrays: Mapping[str, Any]) -> None:
    """Refuse what Orbax cannot have packed: hardly anything that becomes very much, and numbers the other way round."""
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    needed = sum(math.prod(array.shape) * array.dtype.numpy_dtype.itemsize for array in arrays.values())
    if needed > _MOST_PACKED * held:
        raise CheckpointError(f"{path} holds {held} bytes, too few for arrays of {needed}: no weights pack so well")
    for place, array in arrays.items():
        form = array.spec().to_json()["metadata"]
        if str(form.get("dtype")).startswith(">") or '"big"' in json.dumps(form.get("codecs")):
            raise CheckpointError(f"{path}: {place} is big-endian, as Orbax never writes it; the folder may be damaged")


def _reader(path: Path, place: str, array: Any) -> Callable[[], Array]:
    def read() -> Array:
        try:
            return np.require(array.read().result(), requirements=["C", "ALIGNED"])
        except ValueError as error:
            raise CheckpointError(f"{path} is cut short: {place} cannot be read: {error}") from error

    return read


# ------------------------------------------------------------------ writing


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write a folder that Orbax restores as a nested dict of NumPy arrays, or of JAX arrays where it is given such.

    One tensor is in memory at a time.
    """
    path.mkdir()
    tree = {}
    for name, tensor in tensors.items():
        keys = name.split("/")
        folder = path / ".".join(keys)
        folder.mkdir()
        header = {"shape": tensor.shape, "chunks": tensor.shape, "dtype": _TYPE_NAMES[tensor.dtype]}
        _write_json(folder / _HEADER, {**header, **_FORM, "fill_value": None, "dimension_separator": "."})
        (folder / ".".join("0" for _ in tensor.shape)).write_bytes(tensor.bytes().data)
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    stored = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    _write_json(path / METADATA, {"tree_metadata": tree, **stored, "custom_metadata": None})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values), encoding="utf-8")


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files; a folder needs no shards."""
    return {name: name for name in tensors}
