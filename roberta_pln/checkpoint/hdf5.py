"""HDF5 files as both of Keras' layouts need them: reached over hard links only, and one tensor read at a time.

Files are read without the HDF5 library, which may crash on damaged ones; it is needed to write them.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from roberta_pln.checkpoint import zipped
from roberta_pln.checkpoint.hdf5_reader import Dataset, File, Group, Hdf5Error, Node
from roberta_pln.checkpoint.stored import BUFFER_DTYPES, DTYPES, CheckpointError, Stored, lying_at

KERAS_WEIGHTS: Final = "model.weights.h5"
"""What a `.keras` file, which is a zip file, calls its HDF5 file."""

_KNOWN: Final = [*DTYPES.values(), *BUFFER_DTYPES.values()]
_TWO_BYTES: Final = np.dtype("V2")
"""How Keras 3 stores bfloat16, with an attribute that says so."""


def library() -> Any:
    """The h5py module."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("writing HDF5 files needs h5py: pip install 'roberta_pln[tf]', or h5py alone") from error
    return h5py


@contextmanager
def opened(path: Path) -> Iterator[Group]:
    """Open an HDF5 file, or the one in a `.keras` file, for reading; it gives the group at its top.

    Raises:
        CheckpointError: when it is none, or anything that is read from it turns out to be damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start, size = 0, len(data)
            if data[:4] == b"PK\3\4":
                places = zipped.places(path)
                if KERAS_WEIGHTS not in places:
                    raise CheckpointError(f"{path} is a zip file without {KERAS_WEIGHTS}, so no model of Keras")
                start, size = places[KERAS_WEIGHTS]
            yield File(data, start, size).root
    except CheckpointError:
        raise
    except (Hdf5Error, OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path} is cut short or no HDF5 file: {error}") from error


def at(path: Path, group: Group, place: str) -> Node:
    """The group or dataset at a place, reached over hard links only."""
    node: Node = group
    for part in place.split("/"):
        if not isinstance(node, Group) or part not in node.links:
            raise CheckpointError(f"{path} names {place!r}, which is not in it")
        address = node.links[part]
        if address is None:
            raise CheckpointError(f"{path}: {place!r} is a soft or external link, which is refused; store the tensor")
        node = node.file.node(address)
    return node


def groups(path: Path, top: Group) -> dict[str, list[str]]:
    """Every group that holds datasets, by its place, with their names.

    Raises:
        CheckpointError: when two links lead to one group, which may be a circle.
    """
    found: dict[str, list[str]] = {}
    seen = set()
    waiting = [("", top)]
    while waiting:
        place, group = waiting.pop()
        if group.address in seen:
            raise CheckpointError(f"{path}: several links lead to the group {place!r}")
        seen.add(group.address)
        for name in group.links:
            node = at(path, group, name)
            if isinstance(node, Group):
                waiting.append((f"{place}/{name}" if place else name, node))
            else:
                found.setdefault(place, []).append(name)
    return found


def stored(path: Path, group: Group, place: str) -> Stored:
    """The tensor at a place. External and virtual storage and filters are refused: they reach outside the file."""
    dataset = at(path, group, place)
    dtype = getattr(dataset, "dtype", None)
    if dtype == _TWO_BYTES and dataset.attributes.get("dtype") == ["bfloat16"]:
        dtype = DTYPES["bfloat16"]
    if not isinstance(dataset, Dataset) or dataset.shape is None or dtype is None or dtype not in _KNOWN:
        known = ", ".join(str(known) for known in _KNOWN)
        raise CheckpointError(f"{path}: {place!r} must be a dataset of numbers of the types {known}")
    if dataset.outside:
        raise CheckpointError(f"{path}: {place!r} lies in another file, which is refused; store the tensor itself")
    if dataset.start is None:
        raise CheckpointError(
            f"{path}: {place!r} is compressed or incomplete, or not in one piece; store it whole, with "
            "`h5repack -f NONE -l CONTI` for instance"
        )
    return lying_at(path, dataset.start, dataset.shape, dtype, dataset.address)


def check_distinct(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Refuse two names of one dataset, to which a damaged link may lead."""
    names: dict[Hashable, str] = {}
    for name, tensor in tensors.items():
        if names.setdefault(tensor.identity, name) != name:
            raise CheckpointError(f"{path}: {names[tensor.identity]!r} and {name!r} are one dataset")


@contextmanager
def created(path: Path) -> Iterator[Any]:
    """Make an HDF5 file with h5py.

    Raises:
        OSError: when the disk is full, for instance; the HDF5 library itself would crash.
    """
    h5py = library()
    with path.open("xb+", buffering=0) as file:
        enduring = _Enduring(file)
        with h5py.File(enduring, "w") as content:
            yield content
        if enduring.error is not None:
            raise enduring.error


class _Enduring(io.RawIOBase):
    """A file that keeps the first error of writing to itself, and then takes everything without writing it."""

    def __init__(self, file: io.FileIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte."""
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer."""
        return self.file.readinto(buffer)

    def write(self, data: Any) -> int:
        """Write all of some bytes."""
        left = memoryview(data).cast("B")
        try:
            while left and self.error is None:
                left = left[self.file.write(left) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Cut the file, or make it longer."""
        try:
            if self.error is None:
                self.file.truncate(size)
        except OSError as error:
            self.error = error
        return size or 0


def write(group: Any, name: str, tensor: Stored) -> None:
    """Add a tensor to a group."""
    if tensor.dtype == DTYPES["bfloat16"]:
        dataset = group.create_dataset(name, data=np.ascontiguousarray(tensor.read()).view(_TWO_BYTES))
        dataset.attrs["dtype"] = "bfloat16"
    else:
        group.create_dataset(name, data=tensor.read(), dtype=tensor.dtype)
