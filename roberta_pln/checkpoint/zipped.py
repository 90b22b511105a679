"""Members of zip files that lie in them as they are, so that they can be mapped into memory."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Final

from roberta_pln.checkpoint.stored import CheckpointError

_HEADER: Final = struct.Struct("<4s22xHH")
"""Of a member: its signature, and how long the name and the further fields behind it are."""
_DESCRIBED: Final = 8
"""Flag of a member whose sizes follow it, behind a signature."""
_DESCRIPTIONS: Final = (16, 24)


def places(path: Path, checked: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """Where the bytes of each member start in the file, and how many they are.

    Args:
        path: the file.
        checked: ends of the names of members that are compared with their checksums, where these are not zero (as
            PyTorch writes them if it is told to).

    Raises:
        CheckpointError: when it is no whole zip file, or a member is compressed, encrypted, damaged, or there twice.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            following = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
            for entry, end in zip(entries, following, strict=True):
                if entry.filename in found:
                    raise CheckpointError(f"{path} holds {entry.filename!r} twice")
                start, size = found[entry.filename] = _place(path, file, entry, end)
                known = entry.CRC and entry.filename.endswith(checked)
                if known and zlib.crc32(_at(file, start, size)) != entry.CRC:
                    raise CheckpointError(f"{path}: {entry.filename} is damaged, its checksum is another")
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is cut short or no zip file: {error}") from error
    return found


def _place(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, end: int) -> tuple[int, int]:
    """What the directory at the end of the file leaves to the member's own header; the next one starts at the end."""
    file.seek(entry.header_offset)
    signature, name_size, extra_size = _HEADER.unpack(file.read(_HEADER.size))
    name = file.read(name_size)
    if signature != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(f"{path}: {entry.filename} must be stored without compression or encryption")
    start = entry.header_offset + _HEADER.size + name_size + extra_size
    rest = end - start - entry.file_size
    described = entry.flag_bits & _DESCRIBED
    if rest not in (_DESCRIPTIONS if described else (0,)) or name.decode("utf-8", "replace") != entry.orig_filename:
        raise CheckpointError(f"{path}: {entry.filename} is cut short, or not where the file says")
    if described and _at(file, start + entry.file_size, 4) != b"PK\7\x08":
        raise CheckpointError(f"{path}: {entry.filename} does not end where the file says")
    return start, entry.file_size


def _at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def aligned(archive: zipfile.ZipFile, name: str, alignment: int = 64) -> zipfile.ZipInfo:
    """The header of the next member to write, dated 1980 and padded so that its bytes start at a multiple."""
    entry = zipfile.ZipInfo(name)
    padding = -(archive.start_dir + _HEADER.size + len(name.encode()) + 4) % alignment
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # the field that PyTorch pads with
    return entry
