"""The state on disk, and how weights start."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from roberta_pln import backends, checkpoint, schema
from roberta_pln.checkpoint import CheckpointError
from roberta_pln.checks import InputError
from roberta_pln.training import state
from roberta_pln.training.loop import trainer_class
from roberta_pln.training.recipe import Recipe
from tests.contract import random_checkpoint, random_tensors, tiny_config

HEAD = "ForMaskedLM"
CONFIG = tiny_config()
PROGRESS = {"position": [3, 1], "best": None}


def snapshot(dtype="float32"):
    tensors = [{name: array.astype(dtype) for name, array in random_tensors(CONFIG, HEAD, i).items()} for i in range(3)]
    return state.Snapshot(17, *tensors)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "state"
    state.save(snapshot(), folder, CONFIG, HEAD, PROGRESS)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype):
    before = snapshot(dtype)
    state.save(before, tmp_path, CONFIG, HEAD, PROGRESS)
    after, progress = state.load(tmp_path, HEAD, dtype)
    assert progress == PROGRESS
    assert after.step == 17
    for kind in ("weights", "first", "second"):
        ours, theirs = getattr(after, kind), getattr(before, kind)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in ours)


def test_a_state_is_a_checkpoint(saved):
    assert np.array_equal(checkpoint.open(saved)["lm_head.bias"], snapshot().weights["lm_head.bias"])


def test_damage_is_told(saved):
    moments = saved / state.MOMENTS_FILE
    tensors = load_file(moments)
    save_file({name: array for name, array in tensors.items() if name != "first.lm_head.bias"}, moments)
    with pytest.raises(CheckpointError, match=r"do not belong together: first\.lm_head\.bias"):
        state.load(saved, HEAD, "float32")
    moments.write_bytes(moments.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        state.load(saved, HEAD, "float32")
    (saved / state.PROGRESS_FILE).write_text(json.dumps({"position": []}))
    with pytest.raises(CheckpointError, match="the state is not whole"):
        state.load(saved, HEAD, "float32")


def test_a_state_is_of_one_head(saved):
    with pytest.warns(UserWarning, match="newly"), pytest.raises(CheckpointError, match="a state of another head"):
        state.load(saved, "ForQuestionAnswering", "float32")


def test_fresh_weights_are_those_of_the_schema():
    parameters = schema.expand(CONFIG, HEAD)
    drawn = state.fresh(CONFIG, parameters.values(), "float64", 0)
    tables = [array for name, array in drawn.items() if parameters[name].initializer == "normal"]
    spread = np.concatenate([array.ravel() for array in tables])
    assert spread.std() == pytest.approx(CONFIG.initializer_range, rel=0.03)  # 20,000 draws: 0.5 % is a standard error
    assert not drawn["roberta_prelayernorm.embeddings.word_embeddings.weight"][CONFIG.pad_token_id].any()
    assert (drawn["roberta_prelayernorm.LayerNorm.weight"] == 1).all()
    assert len({array.ravel()[:8].tobytes() for array in tables}) == len(tables)
    name = "lm_head.dense.weight"
    assert np.array_equal(state.fresh(CONFIG, [parameters[name]], "float64", 0)[name], drawn[name])
    assert not np.array_equal(state.fresh(CONFIG, [parameters[name]], "float64", 1)[name], drawn[name])


def test_a_new_head_is_drawn_without_a_warning(tmp_path):
    path = random_checkpoint(tmp_path, CONFIG, HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, weights = state.pretrained(path, "ForTokenClassification", "float32", 0, num_labels=5)
    assert config.num_labels == 5
    assert weights.keys() == schema.expand(config, "ForTokenClassification").keys()
    name = "roberta_prelayernorm.LayerNorm.bias"
    assert np.array_equal(weights[name], random_tensors(CONFIG, HEAD)[name])
    assert weights["classifier.weight"].std() == pytest.approx(CONFIG.initializer_range, rel=0.3)  # 160 draws


@pytest.mark.parametrize("backend", backends.installed())
def test_the_state_of_another_head_is_refused(backend):
    trainer = trainer_class(backend).build(CONFIG, "ForTokenClassification", Recipe())
    with pytest.raises(
        InputError,
        match=r"got one without classifier.bias, classifier.weight, and with lm_head.bias, .* besides: build",
    ):
        trainer.restore(snapshot())
