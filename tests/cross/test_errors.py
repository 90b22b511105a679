"""Bad input is the same error with the same words in every backend, before any wrong number is returned."""

import os
import re
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends, checkpoint
from roberta_pln.checks import InputError
from tests.contract import load, random_checkpoint, random_ids, random_tensors, tiny_config

IDS = random_ids(2, 5)

CALLS = {
    "an id above the vocabulary": (
        {"input_ids": np.array([[5, 99]])},
        r"input_ids must be at least 0 and below vocab_size \(99\), got 99",
    ),
    "an id below 0": (
        {"input_ids": np.array([[5, -1]])},
        r"input_ids must be at least 0 and below vocab_size \(99\), got -1",
    ),
    "a token type above the table": (
        {"input_ids": IDS, "token_type_ids": np.full((2, 5), 2)},
        r"token_type_ids must be at least 0 and below type_vocab_size \(2\), got 2",
    ),
    "a position above the table": (
        {"input_ids": IDS, "position_ids": np.full((2, 5), 40)},
        r"position_ids must be at least 0 and below max_position_embeddings \(40\), got 40",
    ),
    "ids that are no integers": ({"input_ids": IDS + 0.5}, "input_ids must be integers, got float"),
    "ids of one axis": ({"input_ids": IDS[0]}, r"input_ids must have shape \(any, any\), got \(5,\)"),
    "too many tokens": (
        {"input_ids": random_ids(1, 39)},
        r"a sequence must have at most 38 tokens \(max_position_embeddings - pad_token_id - 1\), got 39: shorten it",
    ),
    "too many embeddings": (
        {"inputs_embeds": np.zeros((1, 39, 32), np.float32)},
        "a sequence must have at most 38 tokens .* got 39",
    ),
    "embeddings of another width": (
        {"inputs_embeds": np.zeros((1, 3, 31), np.float32)},
        r"inputs_embeds must have shape \(any, any, 32\), got \(1, 3, 31\)",
    ),
    "ids and embeddings": (
        {"input_ids": IDS, "inputs_embeds": np.zeros((2, 5, 32), np.float32)},
        "You cannot specify both input_ids and inputs_embeds at the same time",
    ),
    "neither ids nor embeddings": (
        {"attention_mask": np.ones((2, 5), int)},
        "You have to specify either input_ids or inputs_embeds",
    ),
    "a mask of another length": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 4), int)},
        r"attention_mask must have shape \(2, 5\) or \(2, 5, 5\) or \(2, 1, 5, 5\) or \(2, 4, 5, 5\), got \(2, 4\)",
    ),
    "a mask of one key": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 1), int)},
        r"attention_mask must have shape \(2, 5\) or .* got \(2, 1\)",
    ),
    "a mask of one axis": (
        {"input_ids": IDS, "attention_mask": np.ones(5, int)},
        r"attention_mask must have shape .* got \(5,\)",
    ),
    "a mask of heads that are not there": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 3, 5, 5), int)},
        r"attention_mask must have shape .*\(2, 1, 5, 5\) or \(2, 4, 5, 5\), got \(2, 3, 5, 5\)",
    ),
    "token types of another shape": (
        {"input_ids": IDS, "token_type_ids": np.zeros((2, 4), int)},
        r"token_type_ids must have shape \(2, 5\), got \(2, 4\)",
    ),
    "positions of another shape": (
        {"input_ids": IDS, "position_ids": np.zeros((3, 5), int)},
        r"position_ids must have shape \(2, 5\) or \(1, 5\), got \(3, 5\)",
    ),
    "a head mask of another size": (
        {"input_ids": IDS, "head_mask": np.ones((3, 4))},
        r"head_mask must have shape \(4,\) or \(2, 4\), got \(3, 4\)",
    ),
    "a label above the vocabulary": (
        {"input_ids": IDS, "labels": np.full((2, 5), 99)},
        "labels must be at least 0 and below 99, or -100 to be ignored, got 99",
    ),
    "a label below 0": (
        {"input_ids": IDS, "labels": np.full((2, 5), -1)},
        "labels must be at least 0 and below 99, or -100 to be ignored, got -1",
    ),
    "labels of another shape": (
        {"input_ids": IDS, "labels": np.zeros((2, 4), int)},
        r"labels must have shape \(2, 5\), got \(2, 4\)",
    ),
}


@cache
def model(backend: str):
    with tempfile.TemporaryDirectory() as folder:
        return load(backend, random_checkpoint(Path(folder), tiny_config(), "ForMaskedLM"), "ForMaskedLM", "float32")


@pytest.mark.parametrize("backend", backends.installed())
@pytest.mark.parametrize("name", CALLS)
def test_calls(backend, name):
    arguments, message = CALLS[name]
    with pytest.raises(InputError) as refused:
        model(backend)(**{"input_ids": None, **arguments})
    assert re.match(message, str(refused.value))  # from its first word on: no framework adds its own


@pytest.mark.parametrize("backend", backends.installed())
def test_the_longest_sequence_is_taken(backend):
    """The control: one token less than what is refused above."""
    assert model(backend)(input_ids=random_ids(1, 38)).logits.shape == (1, 38, 99)


@pytest.mark.parametrize("backend", backends.installed())
def test_a_batch_without_labels_to_learn_from_has_no_loss(backend):
    assert np.isnan(float(model(backend)(input_ids=IDS, labels=np.full((2, 5), -100)).loss))


# ------------------------------------------------------------------ files


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all")


def another_architecture(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"bert.embeddings.word_embeddings.weight": np.zeros((4, 4), np.float32)}, folder / "model.safetensors")


def another_config(folder: Path) -> None:
    tiny_config(num_hidden_layers=3).save_pretrained(folder)


def another_width(folder: Path) -> None:
    tiny_config(intermediate_size=36).save_pretrained(folder)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


FILES = {
    cut_short: (checkpoint.CheckpointError, "model.safetensors"),
    no_checkpoint: (checkpoint.CheckpointError, "model.safetensors"),
    another_architecture: (checkpoint.CheckpointError, "another architecture"),
    another_config: (checkpoint.CheckpointError, r"(?s)config and the weights.*disagree.*missing: .*layer\.2"),
    another_width: (checkpoint.CheckpointError, r"(?s)disagree.*shape of .*\(37, 32\) in the checkpoint, \(36, 32\)"),
    no_weights: (FileNotFoundError, "no weight file in .*looked for model.safetensors, pytorch_model.bin"),
}


@pytest.mark.parametrize("backend", backends.installed())
@pytest.mark.parametrize("spoil", FILES, ids=lambda spoil: spoil.__name__)
def test_files(backend, spoil, tmp_path):
    error, message = FILES[spoil]
    spoil(random_checkpoint(tmp_path, tiny_config(), "ForMaskedLM"))
    with pytest.raises(error, match=message):
        load(backend, tmp_path, "ForMaskedLM")


@pytest.mark.parametrize("backend", backends.installed())
def test_a_missing_directory(backend, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(backend, tmp_path / "nowhere", "ForMaskedLM")


@pytest.mark.parametrize("backend", backends.installed())
def test_a_failed_save_leaves_the_old_files_whole(backend, tmp_path, monkeypatch):
    random_checkpoint(tmp_path, tiny_config(), "ForMaskedLM")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model(backend).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("backend", backends.installed())
def test_saving_and_loading_is_exact(backend, tmp_path):
    """In safetensors and in the framework's own format, through the framework's own parameters."""
    tensors = random_tensors(tiny_config(), "ForMaskedLM")
    for format in ("safetensors", backends.BACKENDS[backend].native_format):
        model(backend).save_pretrained(tmp_path / format, format=format)
        saved = checkpoint.open(tmp_path / format)
        assert set(saved) == set(tensors)
        assert all(np.array_equal(saved[name], tensors[name]) for name in tensors)
