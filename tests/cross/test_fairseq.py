"""A genuine checkpoint of the fairseq original gives fairseq's own numbers in every backend.

The reference outputs (see `tests/data/fairseq/mlm/README.md`) were computed by fairseq in float64. It zeroes the
embeddings of padding, so positions that hold padding are its own affair and are not compared.
"""

import argparse
import importlib
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from roberta_pln import backends, checkpoint
from roberta_pln.config import RobertaPreLayerNormConfig
from tests.contract import DATA, load, precision

FOLDER = DATA / "fairseq" / "mlm"
TOLERANCE = 1e-12  # some hundred roundings of numbers near 1 in float64

MODULES = {
    r"encoder\.lm_head\.(dense|layer_norm)": r"lm_head.\1",
    r"encoder\.lm_head": "lm_head",
    r"encoder\.sentence_encoder\.embed_tokens": "roberta_prelayernorm.embeddings.word_embeddings",
    r"encoder\.sentence_encoder\.embed_positions": "roberta_prelayernorm.embeddings.position_embeddings",
    r"encoder\.sentence_encoder\.layernorm_embedding": "roberta_prelayernorm.embeddings.LayerNorm",
    r"encoder\.sentence_encoder\.layer_norm": "roberta_prelayernorm.LayerNorm",
    r"encoder\.sentence_encoder\.layers\.(\d+)": r"roberta_prelayernorm.encoder.layer.\1",
}
IN_LAYER = {
    "self_attn_layer_norm": "attention.LayerNorm",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "final_layer_norm": "intermediate.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def canonical(name: str) -> str:
    """fairseq's name of a tensor -> ours."""
    for theirs, ours in MODULES.items():
        match = re.match(theirs, name)
        if match:
            rest = name[match.end() :]
            for inside, path in IN_LAYER.items():
                rest = re.sub(rf"^\.{re.escape(inside)}(?=\.)", f".{path}", rest)
            return match.expand(ours) + rest
    raise KeyError(name)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The fairseq checkpoint as one of ours."""
    torch = pytest.importorskip("torch")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(FOLDER / "checkpoint.pt", weights_only=True)["model"]
    settings = json.loads((FOLDER / "hyperparameters.json").read_text())
    config = RobertaPreLayerNormConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["encoder_embed_dim"],
        num_hidden_layers=settings["encoder_layers"],
        num_attention_heads=settings["encoder_attention_heads"],
        intermediate_size=settings["encoder_ffn_embed_dim"],
        max_position_embeddings=settings["position_table_rows"],
        type_vocab_size=1,
        layer_norm_eps=settings["layer_norm_eps"],
    )
    tensors = {canonical(name): value.numpy() for name, value in state.items() if not name.endswith(".version")}
    tied = tensors.pop("lm_head.weight")
    word_table = tensors["roberta_prelayernorm.embeddings.word_embeddings.weight"]
    assert np.array_equal(tied, word_table)
    tensors["roberta_prelayernorm.embeddings.token_type_embeddings.weight"] = np.zeros_like(word_table[:1])
    folder = tmp_path_factory.mktemp("fairseq")
    checkpoint.save(tensors, folder, config, "ForMaskedLM")
    return folder


@pytest.fixture(scope="module")
def reference():
    return load_file(FOLDER / "reference.safetensors")


def outputs(backend, folder, ids):
    """Hidden states before the final norm, and logits, as fairseq lists them."""
    with precision(backend, "float64"):
        model = load(backend, folder, "ForMaskedLM")
        probe = importlib.import_module(f"roberta_pln.{backend}.probe")
        return probe.run(model, {"input_ids": ids, "attention_mask": (ids != 1).astype(np.int64)}, gradients=False)


@pytest.mark.parametrize("batch", ["padded", "full"])
@pytest.mark.parametrize("backend", backends.installed())
def test_the_original_s_numbers(backend, batch, converted, reference):
    ids = reference[f"{batch}.input_ids"]
    tokens = ids != 1
    found = outputs(backend, converted, ids)
    theirs = {"logits": reference[f"{batch}.f64.logits"]}
    theirs |= {f"hidden_states.{i}": reference[f"{batch}.f64.inner_states.{i}"] for i in range(4)}
    assert set(theirs) == set(found)
    for name, value in theirs.items():
        np.testing.assert_allclose(found[name][tokens], value[tokens], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("backend", backends.installed())
def test_padding_is_where_the_original_differs(backend, converted, reference):
    """The control: positions that hold padding do not agree, so the comparison above can fail."""
    ids = reference["padded.input_ids"]
    pads = ids == 1
    found = outputs(backend, converted, ids)
    assert np.abs(found["logits"][pads] - reference["padded.f64.logits"][pads]).max() > 1e-3
