"""`model.npz`: NumPy's own archive, under the names of `model.safetensors`.

NumPy has no bfloat16, and writes such an array as two raw bytes per element, type `V2`. So does this module, and
`numpy.load(path)[name].view(ml_dtypes.bfloat16)` gives the numbers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from roberta_pln.checkpoint import zipped
from roberta_pln.checkpoint.stored import BUFFER_DTYPES, DTYPES, CheckpointError, Contents, Stored, lying_at

_ENDING: Final = ".npy"
_DTYPES: Final = {**DTYPES, **BUFFER_DTYPES}
_TWO_BYTES: Final = np.dtype("V2")
_HEADERS: Final = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""By version of the format. Version 3 is for names of fields that are not in Latin letters."""
_LONGEST_HEADER: Final = 2**17
"""Bytes; NumPy's own limit is smaller, but looked at later."""


# ------------------------------------------------------------------ reading


def read(path: Path) -> Contents:
    """Open what `numpy.savez` or `write` has written; arrays are read from the file mapped into memory."""
    tensors = {}
    places = zipped.places(path)
    with path.open("rb") as file:
        for member, (start, size) in places.items():
            if not member.endswith(_ENDING):
                raise CheckpointError(f"{path} holds {member!r}, which is no array of NumPy ({_ENDING})")
            file.seek(start)
            beginning = BytesIO(file.read(min(size, _LONGEST_HEADER)))
            tensors[member.removesuffix(_ENDING)] = _stored(path, beginning, member, start, size)
    return Contents("torch", tensors)


def _stored(path: Path, beginning: BinaryIO, member: str, start: int, size: int) -> Stored:
    """The array of a member, from the header at its beginning, which is read without unpickling anything."""
    try:
        shape, reversed_axes, dtype = _HEADERS[np.lib.format.read_magic(beginning)](beginning)
    except Exception as error:  # NumPy's parser raises whatever a broken header leads to
        raise CheckpointError(f"{path}: {member!r} is cut short or no array of NumPy: {error!r}") from error
    dtype = DTYPES["bfloat16"] if dtype == _TWO_BYTES else dtype
    if dtype not in _DTYPES.values():
        raise CheckpointError(f"{path}: {member!r} has type {dtype}; known are {', '.join(_DTYPES)}, little-endian")
    tensor = lying_at(path, start + beginning.tell(), shape[::-1] if reversed_axes else shape, dtype)
    left = size - beginning.tell()
    if not all(type(length) is int and length >= 0 for length in shape) or tensor.nbytes != left:
        raise CheckpointError(f"{path}: {member!r} of shape {shape} does not need the {left} bytes that it has")
    return tensor.transposed() if reversed_axes else tensor


# ------------------------------------------------------------------ writing


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str, shard: bool = False) -> None:
    """Write what `numpy.load` reads, one tensor in memory at a time. Second names of tied tensors are left out.

    Equal tensors give equal files, and every tensor is aligned.
    """
    with path.open("xb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            header = _header(tensor)
            entry = zipped.aligned(archive, name + _ENDING)
            entry.file_size = len(header) + tensor.nbytes  # above 2 GiB another form of entry is needed
            with archive.open(entry, "w") as member:
                member.write(header)
                member.write(tensor.bytes().data)


def _header(tensor: Stored) -> bytes:
    """NumPy's own, padded to a multiple of 64 bytes."""
    header = BytesIO()
    descr = np.lib.format.dtype_to_descr(tensor.dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": tensor.shape})
    return header.getvalue()


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Name in an index to name in the files."""
    return {name: name for name in tensors}
