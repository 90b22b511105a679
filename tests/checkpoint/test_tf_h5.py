"""Keras 2's HDF5 layout: its variants, and what is refused."""

import sys

import numpy as np
import pytest

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import CheckpointError
from tests.contract import random_tensors, tiny_config

h5py = pytest.importorskip("h5py")

CONFIG = tiny_config(hidden_size=8, intermediate_size=12)
MODEL = "roberta_prelayernorm/tf_roberta_pre_layer_norm_for_masked_lm/roberta_prelayernorm"
WORDS = f"{MODEL}/embeddings/word_embeddings/weight:0"


@pytest.fixture
def path(tmp_path):
    return checkpoint.save(random_tensors(CONFIG, "ForMaskedLM"), tmp_path, CONFIG, "ForMaskedLM", "h5")


def test_layout(path):
    with h5py.File(path) as file:
        assert list(file.attrs["layer_names"]) == ["roberta_prelayernorm", "lm_head"]
        names = list(file["lm_head"].attrs["weight_names"])
        assert len(names) == 5 + 5
        assert all(name in file["lm_head"] for name in names)


def split_names(file):
    for layer in file.attrs["layer_names"]:
        names = list(file[layer].attrs.pop("weight_names"))
        for part in range(3):
            file[layer].attrs[f"weight_names{part}"] = np.array([name.encode() for name in names[part::3]])


def fixed_bytes(file):
    for group, key in ((file, "layer_names"), (file["lm_head"], "weight_names")):
        group.attrs[key] = np.array([name.encode() for name in group.attrs[key]])


def layer_without_weights(file):
    file.attrs["layer_names"] = [*file.attrs["layer_names"], "dropout_37"]
    file.create_group("dropout_37").attrs["weight_names"] = np.zeros(0)


def other_model_name(file):
    for layer in file.attrs["layer_names"]:
        names = [name.partition("/")[2] for name in file[layer].attrs["weight_names"]]
        file[layer].move("tf_roberta_pre_layer_norm_for_masked_lm", "mine_1")
        file[layer].attrs["weight_names"] = [f"mine_1/{name}" for name in names]


@pytest.mark.parametrize("change", [split_names, fixed_bytes, layer_without_weights, other_model_name])
def test_variants(path, change):
    with h5py.File(path, "r+") as file:
        change(file)
    opened = checkpoint.open(path)
    for name, array in random_tensors(CONFIG, "ForMaskedLM").items():
        assert np.array_equal(opened[name], array)
    assert len(opened.dropped) == 5
    assert opened.foreign == ()


def test_repeated_embeddings_that_differ(path):
    copy = WORDS.replace("roberta_prelayernorm/", "lm_head/", 1)
    with h5py.File(path, "r+") as file:
        del file[copy]
        file[copy] = np.zeros((99, 8), np.float32)
    opened = checkpoint.open(path)
    name = f"{schema.PREFIX}.embeddings.word_embeddings.weight"
    with pytest.warns(UserWarning, match="twice with different values"):
        assert np.array_equal(opened[name], random_tensors(CONFIG, "ForMaskedLM")[name])


def soft_link(file, folder):
    file["elsewhere"] = file[WORDS]
    del file[WORDS]
    file[WORDS] = h5py.SoftLink("/elsewhere")


def external_link(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros((99, 8), np.float32)
    del file[WORDS]
    file[WORDS] = h5py.ExternalLink("other.h5", "x")


def linked_group(file, folder):
    file["elsewhere"] = file[f"{MODEL}/embeddings"]
    del file[f"{MODEL}/embeddings"]
    file[f"{MODEL}/embeddings"] = h5py.SoftLink("/elsewhere")


def external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(99 * 8 * 4))
    del file[WORDS]
    file.create_dataset(WORDS, (99, 8), np.float32, external=[(folder / "secret", 0, 99 * 8 * 4)])


def virtual(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros((99, 8), np.float32)
    layout = h5py.VirtualLayout((99, 8), np.float32)
    layout[:] = h5py.VirtualSource(folder / "other.h5", "x", (99, 8))
    del file[WORDS]
    file.create_virtual_dataset(WORDS, layout)


def compressed(file, folder):
    del file[WORDS]
    file.create_dataset(WORDS, data=np.zeros((99, 8), np.float32), compression="gzip")


def never_written(file, folder):
    del file[WORDS]
    file.create_dataset(WORDS, (10**6, 10**6), np.float32, chunks=(8, 8))


def text(file, folder):
    del file[WORDS]
    file[WORDS] = "text"


def absent(file, folder):
    del file[WORDS]


def no_names(file, folder):
    del file["lm_head"].attrs["weight_names"]


def names_of_numbers(file, folder):
    file["lm_head"].attrs["weight_names"] = np.arange(3)


REFUSED = {
    soft_link: "soft or external link",
    external_link: "soft or external link",
    linked_group: "soft or external link",
    external_storage: "in another file",
    virtual: "in another file",
    compressed: "compressed or incomplete",
    never_written: "compressed or incomplete",
    text: "dataset of numbers",
    absent: "not in it",
    no_names: "no attribute 'weight_names'",
    names_of_numbers: "must hold names",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(path, change):
    with h5py.File(path, "r+") as file:
        change(file, path.parent)
    with pytest.raises(CheckpointError, match=REFUSED[change]):
        checkpoint.open(path)


def test_only_writing_needs_h5py(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    opened = checkpoint.open(path)
    assert np.array_equal(opened["lm_head.bias"], random_tensors(CONFIG, "ForMaskedLM")["lm_head.bias"])
    with pytest.raises(ImportError, match=r"roberta_pln\[tf\]"):
        checkpoint.save(opened, path.parent, opened.config, opened.head, "h5")
