"""`pytorch_model.bin`: a pickle of names to tensors, read and written without PyTorch and without running anything.

A pickle is a program, so this reader gives it nothing to call: each name it may ask for becomes an inert stand-in,
every other name is refused. The tensors' bytes lie outside the pickle, and are mapped into memory from there.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from roberta_pln.checkpoint import plain_pickle, zipped
from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.stored import (
    BUFFER_DTYPES,
    DTYPES,
    CheckpointError,
    Contents,
    Stored,
    lying_at,
)

_STORAGES: Final[dict[str, np.dtype[Any]]] = {
    "DoubleStorage": DTYPES["float64"],
    "FloatStorage": DTYPES["float32"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "HalfStorage": DTYPES["float16"],
    "LongStorage": BUFFER_DTYPES["int64"],
    "IntStorage": BUFFER_DTYPES["int32"],
    "ShortStorage": BUFFER_DTYPES["int16"],
    "CharStorage": BUFFER_DTYPES["int8"],
    "ByteStorage": BUFFER_DTYPES["uint8"],
    "BoolStorage": BUFFER_DTYPES["bool"],
}
_STORAGE_NAMES: Final = {dtype: name for name, dtype in _STORAGES.items()}

# The form before PyTorch 1.6: three small pickles, the object, the keys of its storages, then their bytes.
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001

_MOST_AXES: Final = 32


# ------------------------------------------------------------------ what a pickle may make


class _StorageType(NamedTuple):
    dtype: np.dtype[Any]


class _Storage(NamedTuple):
    dtype: np.dtype[Any]
    key: str
    size: int  # elements


class Tensor(NamedTuple):
    """What a pickle says of a tensor."""

    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    def split(self, count: int) -> list[Tensor]:
        """Equal parts of its rows, as tensors in the same storage."""
        rows, rest = divmod(self.shape[0], count) if self.shape else (0, 1)
        if rest:
            raise CheckpointError(f"a tensor of shape {self.shape} has no {count} equal parts")
        step = rows * self.strides[0]
        return [self._replace(offset=self.offset + part * step, shape=(rows, *self.shape[1:])) for part in range(count)]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> Tensor:
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and (offset, *shape, *strides)
    good = sizes and all(type(size) is int and size >= 0 for size in sizes) and len(shape) == len(strides) <= _MOST_AXES
    if not isinstance(storage, _Storage) or not good:
        raise CheckpointError("a tensor needs storage, and an offset, shape and strides of numbers of 0 or more")
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


_STAND_INS: Final[dict[tuple[str, str], object]] = {
    ("collections", "OrderedDict"): plain_pickle.OrderedDict,
    ("argparse", "Namespace"): plain_pickle.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}
"""Every name that a pickle may ask for, and what it gets."""


class _Unpickler(plain_pickle.Unpickler):
    """Gives out the stand-ins, and looks nothing up.

    Attributes:
        storages: those that the pickle has named, by key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _STAND_INS:
            raise CheckpointError(
                f"the pickle asks for {module}.{name}, which is refused: a checkpoint holds names and tensors only. "
                "Save its state_dict alone"
            )
        return _STAND_INS[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(size), *rest) if size >= 0 and not any(rest):
                storage = _Storage(dtype, key, size)
                if self.storages.setdefault(key, storage) == storage:
                    return storage
        raise CheckpointError("the pickle names a storage in none of PyTorch's forms, or two storages alike")


def _unpickle(path: Path, file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    unpickler = _Unpickler(file)
    try:
        return unpickler.load(), unpickler.storages
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # the pickle module raises whatever a broken stream leads to
        raise CheckpointError(f"{path} is cut short or no PyTorch checkpoint: {error!r}") from error


# ------------------------------------------------------------------ reading


def read(path: Path) -> Contents:
    """Open a file whose pickle is a dict of names and tensors."""
    state, places = load(path)
    return Contents("torch", stored(path, state_dict(path, state), places))


def load(path: Path) -> tuple[Any, Places]:
    """What a file's pickle holds, with stand-ins for tensors, and where their bytes are. A Namespace becomes a dict."""
    return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)


def state_dict(path: Path, value: object) -> dict[str, Tensor]:
    """A value that `load` gave, if it is a dict of names and tensors."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a dict of names and tensors, got {type(value).__name__}")
    tensors = {}
    for name, tensor in dict.items(value):  # not value.items(), which is an attribute
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} must hold names and tensors only, but {name!r} is a {type(tensor).__name__}; "
                "save its state_dict alone"
            )
        tensors[name] = tensor
    return tensors


def stored(path: Path, tensors: Mapping[str, Tensor], places: Places) -> dict[str, Stored]:
    """The tensors as they lie in the file, checked against the bytes that are there."""
    return {name: _stored(path, name, tensor, places) for name, tensor in tensors.items()}


Places = dict[str, tuple[int, int]]
"""Where the bytes of each storage start in the file, and how many they are."""


def _read_zip(path: Path) -> tuple[Any, Places]:
    members = zipped.places(path, ("/data.pkl", "/byteorder"))
    if len({name.partition("/")[0] for name in members}) > 1:
        raise CheckpointError(f"{path} holds several folders, so it is no PyTorch checkpoint")
    places = {name.partition("/")[2]: place for name, place in members.items()}
    if "data.pkl" not in places:
        raise CheckpointError(f"{path} is a zip file without data.pkl, so no PyTorch checkpoint")
    with path.open("rb") as file:
        if "byteorder" in places and _bytes_at(file, *places["byteorder"]) != b"little":
            raise CheckpointError(f"{path} is not little-endian; save it again on a little-endian machine")
        state, _ = _unpickle(path, BytesIO(_bytes_at(file, *places["data.pkl"])))
    return state, {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _read_legacy(path: Path) -> tuple[Any, Places]:
    with path.open("rb") as file:
        start = [_unpickle(path, file)[0] for _ in range(2)]
        system, _ = _unpickle(path, file) if start == [_LEGACY_MAGIC, _LEGACY_PROTOCOL] else (None, None)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(f"{path} is no PyTorch checkpoint of a little-endian machine")
        state, storages = _unpickle(path, file)
        keys, _ = _unpickle(path, file)
        texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not texts or sorted(keys) != sorted(storages):
            raise CheckpointError(f"{path}: the storages in the file are not those that its tensors name")
        places = {}
        for key in keys:  # each is its number of elements, then they
            size = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
            places[key] = file.tell(), size
            if file.tell() + size > path.stat().st_size:
                raise CheckpointError(f"{path} is cut short: it ends before its last tensor")
            file.seek(size, os.SEEK_CUR)
    return state, places


def _stored(path: Path, name: str, tensor: Tensor, places: Places) -> Stored:
    """Check a tensor against the bytes that are there, before any memory is taken."""
    storage, offset, shape, strides = tensor
    start, size = places.get(storage.key, (0, -1))
    if size != storage.size * storage.dtype.itemsize:
        raise CheckpointError(f"{path}: {name!r} needs {storage.size} x {storage.dtype} in storage {storage.key!r}")
    elements = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if elements > storage.size or (elements and last >= storage.size):
        raise CheckpointError(f"{path}: {name!r} of shape {shape} does not fit into its {storage.size} elements")
    if elements and _overlaps(shape, strides):
        raise CheckpointError(f"{path}: {name!r} uses numbers more than once; save its contiguous() form")

    identity = (storage.key, offset, shape, strides)
    whole = zip(shape, strides, _strides(shape), strict=True)
    if not elements or all(length == 1 or stride == usual for length, stride, usual in whole):
        return lying_at(path, start + offset * storage.dtype.itemsize, shape, storage.dtype, identity)
    return Stored(shape, storage.dtype, partial(_strided, path, start, tensor), identity)


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements are one number, as in an expanded tensor, or in a file with a damaged stride."""
    reach = 0
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride <= reach:
            return True
        reach += (length - 1) * stride
    return False


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a tensor that lies in one piece, in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _strided(path: Path, start: int, tensor: Tensor) -> Array:
    """Read a tensor that does not."""
    storage, offset, shape, strides = tensor
    flat = np.memmap(path, storage.dtype, "r", offset=start, shape=(storage.size,))
    steps = [stride * storage.dtype.itemsize * (length > 1) for length, stride in zip(shape, strides, strict=True)]
    return np.array(np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False), order="C")


# ------------------------------------------------------------------ writing


class _Global(NamedTuple):
    module: str
    name: str


class Entry(NamedTuple):
    """A tensor in an object to write, and the key of its storage; tied ones have the same."""

    key: str
    tensor: Stored


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write names and tensors; a tied tensor is stored once and has both names."""
    entries = {name: Entry(str(index), tensor) for index, (name, tensor) in enumerate(tensors.items())}
    write_object(path, entries | {alias: entries[name] for alias, name in ties.items()})


def write_object(path: Path, value: object) -> None:
    """Write dicts, lists, plain values and entries in the zip form, one tensor in memory at a time."""
    entries = {entry.key: entry for entry in _entries(value)}
    with path.open("xb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", b"\x80\x02" + _pickled(value) + b".")  # protocol 2, the object, stop
        _add(archive, "byteorder", b"little")
        for key, entry in entries.items():
            _add(archive, f"data/{key}", entry.tensor.bytes().data)
        _add(archive, "version", b"3\n")


def _entries(value: object) -> Iterator[Entry]:
    if isinstance(value, Entry):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _entries(item)


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    archive.writestr(zipped.aligned(archive, f"pytorch_model/{name}"), data)  # storages begin at multiples of 64


def _tensor(key: str, tensor: Stored) -> bytes:
    """The opcodes that rebuild one tensor."""
    size = math.prod(tensor.shape)
    storage = ("storage", _Global("torch", _STORAGE_NAMES[tensor.dtype]), key, "cpu", size)
    arguments = (
        _pickled(storage)
        + b"Q"
        + b"".join(map(_pickled, (0, tensor.shape, _strides(tensor.shape), False, OrderedDict())))
    )
    return _pickled(_Global("torch._utils", "_rebuild_tensor_v2")) + b"(" + arguments + b"tR"


def _pickled(value: object) -> bytes:
    """The opcodes that push one value: for containers the empty one, a mark, what is in it, and that it be put in."""
    match value:
        case _Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Entry():
            return _tensor(*value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_pickled, value)) + b"e"
        case dict():
            empty = _pickled(_Global("collections", "OrderedDict")) + b")R" if isinstance(value, OrderedDict) else b"}"
            items = b"".join(_pickled(item) for pair in value.items() for item in pair)
            return empty + b"(" + items + b"u" if items else empty
    raise TypeError(f"no opcode for {type(value).__name__}")


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files."""
    return {name: name for name in tensors} | dict(ties)
