"""The trainer: what a step computes, alone and on several devices, and how a run stops and goes on."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from roberta_pln import schema
from roberta_pln.checks import InputError
from roberta_pln.tf import RobertaPreLayerNormForMaskedLM, probe, weights
from roberta_pln.tf.training import Trainer
from roberta_pln.training.recipe import CLIP_EPSILON, Recipe
from roberta_pln.training.state import Snapshot
from tests.contract import random_tensors, tiny_config
from tests.tf import trainer_workers
from tests.tf.trainer_workers import DROPOUT, FROZEN, RATES, batches, begin, flat, run, said

# Where a gradient is zero in exact arithmetic, as that of the bias of the keys, AdamW divides its rounding of 1e-17 by
# an epsilon of 1e-8 and multiplies it by a rate of 1e-3: 1e-12 in a step, and ten times that where sums are larger.
TOLERANCE = 1e-10
PROCESSES = {"mirrored": 1, "multiworker": 2}


@cache
def built(*options):
    return trainer_workers.build(**{name: dict(value) if name == "config" else value for name, value in options})


def start(head="ForMaskedLM", config=None, **recipe):
    """A trainer at its start. It is compiled once for all tests that ask for the same."""
    return begin(built(("head", head), ("config", tuple((config or {}).items())), *recipe.items()))


def alike(ours, theirs, tolerance=TOLERANCE):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance, err_msg=name)


# ------------------------------------------------------------- several devices


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What every process found, in files."""
    folder, running = tmp_path_factory.mktemp("workers"), []
    for parallel, count in PROCESSES.items():
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
        for index in range(count):
            told = {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
            command = [sys.executable, "-m", "tests.tf.trainer_workers", parallel, str(folder)]
            environment, root = os.environ | (told if count > 1 else {}), Path(__file__).parents[2]
            options = dict(env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            running.append(subprocess.Popen(command, **options))
    try:
        messages = [process.communicate(timeout=600)[1] for process in running]
    finally:  # one that waits for another in vain
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), messages
    return folder


@pytest.mark.parametrize("parallel", PROCESSES)
def test_replicas_together_are_one_device(folder, parallel):
    """With dropout, which is drawn for as many parts on one device."""
    trainer = start(config=DROPOUT, accumulation=4, freeze=(FROZEN,))
    alone = run(trainer) | said(trainer)
    assert not alone[f"first.{FROZEN}.dense.weight"].any()
    for index in range(PROCESSES[parallel]):
        with np.load(folder / f"{parallel}-{index}.npz") as file:
            found = dict(file)
        assert found.pop("replicas") == 2
        assert found.pop("is_main") == (index == 0)
        alike(found, alone)


@pytest.mark.parametrize("head", [head for head in schema.HEADS if head != "Model"])
def test_parts_together_are_the_batch(head):
    """And one program is enough for batches of any size. Layers would make no difference."""
    whole, parts = (start(head, {"num_hidden_layers": 0}, accumulation=count) for count in (1, 4))
    alike(run(parts), run(whole))
    for trainer in (whole, parts):
        assert {program.experimental_get_tracing_count() for program in trainer._programs.values()} == {1}


# ------------------------------------------------------------- a step


def by_hand(trainer):
    """Losses and the state, from gradients of the whole batch and AdamW in NumPy."""
    recipe, model = trainer.recipe, trainer.model
    tensors = {name: array.astype(np.float64) for name, array in random_tensors(model.config, model.head).items()}
    first, second = ({name: np.zeros_like(array) for name, array in tensors.items()} for _ in range(2))
    losses = []
    for step, (batch, rate) in enumerate(zip(batches(), RATES, strict=True), start=1):
        weights.load(model, ((model.parameters_of_schema[name], array.copy()) for name, array in tensors.items()))
        found = probe.run(model, batch, gradients=True)
        losses.append(found["loss"])
        gradients = {name: found[f"gradient.{name}"] for name in tensors}
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        for name, p in tensors.items():
            g = gradients[name] * (1 if recipe.clip is None else min(1, recipe.clip / (norm + CLIP_EPSILON)))
            first[name] = recipe.beta_1 * first[name] + (1 - recipe.beta_1) * g
            second[name] = recipe.beta_2 * second[name] + (1 - recipe.beta_2) * g**2
            m, v = first[name] / (1 - recipe.beta_1**step), second[name] / (1 - recipe.beta_2**step)
            decay = recipe.weight_decay if recipe.decays(p.shape) else 0
            tensors[name] = p - rate * (m / (np.sqrt(v) + recipe.epsilon) + decay * p)
    return losses, flat(Snapshot(len(RATES), tensors, first, second))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": None, "decayed": "all", "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-6, "weight_decay": 0.5},
    ],
)
def test_a_step_is_adamw(changes):
    trainer = start(**changes)
    losses = [float(trainer.step(*pair)) for pair in zip(batches(), RATES, strict=True)]
    state = flat(trainer.snapshot())
    expected, tensors = by_hand(trainer)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)
    alike(state, tensors)


def test_parameters_that_are_not_used_decay():
    name = "roberta_prelayernorm.embeddings.position_embeddings.weight"
    trainer = start(config={"position_embedding_type": "relative_key", "num_hidden_layers": 0})
    before = trainer.snapshot()
    trainer.step(batches()[0], 0.01)
    after = trainer.snapshot()
    np.testing.assert_allclose(after.weights[name], before.weights[name] * (1 - 0.01 * 0.1), rtol=1e-15)  # one rounding
    assert not after.first[name].any()


def test_gradient_checkpointing_changes_nothing():
    ours, theirs = start(config=DROPOUT, gradient_checkpointing=True), start(config=DROPOUT)
    assert ours.model.is_gradient_checkpointing
    alike(run(ours), run(theirs))


# ------------------------------------------------------------- stop and go on


def test_a_run_goes_on_bit_for_bit():
    """In float32, with dropout, however the generators stand."""
    options = dict(config=DROPOUT, precision="float32", accumulation=2)
    expected = run(start(**options))
    assert all(array.dtype == np.float32 for name, array in expected.items() if name.startswith("weights."))

    trainer = start(**options)
    trainer.step(batches()[0], RATES[0])
    snapshot, trainer = trainer.snapshot(), trainer_workers.build(**options)
    trainer.restore(snapshot)
    for batch, rate in list(zip(batches(), RATES, strict=True))[1:]:
        tf.random.set_seed(3)
        trainer.model.seed_generator.next()
        trainer.step(batch, rate)
    found = flat(trainer.snapshot())
    alike(found, {name: expected[name] for name in found}, tolerance=0)


def test_a_snapshot_is_a_copy():
    trainer = start()
    trainer.step(batches()[0], 0.1)
    snapshot = trainer.snapshot()
    before = {name: array.copy() for name, array in flat(snapshot).items()}
    trainer.step(batches()[0], 0.1)
    alike(flat(snapshot), before, tolerance=0)
    trainer.restore(snapshot)
    trainer.step(batches()[0], 0.1)
    alike(flat(snapshot), before, tolerance=0)


def test_dropout_depends_on_seed_and_step_alone():
    trainer, losses = start(config=DROPOUT), []
    for steps, seed in ((0, 1), (0, 1), (0, 2), (1, 1)):
        trainer.steps, trainer.recipe = steps, replace(trainer.recipe, seed=seed)
        losses.append(float(trainer.step(batches()[0], 0.0)))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_every_part_draws_dropout_of_its_own():
    row = {name: array[:1] for name, array in batches()[0].items()}
    rows = {name: np.repeat(array, 4, axis=0) for name, array in row.items()}
    parts = start(config=DROPOUT, accumulation=4, freeze=(FROZEN,))
    assert float(parts.step(rows, 0.0)) != pytest.approx(float(start(config=DROPOUT).step(row, 0.0)), rel=1e-6)


# ------------------------------------------------------------- what is trained, and in which types


def test_what_is_frozen_for_a_while_begins_anew():
    """Without moments, and with the number of all steps."""
    trainer, (one, two, three) = start(), batches()
    trainer.step(one, 1e-3)
    before = trainer.snapshot()
    trainer.model.freeze(FROZEN)
    trainer.step(two, 1e-3)
    between = trainer.snapshot()
    for name in before.weights:
        frozen = name.startswith(FROZEN)
        assert np.array_equal(before.weights[name], between.weights[name]) == frozen
        assert (not between.first[name].any()) == (not between.second[name].any()) == frozen
    trainer.restore(before)
    assert not trainer.snapshot().first[f"{FROZEN}.dense.weight"].any()
    trainer.step(two, 1e-3)
    alike(flat(trainer.snapshot()), flat(between), tolerance=0)
    trainer.model.unfreeze(FROZEN)
    trainer.step(three, 1e-3)
    after = flat(trainer.snapshot())
    trainer.restore(between)
    trainer.step(three, 1e-3)
    alike(flat(trainer.snapshot()), after, tolerance=0)
    assert (after[f"weights.{FROZEN}.dense.weight"] != between.weights[f"{FROZEN}.dense.weight"]).any()


def test_bfloat16():
    trainers = start(), start(precision="bfloat16")
    losses = np.array([[float(trainer.step(batch, 1e-3)) for batch in batches()] for trainer in trainers])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)  # a rounding is 2**-9, and there are some in a row
    assert (losses[1] != losses[0]).all()
    assert {array.dtype.name for array in flat(trainers[1].snapshot()).values()} == {"float32"}
    assert trainers[1].predict(batches()[0])["losses"].dtype == np.float32


# ------------------------------------------------------------- predictions


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForCausalLM"])
def test_predictions_of_language_models(head):
    trainer, batch = start(head, DROPOUT), batches(head)[0]
    found = trainer.predict(batch)
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    scores = tf.nn.log_softmax(trainer.model(**inputs).logits).numpy()
    labels = batch["labels"]
    if head == "ForCausalLM":
        scores, labels = np.roll(scores, 1, axis=1), np.where(np.arange(labels.shape[1]) > 0, labels, -100)
    there = labels != -100
    losses = -np.take_along_axis(scores, np.where(there, labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["losses"], losses * there, rtol=0, atol=1e-12)
    assert np.array_equal(found["best"], scores.argmax(-1) * there)
    none = trainer.predict({**batch, "labels": np.full_like(labels, -100)})
    assert {(name, array.shape, array.any()) for name, array in none.items()} == {
        (name, labels.shape, False) for name in ("losses", "best")
    }


def test_predictions_of_other_heads():
    trainer, batch = start("ForQuestionAnswering", DROPOUT), batches("ForQuestionAnswering")[0]
    found = trainer.predict({name: array for name, array in batch.items() if "positions" not in name})
    record = trainer.model(**batch)
    alike(found, {name: record[name].numpy() for name in ("start_logits", "end_logits")}, tolerance=1e-13)
    alike(trainer.predict(batch), found, tolerance=0)


# ------------------------------------------------------------- errors


def test_another_kind_of_parallel():
    with pytest.raises(InputError, match="parallel must be mirrored or multiworker, or None for one device, got 'ddp'"):
        Trainer.build(tiny_config(), "ForMaskedLM", Recipe(), "ddp")


def test_processes_that_nobody_told_of(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(InputError, match="got no TF_CONFIG .* set it in each"):
        Trainer.build(tiny_config(), "ForMaskedLM", Recipe(), "multiworker")


def test_a_model_of_another_dtype():
    model = RobertaPreLayerNormForMaskedLM(tiny_config(num_hidden_layers=0), dtype="float32")
    with pytest.raises(InputError, match="'bfloat16' must be made with dtype='mixed_bfloat16', got 'float32'"):
        Trainer(model, Recipe(precision="bfloat16"))


def test_a_model_of_another_strategy():
    model = RobertaPreLayerNormForMaskedLM(tiny_config(num_hidden_layers=0), dtype="float32")
    with pytest.raises(InputError, match="made outside of that of this MirroredStrategy: make it within"):
        Trainer(model, Recipe(), tf.distribute.MirroredStrategy(["CPU:0"]))


def test_no_labels():
    trainer, batch = start(), batches()[0]
    with pytest.raises(InputError, match="must have a label"):
        trainer.step({**batch, "labels": np.full_like(batch["labels"], -100)}, 1e-3)
    del batch["labels"]
    with pytest.raises(InputError, match="must have labels, got input_ids, attention_mask"):
        trainer.predict(batch)
