"""Files of the efficient-MLM authors' port: RoBERTa's names and model type, but pre-LN weights."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from roberta_pln import checkpoint, loading, schema
from roberta_pln.checkpoint import CheckpointError
from tests.contract import random_tensors, tiny_config

R = schema.PREFIX
CONFIG = tiny_config(hidden_size=8, intermediate_size=12, type_vocab_size=1)
HEADS = {"ForMaskedLM": "RobertaForMaskedLM", "ForSequenceClassification": "RobertaForSequenceClassification"}
UNUSED = {
    "roberta.embeddings.position_ids": np.arange(40)[None],
    "roberta.embeddings.token_type_ids": np.zeros((1, 40), np.int64),
    **{
        f"roberta.encoder.layer.{layer}.attention.self.LayerNorm.{leaf}": np.ones(8, np.float32)
        for layer in range(2)
        for leaf in ("weight", "bias")
    },
}


def theirs(head):
    """Canonical tensors, and the same as the port's files have them."""
    tensors = random_tensors(CONFIG, head)
    renamed = {re.sub(f"^{R}", "roberta", name): array for name, array in tensors.items()}
    if head == "ForMaskedLM":
        renamed["lm_head.decoder.weight"] = tensors[f"{R}.embeddings.word_embeddings.weight"].copy()
        renamed["lm_head.decoder.bias"] = tensors["lm_head.bias"].copy()
    return tensors, renamed | UNUSED


def older(tensors):
    """The names that norms had before PyTorch's, which files converted from TensorFlow 1 keep."""
    names = {
        name: re.sub(r"(orm)\.weight$", r"\1.gamma", re.sub(r"(orm)\.bias$", r"\1.beta", name)) for name in tensors
    }
    return {names[name]: array for name, array in tensors.items()}


def config_of(head):
    values = {
        **CONFIG.to_dict(),
        "model_type": "roberta",
        "architectures": [HEADS[head]],
        "gradient_checkpointing": False,
    }
    return json.dumps(values)


def write(folder, tensors, head, form):
    """One of the forms that such a checkpoint may have."""
    (folder / "config.json").write_text(config_of(head))
    if form == "torch":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")
    elif form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({name: array for name, array in tensors.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["torch", "safetensors", "shards"])
@pytest.mark.parametrize("spelling", [dict, older])
@pytest.mark.parametrize("head", HEADS)
def test_every_form(tmp_path, head, spelling, form):
    tensors, renamed = theirs(head)
    write(tmp_path, spelling(renamed), head, form)
    loaded = loading.prepare(tmp_path, head)
    opened = loaded.checkpoint
    assert (opened.head, opened.config.model_type, opened.foreign) == (head, "roberta-prelayernorm", ())
    assert loaded.info == loading.LoadingInfo()
    assert opened.keys() == tensors.keys()
    assert all(np.array_equal(opened[name], array) for name, array in tensors.items())
    assert {*older(UNUSED), *UNUSED} >= set(opened.dropped) - {"lm_head.bias", "lm_head.decoder.weight"}
    assert len([name for name in opened.dropped if name.startswith("roberta.")]) == len(UNUSED)


@pytest.mark.filterwarnings("error")
def test_they_convert(tmp_path):
    tensors, renamed = theirs("ForMaskedLM")
    write(tmp_path, renamed, "ForMaskedLM", "safetensors")
    checkpoint.convert(tmp_path, tmp_path / "ours")
    opened = checkpoint.open(tmp_path / "ours")
    assert opened.keys() == tensors.keys()
    assert opened.config.architectures == ["RobertaPreLayerNormForMaskedLM"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "roberta-prelayernorm"


@pytest.mark.parametrize("norm", ["attention.LayerNorm", "intermediate.LayerNorm", "roberta.LayerNorm"])
def test_without_one_of_the_norms_it_is_another_model(tmp_path, norm):
    _, renamed = theirs("ForMaskedLM")
    write(tmp_path, {name: array for name, array in renamed.items() if norm not in name}, "ForMaskedLM", "safetensors")
    with pytest.raises(CheckpointError, match="post-LN model such as RoBERTa"):
        checkpoint.open(tmp_path)
