"""HDF5 without its library, against it: every form in which the library stores what Keras writes."""

import mmap
import struct
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from roberta_pln.checkpoint import hdf5_reader
from roberta_pln.checkpoint.hdf5_reader import Dataset, Hdf5Error

h5py = pytest.importorskip("h5py")

VERSIONS = ["earliest", "v108", "v110", "latest"]
COUNTS = [0, 3, 9, 70, 3000]
"""Of links in one group: none, some in its header, some in a heap, in several blocks, under a tree of three levels."""
TYPES = ["<f4", "<f8", "<f2", "<i8", "<i4", "<u4", "i1", "u1"]
NAMES = ["a", "é" * 40, ""]


def write(path, version, ordered, count):
    with h5py.File(path, "w", libver=(version, "latest"), track_order=ordered) as file:
        file.attrs.update(names=NAMES, fixed=np.array([b"x", b"yyy"]), numbers=np.arange(3), one=1.5, none=np.zeros(0))
        group = file.create_group("some/deep", track_order=ordered)
        for number in range(count):
            array = np.arange(number % 5 * 3).reshape(-1, 3).astype(TYPES[number % len(TYPES)])
            group.create_dataset(f"array {number}", data=array)
        group["scalar"] = 3.0
        group.create_dataset("brain", data=np.ones(3, ml_dtypes.bfloat16)).attrs["dtype"] = "bfloat16"
        group.create_dataset("packed", data=np.ones(30), compression="gzip")
        file["again"] = group["scalar"]
    return path


def read(path):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        root = hdf5_reader.File(data, 0, len(data)).root
        return everything(root)


def everything(node):
    """Nested dicts with the address of each node, as `of_h5py` makes them."""
    attributes = node.attributes
    if isinstance(node, Dataset):
        return node.address, attributes, node.shape, node.dtype, node.start
    return node.address, attributes, {name: everything(node.file.node(place)) for name, place in node.links.items()}


def of_h5py(node):
    attributes = {name: np.asarray(value).reshape(-1).tolist() for name, value in node.attrs.items()}
    texts = {name: [v.decode() if isinstance(v, bytes) else v for v in values] for name, values in attributes.items()}
    address = h5py.h5o.get_info(node.id).addr
    if isinstance(node, h5py.Dataset):
        start = node.id.get_offset() if node.size else 0
        return address, texts, node.shape, node.dtype, start
    return address, texts, {name: of_h5py(node[name]) for name in node}


@pytest.mark.parametrize(("version", "ordered", "count"), list(product(VERSIONS, [False, True], COUNTS)))
def test_reads_what_the_library_writes(tmp_path, version, ordered, count):
    path = write(tmp_path / "x.h5", version, ordered, count)
    with h5py.File(path) as file:
        assert read(path) == of_h5py(file)


def damaged(path, old, new):
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    return path


def test_a_circle_of_nodes(tmp_path):
    """A tree of names that is its own child."""
    path = write(tmp_path / "x.h5", "earliest", False, 1000)
    whole = bytearray(path.read_bytes())
    at = whole.index(b"TREE\0\1")
    whole[at + 32 : at + 40] = at.to_bytes(8, "little")
    path.write_bytes(whole)
    with pytest.raises(Hdf5Error, match="serve two purposes"):
        read(path)


def test_two_datasets_at_one_place(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        places = [file.create_dataset(name, data=np.ones(4)).id.get_offset() for name in "ab"]
    damaged(path, places[1].to_bytes(8, "little"), (places[0] + 8).to_bytes(8, "little"))
    with pytest.raises(Hdf5Error, match="serve two purposes"):
        read(path)


def test_one_text_for_many_names(tmp_path):
    """A small file cannot become a large list."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["names"] = ["x" * 1000, "y" * 1000]
    whole = bytearray(path.read_bytes())
    first = whole.index(struct.pack("<IQ", 1000, whole.index(b"GCOL")))
    whole[first + 16 : first + 32] = whole[first : first + 16]
    path.write_bytes(whole)
    with pytest.raises(Hdf5Error, match="serves two purposes"):
        read(path)
