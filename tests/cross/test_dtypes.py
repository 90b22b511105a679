"""Every backend loads and computes in every type, and is as near to the float64 result as the type allows."""

import importlib
import tempfile
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from roberta_pln import backends
from tests.contract import INPUTS, load, precision, random_checkpoint, tiny_config, with_labels

SPACING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance of neighbouring numbers at 1."""

ROUNDINGS = 32
"""An output of this model, which is of size 1 to 4, passes through about thirty rounded steps, each of half a spacing
of numbers up to 4; their errors add up like the square root of their number, and the largest of 3267 is looked at."""


@cache
def answer(backend: str, dtype: str):
    with tempfile.TemporaryDirectory() as folder, precision(backend, dtype):
        path = random_checkpoint(Path(folder), tiny_config(), "ForMaskedLM")
        model = load(backend, path, "ForMaskedLM", dtype)
        inputs = with_labels(INPUTS["a fully padded row"])
        return importlib.import_module(f"roberta_pln.{backend}.probe").run(model, inputs, gradients=True)


@pytest.mark.parametrize("backend", backends.installed())
@pytest.mark.parametrize("dtype", SPACING)
def test_types_and_errors(backend, dtype):
    found = answer(backend, dtype)
    exact = answer(backends.installed()[0], "float64")
    assert found["logits"].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    assert found["loss"].dtype == (np.float64 if dtype == "float64" else np.float32)
    for name in ("logits", "hidden_states.0", "hidden_states.1", "hidden_states.2"):
        error = np.abs(found[name].astype(np.float64) - exact[name])
        assert np.isfinite(error).all()
        assert error.max() <= ROUNDINGS * SPACING[dtype] * max(1.0, np.abs(exact[name]).max()), name
    gradient = found["gradient.lm_head.dense.weight"].astype(np.float64)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
