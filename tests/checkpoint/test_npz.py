"""NumPy's archives: what NumPy reads and writes, and what is refused."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import CheckpointError, npz, zipped
from roberta_pln.checkpoint.stored import Stored
from tests.contract import is_mapped, random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=8, intermediate_size=12)
TENSORS = random_tensors(CONFIG, "ForMaskedLM")
BIAS = "lm_head.bias"


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert ours[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16])
def test_numpy_reads_what_is_written(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in TENSORS.items()}
    path = checkpoint.save(tensors, tmp_path, CONFIG, "ForMaskedLM", "npz")
    with np.load(path, allow_pickle=False) as theirs:
        assert_equal({name: theirs[name].view(dtype) for name in theirs}, tensors)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16])
def test_reads_what_numpy_writes(tmp_path, dtype, order):
    tensors = {name: np.asarray(array, dtype, order=order) for name, array in TENSORS.items()}
    np.savez(tmp_path / "any.npz", **tensors)
    opened = checkpoint.open(tmp_path / "any.npz", CONFIG)
    assert_equal(opened, {name: np.ascontiguousarray(array) for name, array in tensors.items()})
    assert all(opened[name].flags.c_contiguous for name in opened)


def test_names_are_those_of_safetensors(tmp_path):
    checkpoint.save(random_tensors(CONFIG, "Model"), tmp_path, CONFIG, "Model", "npz")
    names = [name.removeprefix(f"{schema.PREFIX}.") for name in schema.expand(CONFIG, "Model")]
    assert np.load(tmp_path / "model.npz").files == names


def test_files_are_aligned_and_depend_on_the_tensors_only(tmp_path):
    first = checkpoint.save(TENSORS, tmp_path / "a", CONFIG, "ForMaskedLM", "npz")
    second = checkpoint.save(checkpoint.open(first), tmp_path / "b", CONFIG, "ForMaskedLM", "npz")
    assert first.read_bytes() == second.read_bytes()
    assert all(start % 64 == 0 for start, _ in zipped.places(first).values())
    assert is_mapped(npz.read(first).tensors[BIAS].map())


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_other_shapes(tmp_path, shape):
    expected = np.random.default_rng(0).standard_normal(shape)
    npz.write(tmp_path / "x.npz", {"a": Stored(shape, expected.dtype, lambda: expected)}, {}, "Model")
    assert np.array_equal(npz.read(tmp_path / "x.npz").tensors["a"].read(), expected)
    assert np.array_equal(np.load(tmp_path / "x.npz")["a"], expected)


def test_large_arrays(tmp_path, monkeypatch):
    """Above 2 GiB a zip file has another form of entry; the limit is lowered here."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 200)
    path = checkpoint.save(TENSORS, tmp_path, CONFIG, "ForMaskedLM", "npz")
    assert_equal(checkpoint.open(path), TENSORS)
    assert_equal(np.load(path), TENSORS)


# ------------------------------------------------------------------ what is refused


def array(**changes):
    """An array file whose header says something else than what is there."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (2, 3), **changes}
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue() + bytes(24)


def an_object():
    content = io.BytesIO()
    np.save(content, np.array([print], object), allow_pickle=True)
    return content.getvalue()


MEMBERS = {
    "an object": ({"a.npy": an_object()}, "has type object"),
    "big-endian": ({"a.npy": array(descr=">f4")}, "has type >f4; known are"),
    "complex": ({"a.npy": array(descr="<c8", shape=(3,))}, "has type complex64"),
    "fields": ({"a.npy": array(descr=[("x", "<f4")])}, "known are"),
    "huge": ({"a.npy": array(shape=(2**40, 2**40))}, "does not need|larger than any file"),
    "too large": ({"a.npy": array(shape=(7,))}, "does not need the 24 bytes"),
    "too small": ({"a.npy": array(shape=(5,))}, "does not need the 24 bytes"),
    "negative": ({"a.npy": array(shape=(-2, -3))}, "does not need the 24 bytes"),
    "no shape": ({"a.npy": array(shape="x")}, "shape is not valid"),
    "code": ({"a.npy": b"\x93NUMPY\x01\x00\x0c\x00__import__(1"}, "cut short or no array"),
    "deep": ({"a.npy": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000}, "cut short or no array"),
    "another version": ({"a.npy": b"\x93NUMPY\x09\x00" + bytes(100)}, "cut short or no array"),
    "nothing": ({"a.npy": b""}, "cut short or no array"),
    "no array": ({"readme.txt": b"text"}, "which is no array of NumPy"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_refused(tmp_path, case):
    members, text = MEMBERS[case]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=text):
        npz.read(tmp_path / "x.npz")


def test_compressed_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", **TENSORS)
    with pytest.raises(CheckpointError, match="stored without compression"):
        checkpoint.open(tmp_path / "x.npz", CONFIG)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", array())
    with pytest.raises(CheckpointError, match="'a.npy' twice"):
        npz.read(tmp_path / "x.npz")


def test_nothing_of_other_content_is_unpickled(tmp_path):
    """`numpy.load` would run a pickle that has this ending, if it were allowed to."""
    (tmp_path / "x.npz").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="no zip file"):
        npz.read(tmp_path / "x.npz")
