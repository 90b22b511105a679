"""Every pair of backends computes the same, in float64: hidden states, logits, loss, and every gradient.

The tolerances: one rounding in float64 is about 1e-16 of a number; the sums behind an output here have some hundred
terms of size 1 over at most two layers, so 1e-12 leaves a factor of about a hundred. A wrong epsilon, activation or
mask differs by 1e-6 and more.
"""

import importlib
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends, checkpoint, parity
from tests.contract import (
    CONFIGS,
    HEADS,
    INPUTS,
    load,
    precision,
    random_checkpoint,
    random_tensors,
    tiny_config,
    with_labels,
)

OUTPUT_TOLERANCE = 1e-12
GRADIENT_TOLERANCE = 1e-11  # of the gradient's largest entry: a gradient has passed through twice as many sums

NAMES = backends.installed()
pytestmark = pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")


@cache
def model(backend: str, changes: str, head: str):
    return built(backend, CONFIGS[changes], head)


def built(backend: str, changes: dict, head: str):
    with tempfile.TemporaryDirectory() as folder, precision(backend, "float64"):
        return load(backend, random_checkpoint(Path(folder), tiny_config(**changes), head), head)


def answer(backend: str, changes: str, head: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run(backend, model(backend, changes, head), inputs)


def run(backend: str, model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with precision(backend, "float64"):
        return importlib.import_module(f"roberta_pln.{backend}.probe").run(model, inputs, gradients=True)


def failures(answers: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Every difference above the tolerance, in words."""
    found = []
    for difference in parity.differences(answers, "float64"):
        gradient = difference.name.startswith("gradient.")
        seen, allowed = (
            (difference.relative, GRADIENT_TOLERANCE) if gradient else (difference.absolute, OUTPUT_TOLERANCE)
        )
        if not seen <= allowed:
            found.append(f"{difference.name}, {difference.left} - {difference.right}: {seen:.1e} at {difference.where}")
    return found


def inputs_for(head: str, name: str) -> dict[str, np.ndarray]:
    return with_labels(INPUTS[name]) if head == "ForMaskedLM" else INPUTS[name]


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("name", INPUTS)
def test_every_input(head, name):
    assert failures({backend: answer(backend, "plain", head, inputs_for(head, name)) for backend in NAMES}) == []


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("changes", CONFIGS)
def test_every_config(head, changes):
    inputs = inputs_for(head, "padding inside")
    if changes == "another pad token":
        ids = inputs["input_ids"]
        inputs = {**inputs, "input_ids": np.where(ids == 1, 5, ids)}
    assert failures({backend: answer(backend, changes, head, inputs) for backend in NAMES}) == []


@pytest.mark.parametrize("name", ["a mask of four axes", "a head mask"])
def test_pruned_heads_take_masks_in_the_original_numbering(name):
    inputs = INPUTS[name]
    assert failures({backend: answer(backend, "pruned heads", "Model", inputs) for backend in NAMES}) == []


@pytest.mark.parametrize("name", HEADS)
def test_every_head(name):
    head, changes, inputs = HEADS[name]
    answers = {backend: run(backend, built(backend, changes, head), inputs) for backend in NAMES}
    assert ("loss" in answers[NAMES[0]]) == ("labels" in inputs or "start_positions" in inputs)
    assert all(np.isfinite(value).all() for value in answers[NAMES[0]].values())
    assert failures(answers) == []


def test_answers_are_whole():
    """What is compared above is everything: N + 1 hidden states, and a gradient for every parameter."""
    for backend in NAMES:
        found = answer(backend, "plain", "ForMaskedLM", inputs_for("ForMaskedLM", "right padding"))
        outputs = [name for name in found if not name.startswith("gradient.")]
        assert outputs == ["loss", "logits", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
        assert len(found) - len(outputs) == len(model(backend, "plain", "ForMaskedLM").parameters_of_schema)
        assert all(np.isfinite(value).all() and value.dtype == np.float64 for value in found.values())
        assert np.abs(found["gradient.lm_head.dense.weight"]).max() > 1e-3


@pytest.mark.parametrize("wrong", ["large epsilon", "relative_key"])
def test_a_wrong_config_is_seen(wrong):
    """The control: the comparison fails when one side computes something else."""
    inputs = inputs_for("Model", "right padding")
    left, right = NAMES[:2]
    found = failures({left: answer(left, "plain", "Model", inputs), right: answer(right, wrong, "Model", inputs)})
    assert any(text.startswith("last_hidden_state") for text in found)


def test_a_transposed_kernel_is_seen():
    """The control: one square kernel laid out the wrong way round."""
    inputs = inputs_for("Model", "right padding")
    answers = {NAMES[0]: answer(NAMES[0], "plain", "Model", inputs)}
    with tempfile.TemporaryDirectory() as folder, precision(NAMES[1], "float64"):
        tensors = random_tensors(tiny_config(), "Model")
        name = "roberta_prelayernorm.encoder.layer.1.attention.self.value.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)
        checkpoint.save(tensors, folder, tiny_config(), "Model")
        probe = importlib.import_module(f"roberta_pln.{NAMES[1]}.probe")
        answers[NAMES[1]] = probe.run(load(NAMES[1], Path(folder), "Model"), inputs, gradients=False)
    found = failures(answers)
    assert not any(text.startswith("hidden_states.1") for text in found)
    assert any(text.startswith("hidden_states.2") for text in found)
