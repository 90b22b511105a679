"""What every format on disk gives and takes: tensors under the format's own names, read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np

from roberta_pln.names import Family

Array = np.ndarray[Any, np.dtype[Any]]

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
        read: reads it.
        identity: equal for two names of the same bytes; `None` when that is not known.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]
    identity: Hashable = None

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
        return Stored(self.shape[::-1], self.dtype, lambda: np.ascontiguousarray(self.read().T), identity)

    def bytes(self) -> Array:
        """The raw little-endian bytes in C order, shape (nbytes,), for writers."""
        array = np.ascontiguousarray(self.read(), dtype=self.dtype)
        return array.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Contents:
    """One opened file.

    Attributes:
        family: whose names it uses.
        tensors: stored name to tensor, in the file's order.
        copies: names of tensors that the format is known to repeat, with the name they repeat.
    """

    family: Family
    tensors: Mapping[str, Stored]
    copies: Mapping[str, str] = field(default_factory=dict)
