"""`pytorch_model.bin`: a pickle of names to tensors, read and written without PyTorch and without running anything.

A pickle is a program, so this reader gives it nothing to call: each name it may ask for becomes an inert stand-in,
every other name is refused. The tensors' bytes lie outside the pickle, and are mapped into memory from there.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from roberta_pln.checkpoint import atomic
from roberta_pln.checkpoint.stored import BUFFER_DTYPES, DTYPES, Array, CheckpointError, Contents, Stored

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


# ------------------------------------------------------------------ what a pickle may make

# Named tuples, because a pickle can set attributes on every object that has any.


class _StorageType(NamedTuple):
    dtype: np.dtype[Any]


class _Storage(NamedTuple):
    dtype: np.dtype[Any]
    key: str
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> _Tensor:
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and (offset, *shape, *strides)
    good = sizes and all(type(size) is int and size >= 0 for size in sizes) and len(shape) == len(strides)
    if not isinstance(storage, _Storage) or not good:
        raise CheckpointError(f"a tensor needs storage and sizes, got {storage!r}, {offset!r}, {shape!r}, {strides!r}")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


def _ordered_dict() -> type:
    return type("OrderedDict", (dict,), {})  # has attributes, since state dicts carry `_metadata`


_STAND_INS: Final[dict[tuple[str, str], Callable[[], object]]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda: partial(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): lambda: partial(_rebuild_parameter),
    **{("torch", name): partial(_StorageType, dtype) for name, dtype in _STORAGES.items()},
}
"""Every name that a pickle may ask for, and what makes it a fresh stand-in, so that no load can change the next."""


class _Unpickler(pickle.Unpickler):
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
        return _STAND_INS[module, name]()

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(size), *rest) if size >= 0 and not any(rest):
                storage = _Storage(dtype, key, size)
                if self.storages.setdefault(key, storage) == storage:
                    return storage
        raise CheckpointError(f"the pickle names a storage as {pid!r}, which is none of PyTorch's forms")


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
    """Open a pickle of either form; tensors are read from the file mapped into memory."""
    state, places = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a dict of names to tensors, got {type(state).__name__}")
    tensors = {}
    for name, tensor in dict.items(state):  # not state.items(), which is an attribute
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise CheckpointError(
                f"{path} must hold names and tensors only, but {name!r} is a {type(tensor).__name__}; "
                "save its state_dict alone"
            )
        tensors[name] = _stored(path, name, tensor, places)
    return Contents("torch", tensors)


_Places = dict[str, tuple[int, int]]
"""Where the bytes of each storage start in the file, and how many they are."""


def _read_zip(path: Path) -> tuple[Any, _Places]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries:
                raise CheckpointError(f"{path} is a zip file without data.pkl, so no PyTorch checkpoint")
            places = {name: _place(path, file, entry) for name, entry in entries.items()}
            if "byteorder" in entries and _bytes_at(file, *places["byteorder"]) != b"little":
                raise CheckpointError(f"{path} is not little-endian; save it again on a little-endian machine")
            state, _ = _unpickle(path, BytesIO(_bytes_at(file, *places["data.pkl"])))
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeError, OSError) as error:
        raise CheckpointError(f"{path} is cut short or no PyTorch checkpoint: {error}") from error
    return state, {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}


def _place(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where an entry's bytes are, which the directory at the end of a zip file leaves to the entry's own header."""
    signature, name_size, extra_size = struct.unpack("<4s22xHH", _bytes_at(file, entry.header_offset, 30))
    start = entry.header_offset + 30 + name_size + extra_size
    if signature != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(f"{path}: {entry.filename} must be stored without compression or encryption")
    if start + entry.file_size > path.stat().st_size:
        raise CheckpointError(f"{path} is cut short: {entry.filename} runs past its end")
    return start, entry.file_size


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _read_legacy(path: Path) -> tuple[Any, _Places]:
    with path.open("rb") as file:
        start = [_unpickle(path, file)[0] for _ in range(2)]
        system, _ = _unpickle(path, file) if start == [_LEGACY_MAGIC, _LEGACY_PROTOCOL] else (None, None)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError(f"{path} is no PyTorch checkpoint of a little-endian machine")
        state, storages = _unpickle(path, file)
        keys, _ = _unpickle(path, file)
        if not isinstance(keys, list) or set(keys) != set(storages):
            raise CheckpointError(f"{path}: the storages in the file are not those that its tensors name")
        places = {}
        for key in keys:  # each is its number of elements, then they
            count = int.from_bytes(file.read(8), "little")
            places[key] = file.tell(), count * storages[key].dtype.itemsize
            file.seek(places[key][1], os.SEEK_CUR)
        if file.tell() > path.stat().st_size:
            raise CheckpointError(f"{path} is cut short: it ends before its last tensor")
    return state, places


def _stored(path: Path, name: str, tensor: _Tensor, places: _Places) -> Stored:
    """Check a tensor against the bytes that are there, before any memory is taken."""
    storage, offset, shape, strides = tensor
    start, size = places.get(storage.key, (0, -1))
    if size != storage.size * storage.dtype.itemsize:
        raise CheckpointError(f"{path}: {name!r} needs {storage.size} x {storage.dtype} in storage {storage.key!r}")
    elements = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if elements > storage.size or (elements and last >= storage.size):
        raise CheckpointError(f"{path}: {name!r} of shape {shape} does not fit into its {storage.size} elements")

    def read() -> Array:
        if not elements:
            return np.zeros(shape, storage.dtype)
        flat = np.memmap(path, storage.dtype, "r", offset=start, shape=(storage.size,))
        steps = [stride * storage.dtype.itemsize * (length > 1) for length, stride in zip(shape, strides, strict=True)]
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
        return np.require(view, requirements=["C", "ALIGNED", "ENSUREARRAY"])

    return Stored(shape, storage.dtype, read, (storage.key, offset, shape, strides))


# ------------------------------------------------------------------ writing

_ALIGNMENT: Final = 64
"""Of every storage in the file, as PyTorch has it, so that they can be mapped."""


class _Global(NamedTuple):
    module: str
    name: str


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> None:
    """Write the zip form, one tensor in memory at a time; a tied tensor is stored once and has both names."""
    keys = {name: str(index) for index, name in enumerate(tensors)}
    entries = {name: _tensor(tensors[name], keys[name]) for name in tensors}
    entries |= {alias: entries[name] for alias, name in ties.items()}
    items = b"".join(_pickled(name) + entry for name, entry in entries.items())
    with atomic.writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", b"\x80\x02}(" + items + b"u.")  # protocol 2, empty dict, mark, items, set, stop
        _add(archive, "byteorder", b"little")
        for name, tensor in tensors.items():
            _add(archive, f"data/{keys[name]}", tensor.bytes().data)
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"pytorch_model/{name}")  # dated 1980, so that equal tensors give equal files
    used = archive.start_dir + 30 + len(entry.filename) + 4
    padding = -used % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # the field that PyTorch pads with
    archive.writestr(entry, data)


def _tensor(tensor: Stored, key: str) -> bytes:
    """The opcodes that rebuild one tensor."""
    strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    size = math.prod(tensor.shape)
    storage = ("storage", _Global("torch", _STORAGE_NAMES[tensor.dtype]), key, "cpu", size)
    hooks = _pickled(_Global("collections", "OrderedDict")) + b")R"  # called without arguments
    arguments = _pickled(storage) + b"Q" + b"".join(map(_pickled, (0, tensor.shape, strides, False))) + hooks
    return _pickled(_Global("torch._utils", "_rebuild_tensor_v2")) + b"(" + arguments + b"tR"


def _pickled(value: object) -> bytes:
    """The opcodes that push one plain value."""
    match value:
        case _Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
    raise TypeError(f"no opcode for {type(value).__name__}")
