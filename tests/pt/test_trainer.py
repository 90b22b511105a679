"""The trainer: what a step computes, alone and in several processes, and how a run stops and goes on."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from roberta_pln.checks import InputError
from roberta_pln.pt import weights
from roberta_pln.pt.training import VARIABLES, Trainer
from roberta_pln.training import state
from roberta_pln.training.recipe import CLIP_EPSILON, Recipe
from tests.contract import random_tensors, tiny_config
from tests.pt.trainer_ranks import CASES, DROPOUT, RATES, Case, batches, flat, run, start

# Where a gradient is zero in exact arithmetic, as that of the bias of the keys, AdamW divides its rounding of 1e-17 by
# an epsilon of 1e-8 and multiplies it by a rate of 1e-3: 1e-12 in a step, and ten times that where sums are larger.
TOLERANCE = 1e-10
PROCESSES = 2
NO_FSDP = not hasattr(torch.cpu.Stream, "record_event")


def alike(ours, theirs, tolerance=TOLERANCE):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance, err_msg=name)


# ------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What every process found, in files."""
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m"]
    program = ["tests.pt.trainer_ranks", str(folder), "ddp", *([] if NO_FSDP else ["fsdp"])]
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, *command, *program], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def alone():
    """What one process finds, which draws dropout for as many parts."""
    return {name: run(case, accumulation=2 if case.config is DROPOUT else 1) for name, case in CASES.items()}


fsdp = pytest.param("fsdp", marks=pytest.mark.skipif(NO_FSDP, reason="FSDP of this PyTorch needs GPUs"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parallel", ["ddp", fsdp])
def test_processes_together_are_one(folder, alone, parallel, name):
    for rank in range(PROCESSES):
        with np.load(folder / f"{parallel}, {name}, {rank}.npz") as file:
            found = dict(file)
        held = found.pop("held")
        assert held == 1 if parallel == "ddp" else 0.4 < held < 0.6
        alike(found, alone[name])


@pytest.mark.parametrize("name", CASES)
def test_parts_together_are_the_batch(alone, name):
    if CASES[name].config is not DROPOUT:
        alike(run(CASES[name], accumulation=3), alone[name])


# ------------------------------------------------------------- a step


def by_hand(case: Case, recipe: Recipe):
    """Losses and the state, from PyTorch's gradients of the whole batch and AdamW in NumPy."""
    tensors = {name: array.astype(np.float64) for name, array in random_tensors(tiny_config(), case.head).items()}
    first, second = ({name: np.zeros_like(array) for name, array in tensors.items()} for _ in range(2))
    model = start(case).model.train()
    losses = []
    for step, (batch, rate) in enumerate(zip(batches(case), RATES, strict=True), start=1):
        weights.load(
            model, ((model.parameters_of_schema[name], array.copy()) for name, array in tensors.items()), "cpu"
        )
        model.tie_weights()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients = {name: weights.get(model, told).grad.numpy() for name, told in model.parameters_of_schema.items()}
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        for name, p in tensors.items():
            g = gradients[name] * (1 if recipe.clip is None else min(1, recipe.clip / (norm + CLIP_EPSILON)))
            first[name] = recipe.beta_1 * first[name] + (1 - recipe.beta_1) * g
            second[name] = recipe.beta_2 * second[name] + (1 - recipe.beta_2) * g**2
            m, v = first[name] / (1 - recipe.beta_1**step), second[name] / (1 - recipe.beta_2**step)
            decay = recipe.weight_decay if recipe.decays(p.shape) else 0
            tensors[name] = p - rate * (m / (np.sqrt(v) + recipe.epsilon) + decay * p)
    return losses, flat(state.Snapshot(len(RATES), tensors, first, second))


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.05},
        {"clip": 100.0, "decayed": "all"},
        {"clip": None, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-6, "weight_decay": 0.5},
    ],
)
def test_a_step_is_adamw(changes):
    trainer = start(CASES["masked"], **changes)
    losses = [float(trainer.step(*pair)) for pair in zip(batches(CASES["masked"]), RATES, strict=True)]
    expected, tensors = by_hand(CASES["masked"], trainer.recipe)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)
    alike(flat(trainer.snapshot()), tensors)


def test_gradients_that_were_there_do_not_count():
    case = CASES["masked"]
    trainers = [start(case), start(case)]
    for parameter in trainers[0].model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for trainer in trainers:
        trainer.step(batches(case)[0], 1e-3)
    alike(flat(trainers[0].snapshot()), flat(trainers[1].snapshot()), tolerance=0)


def test_parameters_that_are_not_used_decay():
    name = "roberta_prelayernorm.embeddings.position_embeddings.weight"
    trainer = start(CASES["causal, with parameters that it does not use"])
    before = trainer.snapshot()
    trainer.step(batches(CASES["masked"])[0], 0.01)
    after = trainer.snapshot()
    np.testing.assert_allclose(after.weights[name], before.weights[name] * (1 - 0.01 * 0.1), rtol=1e-15)  # one rounding
    assert not after.first[name].any()


# ------------------------------------------------------------- stop and go on


def test_a_run_goes_on_bit_for_bit():
    """In float32, with dropout, however PyTorch's generator stands."""
    case = Case(config=DROPOUT)
    trainer = start(case, precision="float32")
    for batch, rate in zip(batches(case), RATES, strict=True):
        trainer.step(batch, rate)
    expected = flat(trainer.snapshot())

    trainer = start(case, precision="float32")
    trainer.step(batches(case)[0], RATES[0])
    between, trainer = trainer.snapshot(), start(case, precision="float32")
    trainer.restore(between)
    for batch, rate in list(zip(batches(case), RATES, strict=True))[1:]:
        torch.rand(3)
        trainer.step(batch, rate)
    alike(flat(trainer.snapshot()), expected, tolerance=0)
    assert all(array.dtype == np.float32 for array in expected.values())


def test_a_snapshot_is_a_copy():
    trainer = start(CASES["masked"])
    snapshot = trainer.snapshot()
    before = {name: array.copy() for name, array in flat(snapshot).items()}
    trainer.step(batches(CASES["masked"])[0], 0.1)
    alike(flat(snapshot), before, tolerance=0)
    trainer.restore(snapshot)
    trainer.step(batches(CASES["masked"])[0], 0.1)
    alike(flat(snapshot), before, tolerance=0)


def test_dropout_depends_on_seed_and_step_alone():
    case, generator = Case(config=DROPOUT), torch.get_rng_state()
    losses = [float(start(case, seed=seed).step(batches(case)[0], 0.0)) for seed in (1, 1, 2)]
    trainer = start(case, seed=1)
    later = [float(trainer.step(batches(case)[0], 0.0)) for _ in range(2)]
    assert losses[0] == losses[1] == later[0]
    assert len({*losses, *later}) == 3
    assert torch.equal(torch.get_rng_state(), generator)


def test_parts_drop_other_elements():
    case = Case(config=DROPOUT)
    once = batches(case)[0]
    twice = {name: np.concatenate([array, array]) for name, array in once.items()}
    losses = [float(start(case).step(once, 0.0)), float(start(case, accumulation=2).step(twice, 0.0))]
    assert abs(losses[0] - losses[1]) > 1e-3  # were the halves to drop alike, it would be a rounding


# ------------------------------------------------------------- what is trained, and in which types


def test_frozen_parameters_stay():
    case = CASES["classes, with frozen layers"]
    trainer = start(case)
    before = trainer.snapshot()
    trainer.step(batches(case)[0], 0.1)
    after = trainer.snapshot()
    for name in before.weights:
        frozen = name.startswith(case.frozen)
        assert np.array_equal(after.weights[name], before.weights[name]) == frozen
        assert (not after.first[name].any()) == (not after.second[name].any()) == frozen


def test_what_is_frozen_for_a_while_begins_anew():
    """As it does in a trainer that goes on from there: without moments, and with the number of all steps."""
    case, name = CASES["masked"], "roberta_prelayernorm.encoder.layer.0"
    trainer = start(case)
    trainer.step(batches(case)[0], 1e-3)
    trainer.model.freeze(name)
    trainer.step(batches(case)[1], 1e-3)
    snapshot, other = trainer.snapshot(), start(case)
    assert not any(array.any() for path, array in snapshot.first.items() if path.startswith(name))
    trainer.model.unfreeze(name)
    other.restore(snapshot)
    for one in (trainer, other):
        one.step(batches(case)[2], 1e-3)
    alike(flat(trainer.snapshot()), flat(other.snapshot()), tolerance=0)


def test_bfloat16():
    case = CASES["masked"]
    trainers = [start(case, precision=precision) for precision in ("float32", "bfloat16")]
    losses = np.array([[float(trainer.step(batch, 1e-3)) for batch in batches(case)] for trainer in trainers])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)  # a rounding is 2**-9, and there are some in a row
    assert (losses[1] != losses[0]).all()
    assert all(array.dtype == np.float32 for array in flat(trainers[1].snapshot()).values())


def test_the_model_is_as_the_recipe_says():
    recipe = Recipe(gradient_checkpointing=True, precision="float64")
    trainer = Trainer.build(tiny_config(), "ForMaskedLM", recipe)
    assert trainer.model.is_gradient_checkpointing
    assert trainer.model.dtype == torch.float64
    assert trainer.model.lm_head.decoder.weight is trainer.model.get_input_embeddings().weight


# ------------------------------------------------------------- predictions


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForCausalLM"])
def test_predictions_of_language_models(head, precision):
    case = Case(head, DROPOUT)
    trainer, batch = start(case, precision=precision), batches(case)[0]
    found = trainer.predict(batch)
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    labels = inputs.pop("labels")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits = trainer.model.eval()(**inputs).logits
    logits = logits.to(torch.float64 if precision == "float64" else torch.float32)
    if head == "ForCausalLM":
        logits = logits.roll(1, dims=1)
        labels[:, 0] = -100
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    there = labels != -100
    np.testing.assert_allclose(found["losses"], losses * there, rtol=0, atol=1e-12 if precision == "float64" else 0.05)
    if precision == "float64":
        assert np.array_equal(found["best"], logits.argmax(-1) * there)
    assert found["losses"].dtype == (np.float64 if precision == "float64" else np.float32)


def test_predictions_of_other_heads():
    case = Case("ForQuestionAnswering", DROPOUT)
    trainer, batch = start(case, precision="bfloat16"), batches(case)[0]
    found = trainer.predict({name: array for name, array in batch.items() if "positions" not in name})
    assert list(found) == ["start_logits", "end_logits"]
    assert {(array.shape, array.dtype.name) for array in found.values()} == {(batch["input_ids"].shape, "float32")}
    alike(trainer.predict(batch), found, tolerance=0)


# ------------------------------------------------------------- errors


def test_another_kind_of_parallel():
    with pytest.raises(InputError, match="parallel must be ddp or fsdp, or None for one process, got 'dp'"):
        Trainer.build(tiny_config(), "ForMaskedLM", Recipe(), "dp")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_that_nobody_started(parallel, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="got no RANK, .* start them with torchrun"):
        Trainer.build(tiny_config(), "ForMaskedLM", Recipe(), parallel)


def test_no_labels():
    trainer = start(CASES["masked"])
    batch = {**batches(CASES["masked"])[0]}
    batch["labels"] = np.full_like(batch["labels"], -100)
    with pytest.raises(InputError, match="must have a label"):
        trainer.step(batch, 1e-3)
    del batch["labels"]
    with pytest.raises(InputError, match="must have labels, got input_ids, attention_mask"):
        trainer.predict(batch)
