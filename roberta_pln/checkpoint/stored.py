"""What every format on disk gives and takes: tensors under the format's own names, read only when asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from roberta_pln.checkpoint.memory import Array, empty, transpose
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.names import Family

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("<f2"),
}
"""The types a parameter may have, by the names in `config.DTYPES`; all little-endian on disk."""

BUFFER_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
"""Further types of tensors that are no parameters, such as position ids in old files."""


class CheckpointError(ValueError):
    """A file that is no checkpoint of this architecture, is cut short, or asks for what is refused."""


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file.

    Attributes:
        shape, dtype: known from the file's header.
        read: reads it into memory of its own.
        identity: equal for two names of the same bytes; `None` when that is not known.
        map: gives it as a part of the file that is mapped into memory, where writing to the array leaves the file as
            it is; `None` where its bytes are not in one piece or in another order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]
    identity: Hashable = None
    map: Callable[[], Array] | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def transposed(self) -> Stored:
        """The same tensor with its axes reversed, contiguous again."""
        identity = None if self.identity is None else ("transposed", self.identity)
        return Stored(self.shape[::-1], self.dtype, lambda: transpose(self.read()), identity)

    def bytes(self) -> Array:
        """The raw little-endian bytes in C order, shape (nbytes,), for writers."""
        array = np.ascontiguousarray(self.read(), dtype=self.dtype)
        return array.reshape(-1).view(np.uint8)


def lying_at(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], identity: Hashable = None
) -> Stored:
    """A tensor whose bytes are in one piece of a file, in C order; the caller has checked that they are there."""
    if len(shape) > _MOST_AXES:
        raise CheckpointError(f"{path}: a tensor has {len(shape)} axes; at most {_MOST_AXES} are read")
    count = math.prod(shape)
    if count == 0 and math.prod(length or 1 for length in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{path}: a tensor has the shape {shape}, which is too large even where it is empty")

    def read() -> Array:
        array = empty(shape, dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            _fill(file, array.reshape(-1).view(np.uint8))
        return array

    def mapped() -> Array:
        if count == 0 or offset % dtype.itemsize:
            return read()
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with path.open("rb", buffering=0) as file:
            size = offset - start + count * dtype.itemsize
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
        return np.frombuffer(pages, dtype, count, offset - start).reshape(shape)

    return Stored(shape, dtype, read, identity, mapped)


def _fill(file: FileIO, memory: Array) -> None:
    """Read bytes until an array of them is full."""
    while len(memory):
        count = file.readinto(memory.data)  # at most 2 GiB at a time on Linux
        if not count:
            raise CheckpointError(f"{file.name} was cut short while it was read")
        memory = memory[count:]


_MOST_AXES: Final = 32


@dataclass(frozen=True)
class Contents:
    """One opened file.

    Attributes:
        family: whose names it uses.
        tensors: stored name to tensor, in the file's order.
        copies: names of tensors that the format is known to repeat, with the name they repeat.
        config: the model's config, where the file itself holds one.
        left_out: what else is in the file and is not of the model, such as an optimizer's state.
        zeros: canonical names of parameters that the format leaves out, because they are zero.
    """

    family: Family
    tensors: Mapping[str, Stored]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: RobertaPreLayerNormConfig | None = None
    left_out: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
