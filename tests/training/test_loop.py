"""Runs: what is learned, stopped, gone on with in another framework, kept, told and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("tensorboardX")

from roberta_pln import backends, checkpoint
from roberta_pln.checkpoint import CheckpointError
from roberta_pln.checks import InputError
from roberta_pln.training import log, state
from roberta_pln.training.loop import Run, TrainingError
from roberta_pln.training.settings import Settings
from roberta_pln.training.tasks import TASKS

ROOT = Path(__file__).parents[2]
NAMES = backends.installed()
FIRST = NAMES[0]


@pytest.fixture
def values(model, files, tmp_path):
    """The settings of a classification of 15 steps, as flat keys."""

    def of(task="classification", **changes):
        asked = {"model": str(model), "output": str(tmp_path / "run"), "learning_rate": 1e-3, "batch_size": 8}
        return {"task": task, "backend": FIRST, "save_every": 4, "log_every": 3, **files(task), **asked, **changes}

    return of


def trained(values, **options):
    return Run(Settings.of(values), **options).train()


def weights(folder):
    opened = checkpoint.open(folder)
    return {name: opened[name] for name in opened}


def same(left, right):
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("backend", NAMES)
def test_every_task_is_learned(values, task, backend):
    """The loss falls, and what was measured is kept with the model."""
    asked = values(task, backend=backend, epochs=4, precision="float32", dropout=0.0, max_length=32)
    found = trained(asked)
    folder = Path(asked["output"])
    lines = log.read(folder / log.LOG_FILE)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == found
    assert tuple(found) == TASKS[task].metrics
    assert checkpoint.open(folder).head == TASKS[task].head
    measured = [line["eval"] for line in lines if "eval" in line]
    assert len(measured) == 4
    sign = -1 if TASKS[task].metrics[0] == "loss" else 1
    assert sign * results["metrics"][TASKS[task].metrics[0]] == max(sign * m[TASKS[task].metrics[0]] for m in measured)


@pytest.mark.parametrize("task", ["masked-lm", "token-classification"])
def test_short_texts_share_rows(values, task):
    """As much is learned in fewer rows."""
    asked = values(task, pack=True, epochs=4, dropout=0.0, batch_size=4, join=False)
    trained(asked)
    losses = [line["loss"] for line in log.read(Path(asked["output"]) / log.LOG_FILE) if "loss" in line]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])


def test_whole_texts_with_a_label_do_not_share_rows(values):
    with pytest.raises(InputError, match=r"as masked-lm and token-classification have it, got labels that does not"):
        trained(values(pack=True))


def test_the_result_is_loaded_like_every_model(values):
    trained(values(steps=3))
    output = values()["output"]
    made = backends.BACKENDS[FIRST].model_class("ForSequenceClassification").from_pretrained(output)
    assert made.config.id2label == {0: "ground", 1: "sky"}
    assert (Path(output) / "tokenizer.json").is_file()
    assert (Path(output) / log.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert any((Path(output) / log.EVENTS_FOLDER).iterdir())


def test_the_best_model_is_kept_and_a_run_without_hope_ends(values):
    asked = values(learning_rate=0.0, schedule="constant", patience=2, epochs=9, eval_every=1)
    found = trained(asked)
    results = json.loads((Path(asked["output"]) / "results.json").read_text())
    assert results == {"steps": 3, "seconds": results["seconds"], "step": 1, "metrics": found}
    assert same(asked["output"], Path(asked["output"]) / "best")


def test_new_weights_instead_of_those_of_the_checkpoint(values, model):
    trained(values(fresh=True, steps=1, learning_rate=0.0))
    name = "roberta_prelayernorm.LayerNorm.weight"
    assert (weights(values()["output"])[name] == 1).all()
    assert not (weights(model)[name] == 1).all()


def test_what_is_frozen_stays(values, model):
    trained(values(steps=3, freeze=["roberta_prelayernorm"]))
    ours, theirs = weights(values()["output"]), weights(model)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours if name in theirs)
    assert ours["classifier.out_proj.bias"].any()


# ---------------------------------------------------------------------- stop, and go on


@pytest.fixture
def whole(values, tmp_path):
    """A run without interruption."""
    asked = values(output=str(tmp_path / "whole"))
    trained(asked)
    return tmp_path / "whole"


def test_stopped_twice_is_the_same_bit_for_bit(values, whole):
    for until in (4, 9, None):
        found = trained(values(until=until))
    assert same(whole, values()["output"])
    assert found == json.loads((whole / "results.json").read_text())["metrics"]
    lines = [
        [{key: line[key] for key in line if key != "seconds"} for line in log.read(Path(folder) / log.LOG_FILE)]
        for folder in (whole, values()["output"])
    ]
    assert lines[0] == lines[1]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")
def test_killed_at_any_moment_is_the_same_bit_for_bit(values, whole):
    """Killed five times, between two steps, in one, or between the writing of two files."""
    asked = values(save_every=1)
    command = [sys.executable, "-m", "roberta_pln", "train"]
    for name, value in asked.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    kills = 0
    folder = Path(asked["output"])
    rng = np.random.default_rng(0)
    for _ in range(5):
        before = progress(folder)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and progress(folder) < before + 2:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if process.returncode == 0:
            break
    assert kills >= 3, "the run was not killed often enough to test anything"
    trained(values(save_every=1))
    assert same(whole, folder)


def progress(folder):
    """Steps of the state on disk; -1 before there is one."""
    try:
        return json.loads((folder / "state" / state.PROGRESS_FILE).read_text())["step"]
    except (OSError, ValueError):
        return -1


@pytest.mark.skipif(len(NAMES) < 2, reason="needs two backends")
def test_begun_in_one_framework_and_ended_in_another(values, tmp_path, monkeypatch):
    """In float64 without dropout the weights are those of one framework alone, but for roundings."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    options = {"precision": "float64", "dropout": 0.0}
    alone = values(output=str(tmp_path / "alone"), **options)
    with wide():
        trained(alone)
        for until, backend in zip((4, 9, None), [*NAMES, *NAMES], strict=False):
            trained(values(until=until, backend=backend, **options))
    ours, theirs = weights(values()["output"]), weights(alone["output"])
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-10  # AdamW: see cross/test_training.py


def wide():
    from tests.contract import precision

    return precision("flax", "float64")


def test_a_run_that_is_done_stays_done(values, whole):
    before = (whole / "model.safetensors").read_bytes()
    assert trained(values(output=str(whole))) == json.loads((whole / "results.json").read_text())["metrics"]
    assert (whole / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------- what is refused


def test_a_run_goes_on_as_it_was_begun(values, files, tmp_path):
    trained(values(until=4))
    with pytest.raises(InputError, match="begun otherwise: epochs was 3 and is 5; seed was 0 and is 1. To go on, give"):
        trained(values(epochs=5, seed=1))
    other = tmp_path / "other.jsonl"
    other.write_text(Path(files("classification")["train"]).read_text().replace("earth", "water"))
    with pytest.raises(InputError, match="the file of train has other content than before"):
        trained(values(train=str(other)))
    trained(values(epochs=1), overwrite=True)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 5


def test_nothing_is_overwritten_without_being_asked(values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output must be a new directory, .* which holds thesis.txt"):
        trained(values())
    trained(values(steps=1), overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_loss_that_is_no_number_stops_the_run(values, tmp_path):
    """From a good state on, with weights that give NaN."""
    trained(values(until=4))
    folder = tmp_path / "run" / "state"
    before, progress = state.load(folder, "ForSequenceClassification", "float32")
    before.weights["classifier.dense.bias"][0] = np.nan
    config = checkpoint.open(folder).config
    shutil.rmtree(folder)
    state.save(before, folder, config, "ForSequenceClassification", progress)
    with pytest.raises(TrainingError, match=r"must be a finite number, got nan in step 5; an earlier state is kept"):
        trained(values())
    assert state.load(folder, "ForSequenceClassification", "float32")[0].step == 4


def test_damage_is_told(values, tmp_path):
    trained(values(until=4))
    (tmp_path / "run" / "state" / state.PROGRESS_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="the state is not whole"):
        trained(values())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 1|JSON"),
        ('{"text": "a"}', "label"),
        ("", "empty|at least one"),
    ],
)
def test_bad_examples(values, tmp_path, record, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(record and record + "\n")
    with pytest.raises(InputError, match=message):
        trained(values(train=str(bad)))
    assert not (tmp_path / "run").exists()


def test_labels_are_those_of_the_training_examples(values, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the sea", "label": "sea"}\n')
    with pytest.raises(InputError, match="one of the known ones"):
        trained(values(eval=str(other)))


def test_labels_are_those_that_the_model_knows(values, tmp_path):
    trained(values(steps=1))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the sea", "label": "sea"}\n{"text": "the sky", "label": "sky"}\n')
    with pytest.raises(InputError, match=r"known ones \(ground, sky\), got 'sea'"):
        trained(values(model=values()["output"], output=str(tmp_path / "next"), train=str(other)))


def test_rows_fit_the_model(values):
    with pytest.raises(InputError, match="max_length must be at most 38, which the model can take, got 39"):
        trained(values(max_length=39))
