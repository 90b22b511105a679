"""PyTorch's pickles: what is read, what is refused, and that nothing in them runs."""

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest

from roberta_pln import checkpoint
from roberta_pln.checkpoint import CheckpointError, torch_pickle, zipped
from roberta_pln.checkpoint.stored import Stored
from roberta_pln.checkpoint.torch_pickle import Entry, _Global, _pickled
from tests.contract import random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=8, intermediate_size=12)


def write_zip(path, pickled, compression=zipfile.ZIP_STORED, byteorder=b"little", **storages):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def tensor_opcodes(size=6, offset=0, shape=(2, 3), strides=(3, 1), key="a", storage="FloatStorage"):
    """A dict {"x": tensor}."""
    place = _pickled(("storage", _Global("torch", storage), key, "cpu", size)) + b"Q"
    arguments = place + _pickled(offset) + _pickled(shape) + _pickled(strides) + _pickled(False) + b"}t"
    return (
        b"\x80\x02}"
        + _pickled("x")
        + _pickled(_Global("torch._utils", "_rebuild_tensor_v2"))
        + b"("
        + arguments
        + b"Rs."
    )


SIX = np.arange(6, dtype="<f4")

# ------------------------------------------------------------------ refused


class Attack:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(mark):
    code = f"open({mark!r}, 'w')"
    return {
        "posix.system": Attack(os.system, f"touch {mark}"),
        "builtins.eval": Attack(eval, code),
        "builtins.exec": Attack(exec, code),
        "builtins.getattr": Attack(getattr, {}, "keys"),
        "functools.partial": partial(os.system, f"touch {mark}"),
        "builtins.__import__": Attack(__import__, "os"),
        "io.open": Attack(io.open, mark, "w"),
    }


@pytest.mark.parametrize("name", attacks(""))
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_nothing_runs(tmp_path, name, protocol, form):
    mark = tmp_path / "ran"
    pickled = pickle.dumps({"x": attacks(str(mark))[name]}, protocol)
    path = tmp_path / "pytorch_model.bin"
    if form == "zip":
        write_zip(path, pickled)
    else:
        start = [torch_pickle._LEGACY_MAGIC, torch_pickle._LEGACY_PROTOCOL, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + pickled)
    with pytest.raises(CheckpointError, match=r"which is refused: a checkpoint holds names and tensors only"):
        checkpoint.open(path)
    assert not mark.exists()
    if name == "builtins.eval":  # the attack is real
        pickle.loads(pickled)
        assert mark.exists()


def test_refused_class_is_named(tmp_path):
    path = write_zip(tmp_path / "pytorch_model.bin", pickle.dumps({"x": Attack(os.system, "true")}, 2))
    with pytest.raises(CheckpointError, match=rf"asks for {os.system.__module__}\.system"):
        checkpoint.open(path)


SET_ATTRIBUTES = {  # opcodes that push a stand-in, then set attributes on it
    "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "class": b"ccollections\nOrderedDict\n",
    "storage type": b"ctorch\nFloatStorage\n",
}


@pytest.mark.parametrize("name", SET_ATTRIBUTES)
@pytest.mark.parametrize("state", [b"N}X\x05\x00\x00\x00itemsK\x01s\x86", b"}X\x05\x00\x00\x00dtypeK\x01s"])
def test_no_load_changes_the_next(tmp_path, name, state):
    good = write_zip(tmp_path / "good.bin", tensor_opcodes(), a=SIX.tobytes())
    bad = write_zip(tmp_path / "bad.bin", b"\x80\x02" + SET_ATTRIBUTES[name] + state + b"b.")
    with pytest.raises(CheckpointError):
        torch_pickle.read(bad)
    assert np.array_equal(torch_pickle.read(good).tensors["x"].read(), SIX.reshape(2, 3))


def test_attributes_of_the_dict_are_not_used(tmp_path):
    """State dicts may have attributes, so `items` can be one too."""
    ordered = b"\x80\x02ccollections\nOrderedDict\n)R"
    content = tensor_opcodes().removeprefix(b"\x80\x02}").removesuffix(b".")
    path = write_zip(tmp_path / "x.bin", ordered + content + b"}" + _pickled("items") + b"K\x01sb.", a=SIX.tobytes())
    assert list(torch_pickle.read(path).tensors) == ["x"]


OUT_OF_BOUNDS = {
    "offset": {"offset": 1},
    "negative offset": {"offset": -1},
    "stride": {"strides": (4, 1)},
    "negative stride": {"strides": (-3, 1)},
    "expanded": {"shape": (10**9, 10**9), "strides": (0, 0)},
    "shape": {"shape": (3, 3)},
    "axes": {"strides": (1,)},
    "boolean": {"offset": True},
    "storage larger than its entry": {"size": 7},
    "storage smaller than its entry": {"size": 5, "shape": (5,), "strides": (1,)},
    "negative storage": {"size": -6},
    "unknown storage": {"key": "b"},
    "huge": {"size": 2**70, "shape": (2**70,), "strides": (1,)},
}


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_sizes_are_checked(tmp_path, name):
    path = write_zip(tmp_path / "pytorch_model.bin", tensor_opcodes(**OUT_OF_BOUNDS[name]), a=SIX.tobytes())
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        torch_pickle.read(path)


NO_STATE_DICTS = {
    "list": (pickle.dumps([1], 2), "must hold a dict"),
    "nested": (pickle.dumps({"model": {}}, 2), "'model' is a dict"),
    "number": (pickle.dumps({"step": 3}, 2), "'step' is a int"),
    "no name": (pickle.dumps({3: 3}, 2), "names and tensors only"),
    "rubbish": (b"\x80\x02}q", "cut short"),
}


@pytest.mark.parametrize("name", NO_STATE_DICTS)
def test_no_state_dict(tmp_path, name):
    pickled, text = NO_STATE_DICTS[name]
    with pytest.raises(CheckpointError, match=text):
        torch_pickle.read(write_zip(tmp_path / "x.bin", pickled))


def test_other_zip_files(tmp_path):
    with pytest.raises(CheckpointError, match="without compression"):
        torch_pickle.read(write_zip(tmp_path / "x.bin", tensor_opcodes(), zipfile.ZIP_DEFLATED, a=SIX.tobytes()))
    with pytest.raises(CheckpointError, match="not little-endian"):
        torch_pickle.read(write_zip(tmp_path / "x.bin", tensor_opcodes(), byteorder=b"big", a=SIX.tobytes()))
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(CheckpointError, match=r"without data\.pkl"):
        torch_pickle.read(tmp_path / "x.bin")


def test_a_namespace_is_its_attributes(tmp_path):
    namespace = argparse.Namespace(items=3, keys="x", lr=[0.5], nothing=None)
    path = write_zip(tmp_path / "x.bin", pickle.dumps({"args": namespace}, 2))
    state, _ = torch_pickle.load(path)
    assert state == {"args": {"items": 3, "keys": "x", "lr": [0.5], "nothing": None}}
    assert isinstance(state["args"], dict)
    with pytest.raises(CheckpointError, match="'args' is a Namespace"):
        torch_pickle.read(path)


def test_equal_parts_of_the_rows(tmp_path):
    path = write_zip(tmp_path / "x.bin", tensor_opcodes(offset=1, shape=(2, 2), strides=(3, 1)), a=SIX.tobytes())
    state, places = torch_pickle.load(path)
    parts = dict(zip("ab", state["x"].split(2), strict=True))
    ours = torch_pickle.stored(path, parts, places)
    assert [ours[name].read().tolist() for name in "ab"] == [[[1, 2]], [[4, 5]]]
    with pytest.raises(CheckpointError, match=r"\(2, 2\) has no 3 equal parts"):
        state["x"].split(3)


# ------------------------------------------------------------------ read and written, with PyTorch


def test_plain_values_survive(tmp_path):
    torch = pytest.importorskip("torch")
    tensor = Stored((2,), np.dtype("<f4"), lambda: np.array([1, 2], "<f4"))
    value = {
        "none": None,
        "numbers": [0, -1, 255, 2**40, -(2**70), 0.1, -1e300, True, False],
        "text": ("", "é", "x" * 300),
        "empty": [[], (), {}, OrderedDict()],
        3: OrderedDict(a=Entry("0", tensor), b=Entry("0", tensor)),
    }
    torch_pickle.write_object(tmp_path / "x.bin", value)
    theirs = torch.load(tmp_path / "x.bin", weights_only=True)
    tensors = theirs.pop(3)
    assert type(tensors) is type(theirs["empty"][3]) is OrderedDict
    assert tensors["a"].tolist() == [1, 2]
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr()
    del value[3]
    assert theirs == value
    assert list(map(type, theirs["numbers"])) == list(map(type, value["numbers"]))
    ours, _ = torch_pickle.load(tmp_path / "x.bin")
    assert {**ours, 3: None} == {**value, 3: None}
    with pytest.raises(TypeError, match="no opcode for set"):
        torch_pickle.write_object(tmp_path / "y.bin", {"x": {1}})


def torch_tensors(torch):
    flat = torch.arange(24, dtype=torch.float32)
    return {
        "whole": flat.view(4, 6),
        "transposed": flat.view(4, 6).T,
        "window": flat.view(4, 6)[1:3, 2:5],
        "scalar": flat[7],
        "empty": flat[:0].view(0, 3),
        "half": flat.half(),
        "brain": flat.bfloat16(),
        "double": flat.double(),
        "long": flat.long(),
        "bool": flat > 3,
        "parameter": torch.nn.Parameter(flat.view(2, 12)),
        "one row": flat.as_strided((1, 3), (10**6, 1)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_pytorch_saves(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    tensors = torch_tensors(torch)
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    ours = torch_pickle.read(tmp_path / "x.bin").tensors
    for name, theirs in tensors.items():
        array = ours[name].read()
        assert array.shape == ours[name].shape == tuple(theirs.shape)
        assert array.dtype == ours[name].dtype
        assert str(theirs.dtype) == f"torch.{array.dtype.name}"
        assert array.astype(np.float64).tolist() == theirs.double().tolist()
        assert array.flags.c_contiguous
        assert array.flags.aligned


def test_state_dict_with_metadata(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "x.bin")
    assert list(torch_pickle.read(tmp_path / "x.bin").tensors) == ["weight", "bias"]


def test_pytorch_loads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = random_tensors(CONFIG, "ForMaskedLM")
    path = checkpoint.save(tensors, tmp_path, CONFIG, "ForMaskedLM", "torch")
    for mapped in (False, True):
        theirs = torch.load(path, weights_only=True, mmap=mapped)
        for name, array in tensors.items():
            assert np.array_equal(theirs[name].numpy(), array)
        for alias, name in (("decoder.bias", "bias"), ("decoder.weight", None)):
            shared = theirs[f"lm_head.{name}" if name else "roberta_prelayernorm.embeddings.word_embeddings.weight"]
            assert theirs[f"lm_head.{alias}"].data_ptr() == shared.data_ptr()
    assert len(theirs) == len(tensors) + 2


def test_storages_are_aligned(tmp_path):
    path = checkpoint.save(random_tensors(CONFIG, "Model"), tmp_path, CONFIG, "Model", "torch")
    assert {start % 64 for start, _ in zipped.places(path).values()} == {0}
