"""Checkpoints of several files, and what is refused before one is written."""

import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest

from roberta_pln import checkpoint
from roberta_pln.checkpoint import CheckpointError, shards
from tests.contract import random_tensors, tiny_config

CONFIG = tiny_config(hidden_size=8, intermediate_size=12)
INDEX = "model.safetensors.index.json"


def saved(folder, seed: int = 0, **options):
    tensors = random_tensors(CONFIG, "ForMaskedLM", seed)
    return checkpoint.save(tensors, folder, CONFIG, "ForMaskedLM", **options), tensors


def same(opened, tensors) -> bool:
    return set(opened) == set(tensors) and all(np.array_equal(opened[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("1tb", 10**12)]
)
def test_sizes(text, size):
    assert shards.size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "0", "-1GB", "5 apples", "1e9", 0])
def test_sizes_that_are_refused(text):
    with pytest.raises(CheckpointError, match="a size must be a number"):
        shards.size_in_bytes(text)


def test_shards_over_shards(tmp_path):
    """New shards have other names than those that are there, which stay whole until all is written."""
    for seed, size in enumerate(("2KB", "2KB", "3KB", "1GB", "2KB")):
        path, tensors = saved(tmp_path, seed, max_shard_size=size)
        assert path.name == ("model.safetensors" if size == "1GB" else INDEX)
        assert same(checkpoint.open(tmp_path), tensors)
        named = set() if size == "1GB" else set(json.loads(path.read_text())["weight_map"].values())
        assert {file.name for file in tmp_path.iterdir()} == {"config.json", path.name, *named}
        assert all(file.stat().st_size < 6000 for file in tmp_path.iterdir() if size != "1GB" and file.name in named)


def test_a_tensor_that_is_larger_than_a_shard(tmp_path):
    path, tensors = saved(tmp_path, max_shard_size=1)
    assert len(set(json.loads(path.read_text())["weight_map"].values())) == len(tensors)
    assert same(checkpoint.open(path), tensors)


def spoil(change):
    """A change of the index."""

    def spoiled(folder):
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoiled


BIAS = "lm_head.bias"
SPOILED = {
    "above": (
        spoil(lambda folder, places: places.update({BIAS: "../x.safetensors"})),
        "files of its own folder only",
    ),
    "absolute": (
        spoil(lambda folder, places: places.update({BIAS: "/x.safetensors"})),
        "files of its own folder only",
    ),
    "absent": (spoil(lambda folder, places: (folder / places[BIAS]).unlink()), "which is not there: the checkpoint is"),
    "unnamed": (spoil(lambda folder, places: places.pop(BIAS)), f"holds {BIAS} beside what the index names"),
    "lacking": (spoil(lambda folder, places: places.update(more=places[BIAS])), "lacks more"),
    "empty": (spoil(lambda folder, places: places.clear()), "must hold a weight_map"),
    "no names": (spoil(lambda folder, places: places.update({BIAS: 1})), "must hold a weight_map"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_indices_that_are_refused(tmp_path, name):
    change, message = SPOILED[name]
    saved(tmp_path, max_shard_size="2KB")
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tmp_path)


def test_links(tmp_path):
    """Out of the folder they are refused, but for the hub's cache, which keeps contents beside its folders."""
    _, tensors = saved(tmp_path / "cache" / "snapshots" / "main", max_shard_size="2KB")
    folder, blobs = tmp_path / "cache" / "snapshots" / "main", tmp_path / "cache" / "blobs"
    blobs.mkdir()
    for file in folder.glob("*.safetensors"):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert same(checkpoint.open(folder), tensors)
    blobs.rename(tmp_path / "elsewhere")
    for file in folder.glob("*.safetensors"):
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere" / file.name)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        checkpoint.open(folder)


def test_room_on_the_disk(tmp_path, monkeypatch):
    """Looked at before anything is written."""
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 0, 1000))
    with pytest.raises(CheckpointError, match=r"has room for 1,000 bytes, and the checkpoint needs [\d,]+"):
        saved(tmp_path / "model")
    assert os.listdir(tmp_path / "model") == []
