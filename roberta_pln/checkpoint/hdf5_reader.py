"""HDF5 without its library: the few structures that Keras' files are made of, read from the bytes.

The HDF5 library crashes, or never returns, on some files that are damaged. This reader cannot, because it follows one
rule: every byte of the file serves one purpose. A structure that overlaps another is refused, so no circle is walked
twice, time and memory are bounded by the size of the file, and no two tensors share their numbers. Files of the form
before HDF5 1.8 have no checksums: a damaged address in them that leads to bytes without any purpose, which are zeros
in a file that was written once, is not noticed.

Read are groups with symbol tables or with links (the forms before and since HDF5 1.8), attributes of numbers and
text, and datasets that lie in the file in one piece. Names and numbers are those of the HDF5 File Format Specification.
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np

from roberta_pln.checkpoint.stored import DTYPES

_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_NOWHERE: Final = 2**64 - 1
"""The address of what is not there."""

# Kinds of messages in the header of a group or dataset.
_DATASPACE, _LINK_INFO, _DATATYPE, _LINK, _EXTERNAL, _LAYOUT, _FILTERS = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08, 0x0B
_ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x0C, 0x10, 0x11
_SHARED: Final = 2
"""Flag of a message whose content lies elsewhere, a form that Keras does not write."""

# Classes of layouts, datatypes, and of the index in which a group with many links has their names.
_CONTIGUOUS, _VIRTUAL = 1, 3
_TEXT, _OPAQUE, _VARIABLE = 3, 5, 9
_NAME_INDEX: Final = 5
_SOFT: Final = 2
"""Of a symbol: what it leads to is given by name."""
_DEEPEST: Final = 4
"""Levels of an index; with two it holds thousands of names."""


def _float(dtype: np.dtype[Any], exponent: int, mantissa: int) -> tuple[bytes, np.dtype[Any]]:
    """How a little-endian number of that form is described."""
    bits = 1 + exponent + mantissa
    form = struct.pack("<HHBBBBI", 0, bits, mantissa, exponent, 0, mantissa, 2 ** (exponent - 1) - 1)
    return struct.pack("<BBBBI", 1, 0x20, bits - 1, 0, bits // 8) + form, dtype


def _integer(dtype: np.dtype[Any]) -> tuple[bytes, np.dtype[Any]]:
    """How a little-endian integer is described."""
    return struct.pack("<BBBBIHH", 0, 8 * (dtype.kind == "i"), 0, 0, dtype.itemsize, 0, 8 * dtype.itemsize), dtype


_NUMBERS: Final = dict(
    [
        _float(DTYPES["float64"], 11, 52),
        _float(DTYPES["float32"], 8, 23),
        _float(DTYPES["float16"], 5, 10),
        _float(DTYPES["bfloat16"], 8, 7),
        *(_integer(np.dtype(f"<{kind}{size}")) for kind in "iu" for size in (1, 2, 4, 8)),
    ]
)
"""Description to type."""


class Hdf5Error(ValueError):
    """A file that is damaged, or uses what is not read here."""


# ------------------------------------------------------------------ what a file holds


class _Message(NamedTuple):
    """One message of a header."""

    kind: int
    flags: int
    data: bytes


class Node:
    """A group or a dataset.

    Attributes:
        address: where its header is.
    """

    def __init__(self, file: File, address: int, messages: list[_Message]) -> None:
        self.file = file
        self.address = address
        self.messages = messages

    def message(self, kind: int) -> bytes:
        """The message of a kind, empty when there is none."""
        found = [message for message in self.messages if message.kind == kind]
        if len(found) > 1 or any(message.flags & _SHARED for message in found):
            raise Hdf5Error(f"the header at byte {self.address} has message {kind} twice or elsewhere")
        return found[0].data if found else b""

    @cached_property
    def attributes(self) -> dict[str, list[Any]]:
        """Name to elements. Numbers and text are read, one None stands for anything else."""
        found: dict[str, list[Any]] = {}
        for message in self.messages:
            if message.kind == _ATTRIBUTE and not message.flags & _SHARED:
                name, elements = _attribute(self.file, _Bytes(message.data))
                if name in found:
                    raise Hdf5Error(f"the attribute {name!r} is there twice")
                found[name] = elements
        return found


class Group(Node):
    """Names of groups and datasets."""

    @cached_property
    def links(self) -> dict[str, int | None]:
        """Name to address, which is None for soft and external links."""
        found: dict[str, int | None] = {}
        for name, address in self._links():
            if name in found:
                raise Hdf5Error(f"a group has {name!r} twice")
            found[name] = address
        return found

    def _links(self) -> Iterator[tuple[str, int | None]]:
        if table := self.message(_SYMBOL_TABLE):
            tree, heap = _Bytes(table).unpack("QQ")
            yield from _symbols(self.file, tree, heap)
        yield from (_link(_Bytes(message.data)) for message in self.messages if message.kind == _LINK)
        if info := _Bytes(self.message(_LINK_INFO)):
            _, flags = info.unpack("BB")
            info.take(8 * (flags & 1))
            heap, index = info.unpack("QQ")
            if heap != _NOWHERE:
                yield from map(_link, _heap_objects(self.file, heap, index))


class Dataset(Node):
    """An array.

    Attributes:
        shape: its axes; None when its form has no elements.
        dtype: its type, `V2` for two raw bytes; None for any that is not read here.
        outside: whether its numbers are in another file.
        start: where its numbers are in the file; None when they are not there in one piece.
    """

    def __init__(self, file: File, address: int, messages: list[_Message]) -> None:
        super().__init__(file, address, messages)
        self.shape = _shape(_Bytes(self.message(_DATASPACE)))
        self.dtype = _dtype(self.message(_DATATYPE))
        layout = _Bytes(self.message(_LAYOUT))
        version, kind = layout.unpack("BB")
        self.outside = bool(self.message(_EXTERNAL)) or (version >= 3 and kind == _VIRTUAL)
        plain = version in (3, 4) and kind == _CONTIGUOUS and not self.message(_FILTERS) and not self.outside
        self.start = self._claimed(*layout.unpack("QQ")) if plain else None

    def _claimed(self, place: int, size: int) -> int | None:
        if self.shape is None or self.dtype is None or size != _size(self.shape, self.dtype.itemsize):
            return None
        if size == 0:
            return self.file.start
        if place == _NOWHERE:
            return None
        self.file.claim(place, size)
        return self.file.start + place


# ------------------------------------------------------------------ the file


class _Bytes:
    """Bytes that are read from the front."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def __bool__(self) -> bool:
        return self.position < len(self.data)

    def take(self, size: int) -> bytes:
        """The next bytes."""
        end = self.position + size
        if end > len(self.data):
            raise Hdf5Error("a structure ends too early")
        start, self.position = self.position, end
        return self.data[start:end]

    def check(self) -> None:
        """Compare all that has been read with the checksum that follows."""
        expected = _checksum(self.data[: self.position])
        if self.number(4) != expected:
            raise Hdf5Error("a structure is damaged, its checksum is another")

    def number(self, size: int) -> int:
        """The next bytes as one number."""
        return int.from_bytes(self.take(size), "little")

    def unpack(self, form: str) -> tuple[Any, ...]:
        """The next bytes as little-endian numbers of the `struct` module."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))


def _checksum(data: bytes) -> int:
    """Bob Jenkins' lookup3, which HDF5 uses since 1.8."""

    def turned(value: int, by: int) -> int:
        return (value << by | value >> 32 - by) & 0xFFFFFFFF

    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    words = struct.unpack(f"<{(len(data) + 11) // 12 * 3}I", data + bytes(-len(data) % 12))
    for at in range(0, len(words), 3):
        a, b, c = (a + words[at]) & 0xFFFFFFFF, (b + words[at + 1]) & 0xFFFFFFFF, (c + words[at + 2]) & 0xFFFFFFFF
        if at + 3 < len(words):
            for by in (4, 6, 8, 16, 19, 4):
                a = (a - c & 0xFFFFFFFF) ^ turned(c, by)
                c = c + b & 0xFFFFFFFF
                a, b, c = b, c, a
    for by in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - turned(b, by)) & 0xFFFFFFFF
        a, b, c = b, c, a
    return b


class _Claims:
    """Pieces that serve a purpose."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int]] = []

    def add(self, start: int, size: int) -> None:
        """Claim a piece, none of which is claimed yet."""
        piece = (start, start + size)
        index = bisect_left(self._pieces, piece)
        if any(start < end and first < piece[1] for first, end in self._pieces[max(0, index - 1) : index + 1]):
            raise Hdf5Error(f"bytes {start} to {start + size} serve two purposes")
        self._pieces.insert(index, piece)


class File:
    """An HDF5 file, or one within another.

    Args:
        data: all bytes.
        start, size: where among them the HDF5 file is.
    """

    def __init__(self, data: mmap.mmap, start: int, size: int) -> None:
        self.data, self.start, self.size = data, start, size
        self._claims = _Claims()
        self._nodes: dict[int, Node] = {}
        self._texts: dict[int, dict[int, bytes]] = {}
        root = self.node(self._superblock())
        if not isinstance(root, Group):
            raise Hdf5Error("it does not start with a group")
        self.root = root

    def _superblock(self) -> int:
        """Check that the file is whole, and return the address of its first header."""
        block = _Bytes(self.peek(0, min(100, self.size)))
        if block.take(8) != _SIGNATURE:
            raise Hdf5Error("it does not start as one")
        version = block.number(1)
        self.node_size, self.tree_size = 4, 16  # where the file does not say
        if version in (0, 1):
            _, sizes, _, self.node_size, self.tree_size, _ = block.unpack("4sHBHHI")
            block.take(4 * version)
            base, _, end, _, _, root, _, _, _ = block.unpack("9Q")
        elif version in (2, 3):
            sizes, _, base, _, end, root = block.unpack("HB4Q")
            block.check()
        else:
            raise Hdf5Error(f"version {version} is unknown")
        if sizes != 0x0808 or base != 0:
            raise Hdf5Error("its addresses must be of 8 bytes, and count from its start")
        if end > self.size:
            raise Hdf5Error(f"it has {self.size} of {end} bytes")
        self.size = end
        self.claim(0, block.position)
        return int(root)

    def peek(self, address: int, size: int) -> bytes:
        """Bytes of any purpose."""
        if address + size > self.size:
            raise Hdf5Error(f"it ends before byte {address + size}")
        return self.data[self.start + address : self.start + address + size]

    def claim(self, address: int, size: int) -> None:
        """Take bytes for one purpose."""
        if address + size > self.size:
            raise Hdf5Error(f"it ends before byte {address + size}")
        self._claims.add(address, size)

    def take(self, address: int, size: int, signature: bytes = b"") -> _Bytes:
        """Claim a structure, and read it behind its signature."""
        self.claim(address, size)
        taken = _Bytes(self.peek(address, size))
        if taken.take(len(signature)) != signature:
            raise Hdf5Error(f"{signature.decode()} is not at byte {address}")
        return taken

    def node(self, address: int) -> Node:
        """The group or dataset that has its header there, the same one for all links."""
        if address not in self._nodes:
            messages = list(_messages(self, address))
            kind = Dataset if any(message.kind == _LAYOUT for message in messages) else Group
            self._nodes[address] = kind(self, address, messages)
        return self._nodes[address]

    def text(self, size: int, heap: int, index: int) -> str:
        """Text of variable length, which serves one attribute as all other bytes do."""
        if size == 0:
            return ""
        if heap not in self._texts:
            self._texts[heap] = dict(_texts(self, heap))
        data = self._texts[heap].pop(index, b"")
        if len(data) < size:
            raise Hdf5Error(f"text {index} at byte {heap} is not there, or serves two purposes")
        return _decoded(data[:size])


# ------------------------------------------------------------------ headers and their messages


def _messages(file: File, address: int) -> Iterator[_Message]:
    """The messages of a header, whose blocks name further blocks."""
    new = file.peek(address, 4) == b"OHDR"
    block, tracked = _first_block(file, address) if new else (_first_old_block(file, address), False)
    blocks = [block]
    for block in blocks:  # which grows
        end = len(block.data) - 4 * new
        while end - block.position >= (6 if tracked else 4 if new else 8):
            kind, size, flags = block.unpack("BHB") if new else block.unpack("HHB3x")
            block.take(2 * tracked)
            message = _Message(kind, flags, block.take(size))
            if kind == _CONTINUATION:
                place, length = _Bytes(message.data).unpack("QQ")
                blocks.append(file.take(place, length, b"OCHK" if new else b""))
            yield message
        if new:
            block.take(end - block.position)
            block.check()


def _first_old_block(file: File, address: int) -> _Bytes:
    version, _, _, _, size, _ = file.take(address, 16).unpack("BBHIII")
    if version != 1:
        raise Hdf5Error(f"there is no header at byte {address}")
    return file.take(address + 16, size)


def _first_block(file: File, address: int) -> tuple[_Bytes, bool]:
    """The first block, and whether messages have a number of their order."""
    version, flags = file.peek(address + 4, 2)
    if version != 2:
        raise Hdf5Error(f"there is no header at byte {address}")
    before = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
    width = 1 << (flags & 3)
    size = int.from_bytes(file.peek(address + before, width), "little")
    block = file.take(address, before + width + size + 4)
    block.take(before + width)
    return block, bool(flags & 4)


def _shape(space: _Bytes) -> tuple[int, ...] | None:
    version, axes, _, form = space.unpack("BBBB")
    if version == 1:
        space.take(4)
    elif version != 2 or form == 2:
        return None
    return space.unpack(f"{axes}Q")


def _size(shape: tuple[int, ...], size: int) -> int:
    for length in shape:
        size *= length
    return size


def _dtype(description: bytes) -> np.dtype[Any] | None:
    """The type of what is described, whatever version of HDF5 describes it."""
    if len(description) < 8:
        return None
    kind, size = description[0] & 15, int.from_bytes(description[4:8], "little")
    if kind == _OPAQUE:
        return np.dtype("V2") if size == 2 else None
    plain = bytes([kind]) + description[1:]
    return _NUMBERS.get(plain[:20], _NUMBERS.get(plain[:12]))


def _attribute(file: File, message: _Bytes) -> tuple[str, list[Any]]:
    """The name and the elements."""
    version, shared, name_size, type_size, space_size = message.unpack("BBHHH")
    if version not in (1, 2, 3) or (version > 1 and shared):
        raise Hdf5Error("an attribute has a form that Keras does not write")
    message.take(version == 3)
    name, description, space = (
        message.take(size + (-size % 8 if version == 1 else 0)) for size in (name_size, type_size, space_size)
    )
    shape = _shape(_Bytes(space))
    count = 0 if shape is None else _size(shape, 1)
    return _decoded(name.partition(b"\0")[0]), _elements(file, description, count, message)


def _elements(file: File, description: bytes, count: int, data: _Bytes) -> list[Any]:
    if count == 0:
        return []
    kind, form = description[0] & 15, description[1] & 15
    size = int.from_bytes(description[4:8], "little")
    if kind == _TEXT and size > 0:
        return [_decoded(data.take(size).partition(b"\0")[0]) for _ in range(count)]
    if kind == _VARIABLE and form == 1:
        return [file.text(*data.unpack("IQI")) for _ in range(count)]
    dtype = _dtype(description)
    return [None] if dtype is None else list(np.frombuffer(data.take(count * dtype.itemsize), dtype).tolist())


def _texts(file: File, address: int) -> Iterator[tuple[int, bytes]]:
    """The texts of a global heap, by their numbers."""
    version, size = _Bytes(file.peek(address, 16)[4:]).unpack("B3xQ")
    heap = file.take(address, size, b"GCOL")
    if version != 1:
        raise Hdf5Error(f"there is no heap at byte {address}")
    heap.take(12)
    while len(heap.data) - heap.position >= 16:
        index, length = heap.unpack("H6xQ")
        if index == 0:  # the rest is free
            return
        yield index, heap.take(length)
        heap.take(min(-length % 8, len(heap.data) - heap.position))


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise Hdf5Error(f"a name is no text: {error}") from error


# ------------------------------------------------------------------ groups before HDF5 1.8


def _symbols(file: File, tree: int, heap: int) -> Iterator[tuple[str, int | None]]:
    """The links of a symbol table: a tree of nodes that point to names in a heap."""
    version, size, _, place = file.take(heap, 32, b"HEAP").unpack("B3xQQQ")
    names, taken = file.take(place, size).data, _Claims()
    for node in _leaves(file, tree, None):
        symbols = file.take(node, 8 + 2 * file.node_size * 40, b"SNOD")
        version, count = symbols.unpack("BxH")
        if version != 1 or count > 2 * file.node_size:
            raise Hdf5Error(f"there are no symbols at byte {node}")
        for _ in range(count):
            start, address, kind = symbols.unpack("QQI20x")
            end = names.find(b"\0", start)
            if end < 0:
                raise Hdf5Error(f"a name of the group at byte {tree} is not there")
            taken.add(start, end + 1 - start)
            yield _decoded(names[start:end]), None if kind == _SOFT else address


def _leaves(file: File, address: int, level: int | None) -> Iterator[int]:
    """Where the symbols of a tree are, in order."""
    node = file.take(address, 32 + 32 * file.tree_size, b"TREE")
    kind, own_level, count, _, _, _ = node.unpack("BBHQQQ")
    if kind != 0 or count > 2 * file.tree_size or own_level != (own_level if level is None else level):
        raise Hdf5Error(f"there is no tree of names at byte {address}")
    for _ in range(count):
        child, _ = node.unpack("QQ")
        if own_level:
            yield from _leaves(file, child, own_level - 1)
        else:
            yield child


# ------------------------------------------------------------------ groups since HDF5 1.8


def _link(message: _Bytes) -> tuple[str, int | None]:
    version, flags = message.unpack("BB")
    kind = message.number(1) if flags & 8 else 0
    message.take(8 * bool(flags & 4) + bool(flags & 16))  # order, alphabet
    name = _decoded(message.take(message.number(1 << (flags & 3))))
    if version != 1:
        raise Hdf5Error(f"the link {name!r} is of version {version}")
    return name, message.number(8) if kind == 0 else None


def _heap_objects(file: File, address: int, index: int) -> Iterator[_Bytes]:
    """The objects of a fractal heap that an index lists."""
    header = file.take(address, 146, b"FRHP")
    version, id_size, filters, _, _ = header.unpack("BHHBI")
    header.take(96)
    width, first, largest, bits, _, root, rows = header.unpack("HQQHHQH")
    header.check()
    offset_size = (bits + 7) // 8
    if version != 0 or filters or id_size <= 1 + offset_size:
        raise Hdf5Error(f"there is no heap of names at byte {address}")
    if rows:
        table = file.take(root, 17 + offset_size + 8 * rows * width, b"FHIB")
        table.take(9 + offset_size)
        blocks = _blocks(table, rows, width, first, largest)
    else:
        blocks = [(0, root, first)]
    content = {start: file.take(place, size, b"FHDB").data for start, place, size in blocks}
    starts = list(content)
    taken = _Claims()
    for record in _records(file, index, 4 + id_size):
        start = int.from_bytes(record[5 : 5 + offset_size], "little")
        size = int.from_bytes(record[5 + offset_size :], "little")
        block = starts[max(0, bisect_right(starts, start) - 1)] if starts else 0
        if record[4] or not starts or not 0 <= start - block <= len(content[block]) - size:
            raise Hdf5Error(f"the heap at byte {address} lacks a name")
        taken.add(start, size)
        yield _Bytes(content[block][start - block : start - block + size])


def _blocks(table: _Bytes, rows: int, width: int, first: int, largest: int) -> list[tuple[int, int, int]]:
    """Where in the heap each block starts, where in the file, and how long it is; from row 1 on lengths double."""
    found = []
    start = 0
    for row in range(rows):
        size = first << max(0, row - 1)
        if size > largest:
            raise Hdf5Error("a group has more links than Keras writes")
        for _ in range(width):
            place = table.number(8)
            if place != _NOWHERE:
                found.append((start, place, size))
            start += size
    table.check()
    return found


def _records(file: File, address: int, size: int) -> Iterator[bytes]:
    """The records of an index of names, which is a tree."""
    header = file.take(address, 38, b"BTHD")
    version, kind, node_size, record_size, depth, _, root, count, _ = header.unpack("BBIHHHQHQ")
    header.check()
    if (version, kind, record_size) != (0, _NAME_INDEX, size) or node_size < size + 10 or depth > _DEEPEST:
        raise Hdf5Error(f"there is no index of names at byte {address}")
    # In a node, each child has an address, its number of records, and that of all below it; the widths of these
    # two numbers follow from how many records fit.
    most = (node_size - 10) // size
    own = _width(most)
    totals = [0]
    below = most
    for _ in range(depth):
        pointer = 8 + own + totals[-1]
        most = max(0, node_size - 10 - pointer) // (size + pointer)
        below = (most + 1) * below + most
        totals.append(_width(below))

    def walk(place: int, level: int, count: int) -> Iterator[bytes]:
        node = file.take(place, node_size, b"BTIN" if level else b"BTLF")
        node.take(2)
        records = [node.take(size) for _ in range(count)]
        width = totals[level - 1] if level else 0
        children = [(node.number(8), node.number(own), node.take(width)) for _ in range(count + 1) if level]
        node.check()
        for child, inner, _ in children:
            yield from walk(child, level - 1, inner)
        yield from records

    if root != _NOWHERE:
        yield from walk(root, depth, count)


def _width(number: int) -> int:
    return (number.bit_length() - 1) // 8 + 1
