"""Programs written for transformers give the same numbers after their import line is changed.

Each program in `programs/` runs as it is, and with `from transformers import` changed to this library's import; in
TensorFlow also with Keras 3 in place of tf-keras. Both start from the same checkpoint, without dropout.
"""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from roberta_pln import backends
from tests.contract import random_ids
from tests.peers.library import saved

PROGRAMS = Path(__file__).parent / "programs"
TOLERANCE = 5e-5  # roundings of 1e-7, which a few steps of training enlarge; a row trained otherwise moves 1e-3
IMPORTS = {"from transformers import": "from roberta_pln.{} import", "import tf_keras as keras": "import keras"}

# No pad tokens, though some are hidden: transformers trains the rows of the pad token in TensorFlow and Flax.
_TEXTS = {"input_ids": random_ids(8), "attention_mask": (np.arange(11) < [[11], [7], [9], [10]] * 2).astype(int)}
_ANSWERS = {"start_positions": np.arange(8) % 5, "end_positions": np.arange(8) % 5 + 2}
_HALF = np.random.default_rng(3).random((8, 11)) < 0.5
_MASKED = {**_TEXTS, "labels": np.where(_HALF, random_ids(8, seed=1), -100)}
_TAGGED = {**_TEXTS, "labels": np.where(_HALF, random_ids(8, seed=1) % 5, -100)}
_CLASSES = {**_TEXTS, "labels": np.arange(8) % 3}
_CHOICES = {
    **{name: np.stack([value, value[::-1]], axis=1) for name, value in _TEXTS.items()},
    "labels": np.arange(8) % 2,
}

CASES = {
    "pt_answer": ("ForQuestionAnswering", {}, _TEXTS | _ANSWERS),
    "pt_classify": ("ForSequenceClassification", {"num_labels": 3}, _CLASSES),
    "pt_continue": ("ForCausalLM", {}, _TEXTS),
    "pt_embed": ("Model", {}, _TEXTS),
    "pt_masked": ("ForMaskedLM", {}, _MASKED),
    "tf_answer": ("ForQuestionAnswering", {}, _TEXTS | _ANSWERS),
    "tf_choose": ("ForMultipleChoice", {}, _CHOICES),
    "tf_tag": ("ForTokenClassification", {"num_labels": 5}, _TAGGED),
    "flax_classify": ("ForSequenceClassification", {"num_labels": 3}, _CLASSES),
    "flax_embed": ("Model", {}, _TEXTS),
    "flax_masked": ("ForMaskedLM", {}, _MASKED),
}
"""The head of the checkpoint, changes of `TINY`, and the inputs."""


def run(program: Path, path: Path, inputs: dict[str, np.ndarray], folder: Path) -> dict:
    main = runpy.run_path(str(program))["main"]
    return main(str(path), {name: value.copy() for name, value in inputs.items()}, str(folder))


def translated(source: str, backend: str) -> str:
    """A program with some imports changed, and nothing else."""
    for old, new in IMPORTS.items():
        source = re.sub(f"^{old}", new.format(backend), source, flags=re.MULTILINE)
    return source


@pytest.mark.parametrize("name", CASES)
def test_programs(name, tmp_path):
    backend = name.partition("_")[0]
    if backend not in backends.installed():
        pytest.skip(f"{backend} is not installed")
    head, changes, inputs = CASES[name]
    path = saved(tmp_path, head, {"num_hidden_layers": 1, **changes}) / backend
    theirs, ours = PROGRAMS / f"{name}.py", tmp_path / f"{name}.py"
    ours.write_text(translated(theirs.read_text(encoding="utf-8"), backend), encoding="utf-8")
    assert "transformers" not in ours.read_text(encoding="utf-8")
    expected = run(theirs, path, inputs, tmp_path / "theirs")
    found = run(ours, path, inputs, tmp_path / "ours")
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=TOLERANCE, err_msg=key)
    if "losses" in expected:
        assert np.ptp(expected["losses"]) > 0.01  # it learns


def test_every_program_is_run():
    assert {path.stem for path in PROGRAMS.glob("*_*.py") if path.stem != "__init__"} == set(CASES)


def test_another_rate_is_seen(tmp_path):
    """The control: a program that learns a little faster gives other numbers."""
    head, changes, inputs = CASES["pt_masked"]
    path = saved(tmp_path, head, {"num_hidden_layers": 1, **changes}) / "pt"
    source = translated((PROGRAMS / "pt_masked.py").read_text(encoding="utf-8"), "pt")
    programs = {"as it is": source, "faster": source.replace("lr=0.1,", "lr=0.101,")}
    losses = []
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        losses.append(run(tmp_path / f"{name}.py", path, inputs, tmp_path / name)["losses"])
    assert abs(losses[0][0] - losses[1][0]) < TOLERANCE < abs(losses[0][-1] - losses[1][-1])
