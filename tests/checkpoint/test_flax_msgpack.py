"""Flax's MessagePack form, against the msgpack library."""

from functools import partial

import numpy as np
import pytest

from roberta_pln import checkpoint
from roberta_pln.checkpoint import CheckpointError, flax_msgpack
from roberta_pln.checkpoint.stored import Stored
from tests.contract import random_tensors, tiny_config

msgpack = pytest.importorskip("msgpack")


def array(shape=(2, 3), dtype="float32", size=24, kind=1, parts=3):
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, bytes(size))[:parts]))


def pieces(mark=True, shape=None, dtype="float32", numbers="01"):
    """An array of 2 x 3 numbers in two pieces."""
    parts = [array((3,), "float32", 12), array((3,), dtype, 12)]
    shape = {"0": 2, "1": 3} if shape is None else shape
    return {"__msgpack_chunked_array__": mark, "shape": shape, "chunks": dict(zip(numbers, parts, strict=True))}


def write(folder, tree):
    path = folder / "flax_model.msgpack"
    path.write_bytes(tree if isinstance(tree, bytes) else msgpack.packb(tree))
    return path


SHAPES = [(2, 3), (), (0, 3), (16,), (5000, 7), (200, 300, 2), (1, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int64", "int8", "bool"])
def test_reads_every_size(tmp_path, shape, dtype):
    known = flax_msgpack._DTYPES[dtype]
    expected = (np.arange(np.prod(shape, dtype=int)) % 100).reshape(shape).astype(known)
    payload = msgpack.packb((shape, dtype, expected.tobytes()))
    tree = {"a" * 40: {"b": msgpack.ExtType(1, payload)}, "c": {str(key): {} for key in range(20)}}
    ((name, tensor),) = flax_msgpack.read(write(tmp_path, tree)).tensors.items()
    assert name == "a" * 40 + "/b"
    assert (tensor.shape, tensor.dtype) == (shape, known)
    assert np.array_equal(tensor.read(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_writes_what_the_library_reads(tmp_path, shape):
    expected = np.random.default_rng(0).standard_normal(shape)
    path = tmp_path / "x.msgpack"
    flax_msgpack.write(path, {"a/0/b": Stored(shape, expected.dtype, lambda: expected)}, {}, "Model")
    leaf = msgpack.unpackb(path.read_bytes())["a"]["0"]["b"]
    assert leaf.code == 1
    found, dtype, data = msgpack.unpackb(leaf.data)
    assert (tuple(found), dtype, data) == (shape, "float64", expected.tobytes())


REFUSED = {
    "complex": ({"x": array(kind=2)}, "extension of type 2"),
    "size": ({"x": array(size=20)}, "needs 24 bytes, 20 are announced"),
    "huge": ({"x": array(shape=(2**40, 2**40))}, "needs|larger than any file"),
    "negative": ({"x": array(shape=(-2, -3))}, "must start a count"),
    "type": ({"x": array(dtype="object")}, "has type 'object'"),
    "parts": ({"x": array(parts=2)}, r"must be \[shape, type, bytes\]"),
    "number": ({"x": 3}, "must start a map"),
    "pieces, no shape": ({"x": pieces(shape=[2, 3])}, "must start a map"),
    "pieces, no mark": ({"x": pieces(mark=False)}, "must hold shape and chunks"),
    "pieces in another order": ({"x": dict(reversed(pieces().items()))}, "must start a map"),
    "pieces that are missing": ({"x": {**pieces(), "chunks": {}}}, "needs 24 bytes, its pieces have 0"),
    "too few pieces": ({"x": pieces(shape={"0": 2**40})}, "its pieces have 24"),
    "pieces of two types": ({"x": pieces(dtype="int32")}, "its pieces have 24"),
    "pieces out of order": ({"x": pieces(numbers="10")}, "item 0 of a list has number '1'"),
    "pieces and more": ({"x": {**pieces(), "y": array()}}, "must start a map"),
    "more and pieces": ({"x": {"y": array(), **pieces()}}, "must start a map"),
    "a piece in pieces": ({"x": {**pieces(), "chunks": {"0": pieces()}}}, "must start a extension"),
    "list": ([1, 2], "must start a map"),
    "numbered": ({1: array()}, "must start a text"),
    "trailing": (msgpack.packb({}) + b"x", "bytes follow"),
    "twice": (b"\x82" + 2 * (msgpack.packb("x") + msgpack.packb(array())), "there twice"),
    "deep": (b"\x81\xa1x" * 10_000, "nested more than"),
    "inner end": ({"x": msgpack.ExtType(1, array().data + b"...")}, "needs 24 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    tree, text = REFUSED[name]
    with pytest.raises(CheckpointError, match=text):
        flax_msgpack.read(write(tmp_path, tree))


def test_flax_restores_what_we_write(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    config = tiny_config(hidden_size=8, intermediate_size=12)
    tensors = random_tensors(config, "Model")
    path = checkpoint.save(tensors, tmp_path, config, "Model", "msgpack")
    params = serialization.msgpack_restore(path.read_bytes())
    kernel = params["encoder"]["layer"]["1"]["intermediate"]["dense"]["kernel"]
    assert np.array_equal(kernel.T, tensors["roberta_prelayernorm.encoder.layer.1.intermediate.dense.weight"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("limit", [1, 8, 100, 2**10])
def test_arrays_in_pieces_are_those_of_flax(tmp_path, monkeypatch, limit, dtype):
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    monkeypatch.setattr(flax_msgpack, "LARGEST", limit)
    values = np.random.default_rng(0).standard_normal((7, 31)).astype(flax_msgpack._DTYPES[dtype])
    tree = {"a": {"0": values, "b": values[0, :2]}, "c": values.reshape(7, 1, 31)}
    flat = {"a/0": values, "a/b": values[0, :2], "c": tree["c"]}
    stored = {name: Stored(value.shape, value.dtype, partial(np.array, value)) for name, value in flat.items()}
    flax_msgpack.write(tmp_path / "ours", stored, {}, "Model")
    assert (tmp_path / "ours").read_bytes() == serialization.msgpack_serialize(tree)
    found = flax_msgpack.read(tmp_path / "ours").tensors
    assert {name: (tensor.shape, tensor.dtype, tensor.read().tobytes()) for name, tensor in found.items()} == {
        name: (value.shape, value.dtype, value.tobytes()) for name, value in flat.items()
    }


def test_pieces_that_are_cut_short(tmp_path):
    whole = msgpack.packb({"x": pieces()})
    for length in range(len(whole)):
        with pytest.raises(CheckpointError, match="cut short"):
            flax_msgpack.read(write(tmp_path, whole[:length]))
    assert len(flax_msgpack.read(write(tmp_path, whole)).tensors) == 1


def test_the_limit_is_that_of_flax():
    assert pytest.importorskip("flax.serialization").MAX_CHUNK_SIZE == flax_msgpack.LARGEST
