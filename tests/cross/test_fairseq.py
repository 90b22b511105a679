"""Genuine checkpoints of the fairseq original give fairseq's own numbers in every backend.

The reference outputs (see `tests/data/fairseq/*/README.md`) were computed by fairseq in float64. It zeroes the
embeddings of padding, so positions that hold padding are its own affair and are not compared.
"""

import importlib
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

from roberta_pln import backends
from tests.contract import DATA, load, precision

TOLERANCE = 1e-12  # some hundred roundings of numbers near 1 in float64

HEADS = {"mlm": "ForMaskedLM", "classification": "ForSequenceClassification", "hydra": "ForMaskedLM"}
BATCHES = [(name, batch) for name in HEADS for batch in ("padded", "full") if (name, batch) != ("hydra", "full")]


def reference(name, batch):
    """Ids, and fairseq's outputs under the names that `probe.run` gives them."""
    tensors = load_file(DATA / "fairseq" / name / "reference.safetensors")
    start = f"{batch}.f64."
    theirs = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    theirs = {key.replace("inner_states", "hidden_states"): value for key, value in theirs.items()}
    wanted = {key: value for key, value in theirs.items() if key == "logits" or key.startswith("hidden_states")}
    return tensors[f"{batch}.input_ids"], wanted


def outputs(backend, name, ids):
    """Hidden states before the final norm, and logits."""
    with precision(backend, "float64"), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be newly initialised
        model = load(backend, DATA / "fairseq" / name / "checkpoint.pt", HEADS[name])
        probe = importlib.import_module(f"roberta_pln.{backend}.probe")
        return probe.run(model, {"input_ids": ids, "attention_mask": (ids != 1).astype(np.int64)}, gradients=False)


@pytest.mark.parametrize(("name", "batch"), BATCHES)
@pytest.mark.parametrize("backend", backends.installed())
def test_the_original_s_numbers(backend, name, batch):
    ids, theirs = reference(name, batch)
    found = outputs(backend, name, ids)
    assert "logits" in theirs
    assert "hidden_states.1" in theirs or "hidden_states.3" in theirs
    for key, value in theirs.items():
        where = ids != 1 if value.ndim == 3 else slice(None)
        np.testing.assert_allclose(found[key][where], value[where], rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("backend", backends.installed())
def test_padding_is_where_the_original_differs(backend):
    """The control: positions that hold padding do not agree, so the comparison above can fail."""
    ids, theirs = reference("mlm", "padded")
    found = outputs(backend, "mlm", ids)
    assert np.abs(found["logits"][ids == 1] - theirs["logits"][ids == 1]).max() > 1e-3
