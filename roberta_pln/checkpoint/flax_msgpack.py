"""`flax_model.msgpack`: nested maps of names, with every array as a MessagePack extension of type 1.

The payload of such an extension is itself MessagePack: [shape, name of the type, bytes in C order]. An array that is
too large for one is a map of a mark, its shape, and pieces of it. Only these few forms are read and written, which
needs no library, and leaves the arrays in the file until they are asked for.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeVar

import numpy as np

from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.stored import BUFFER_DTYPES, DTYPES, CheckpointError, Contents, Stored, lying_at

_DTYPES: Final = {**DTYPES, **BUFFER_DTYPES}
_ARRAY_TYPE: Final = 1
LARGEST: Final = 2**30
"""Bytes of an array above which Flax stores it in pieces of at most so many."""
_IN_PIECES: Final = "__msgpack_chunked_array__"
_TRUE: Final = b"\xc3"
_DEEPEST: Final = 32
Value = TypeVar("Value")


class _Form(NamedTuple):
    """How MessagePack starts a value: a byte that holds its length, or one that says how wide the length is."""

    name: str
    first: int  # byte for length 0, where short lengths are part of the byte
    short: int  # number of such bytes
    wide: dict[int, int]  # byte: bytes of the length that follow


_MAP: Final = _Form("map", 0x80, 16, {0xDE: 2, 0xDF: 4})
_LIST: Final = _Form("list", 0x90, 16, {0xDC: 2, 0xDD: 4})
_TEXT: Final = _Form("text", 0xA0, 32, {0xD9: 1, 0xDA: 2, 0xDB: 4})
_BYTES: Final = _Form("bytes", 0, 0, {0xC4: 1, 0xC5: 2, 0xC6: 4})
_COUNT: Final = _Form("count", 0x00, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})
_EXTENSION: Final = _Form("extension", 0, 0, {0xC7: 1, 0xC8: 2, 0xC9: 4})
_SIXTEEN: Final = 0xD8
"""An extension of 16 bytes, the only fixed size that an array can have: the smallest needs 15."""


# ------------------------------------------------------------------ reading


def read(path: Path) -> Contents:
    """Open a MessagePack file; arrays are read from the file mapped into memory."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is cut short: it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Contents("flax", _Reader(path, data).tensors())


class _Reader:
    """Walks over a file, stepping over the arrays' bytes."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def tensors(self) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        for name, tensor in self._map("", 0):
            if name in tensors:
                raise self._error(f"{name!r} is there twice")
            tensors[name] = tensor
        if self.position != len(self.data):
            raise self._error("bytes follow the end of the map")
        return tensors

    def _map(self, prefix: str, depth: int) -> Iterator[tuple[str, Stored]]:
        if depth > _DEEPEST:
            raise self._error(f"maps are nested more than {_DEEPEST} deep")
        length = self._length(_MAP)
        for number in range(length):
            name = prefix + (key := self._text())
            if key == _IN_PIECES and (number, length) == (0, 3):
                yield prefix.removesuffix("/"), self._joined(prefix)
                return
            code = self.data[self.position] if self.position < len(self.data) else 0
            if code in _EXTENSION.wide or code == _SIXTEEN:
                yield name, self._array(name)
            else:
                yield from self._map(f"{name}/", depth + 1)

    def _joined(self, prefix: str) -> Stored:
        """An array in pieces; what follows its mark is read in the order in which Flax writes it."""
        if self._take(1) != _TRUE or self._text() != "shape":
            raise self._error(f"{prefix!r} must hold shape and chunks behind {_IN_PIECES}")
        shape = tuple(self._numbered(lambda _: self._length(_COUNT)))
        if self._text() != "chunks":
            raise self._error(f"{prefix!r} must hold shape and chunks behind {_IN_PIECES}")
        pieces = list(self._numbered(lambda number: self._array(f"{prefix}{number}")))
        dtype = pieces[0].dtype if pieces else DTYPES["float32"]

        def read() -> Array:
            joined = np.empty(math.prod(shape), dtype)
            end = 0
            for piece in pieces:
                start, end = end, end + math.prod(piece.shape)
                joined[start:end] = piece.read().reshape(-1)
            return joined.reshape(shape)

        tensor = Stored(shape, dtype, read)
        size = sum(piece.nbytes for piece in pieces)
        if tensor.nbytes != size or any(piece.dtype != dtype for piece in pieces):
            raise self._error(f"{prefix!r} of shape {shape} needs {tensor.nbytes} bytes, its pieces have {size}")
        return tensor

    def _numbered(self, read: Callable[[str], Value]) -> Iterator[Value]:
        """The values of a map whose keys are 0, 1, 2, ... as texts."""
        for number in range(self._length(_MAP)):
            if (key := self._text()) != str(number):
                raise self._error(f"item {number} of a list has number {key!r}")
            yield read(key)

    def _array(self, name: str) -> Stored:
        fixed = self.data[self.position : self.position + 1] == bytes([_SIXTEEN])
        self.position += fixed
        size = 16 if fixed else self._length(_EXTENSION)
        kind = self._take(1)[0]
        end = self.position + size
        if kind != _ARRAY_TYPE:
            raise self._error(f"{name!r} is an extension of type {kind}; only arrays (type {_ARRAY_TYPE}) are read")
        if self._length(_LIST) != 3:
            raise self._error(f"{name!r} must be [shape, type, bytes]")
        shape = tuple(self._length(_COUNT) for _ in range(self._length(_LIST)))
        dtype = _DTYPES.get(type_name := self._text())
        if dtype is None:
            raise self._error(f"{name!r} has type {type_name!r}; known are {', '.join(_DTYPES)}")
        count = self._length(_BYTES)
        start = self.position
        tensor = lying_at(self.path, start, shape, dtype)
        if tensor.nbytes != count or start + count != end or end > len(self.data):
            raise self._error(f"{name!r} of shape {shape} needs {tensor.nbytes} bytes, {count} are announced")
        self.position = end
        return tensor

    def _length(self, form: _Form) -> int:
        code = self._take(1)[0]
        if form.first <= code < form.first + form.short:
            return code - form.first
        if code in form.wide:
            return int.from_bytes(self._take(form.wide[code]), "big")
        raise self._error(
            f"byte {self.position - 1} must start a {form.name}; a checkpoint holds nested maps of arrays"
        )

    def _text(self) -> str:
        return self._take(self._length(_TEXT)).decode("utf-8", "replace")

    def _take(self, size: int) -> bytes:
        if self.position + size > len(self.data):
            raise self._error("it ends too early")
        taken = self.data[self.position : self.position + size]
        self.position += size
        return taken

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is cut short or no Flax checkpoint: {problem}")


# ------------------------------------------------------------------ writing


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write nested maps, one tensor in memory at a time."""
    with path.open("xb") as file:
        _write_map(file, tensors)


def _write_map(file: BinaryIO, tensors: Mapping[str, Stored]) -> None:
    groups: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition("/")
        groups.setdefault(first, {})[rest] = tensor
    file.write(_start(_MAP, len(groups)))
    for first, inner in groups.items():
        file.write(_packed(first))
        if "" in inner:
            _write_tensor(file, inner[""])
        else:
            _write_map(file, inner)


def _write_tensor(file: BinaryIO, tensor: Stored) -> None:
    data = tensor.bytes()
    if tensor.nbytes <= LARGEST:
        return _write_array(file, tensor.shape, tensor.dtype, data)
    lengths = b"".join(_packed(str(axis)) + _start(_COUNT, length) for axis, length in enumerate(tensor.shape))
    file.write(_start(_MAP, 3) + _packed(_IN_PIECES) + _TRUE)
    file.write(_packed("shape") + _start(_MAP, len(tensor.shape)) + lengths)
    step = max(1, LARGEST // tensor.dtype.itemsize) * tensor.dtype.itemsize
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    file.write(_packed("chunks") + _start(_MAP, len(pieces)))
    for number, piece in enumerate(pieces):
        file.write(_packed(str(number)))
        _write_array(file, (len(piece) // tensor.dtype.itemsize,), tensor.dtype, piece)
    return None


def _write_array(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any], data: Array) -> None:
    lengths = _start(_LIST, len(shape)) + b"".join(_start(_COUNT, length) for length in shape)
    before = _start(_LIST, 3) + lengths + _packed(dtype.name) + _start(_BYTES, len(data))
    size = len(before) + len(data)
    start = bytes([_SIXTEEN]) if size == 16 else _start(_EXTENSION, size)
    file.write(start + struct.pack("B", _ARRAY_TYPE) + before)
    file.write(data.data)


def _packed(text: str) -> bytes:
    return _start(_TEXT, len(text.encode())) + text.encode()


def _start(form: _Form, length: int) -> bytes:
    if length < form.short:
        return bytes([form.first + length])
    for code, width in form.wide.items():
        if length < 256**width:
            return bytes([code]) + length.to_bytes(width, "big")
    raise CheckpointError(f"MessagePack has no {form.name} of length {length}")


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files."""
    return {name: name for name in tensors}
