"""The trainer on JAX: steps, stops, and meshes of devices.

In float64 a rounding is 1e-16 of a number; AdamW divides a gradient by its own size, and where that is zero in exact
arithmetic (as for the bias of keys) makes up to 1e-12 of roundings.
"""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from jax.sharding import Mesh

from roberta_pln.checks import InputError
from roberta_pln.flax import RobertaPreLayerNormForMaskedLM, sharding, weights
from roberta_pln.flax.training import STORED, USED, Trainer
from roberta_pln.training.recipe import CLIP_EPSILON, Recipe
from roberta_pln.training.state import start
from tests.contract import HEADS, load, padded, precision, random_checkpoint, random_ids, random_tensors, tiny_config
from tests.contract import with_labels as labelled
from tests.flax import trainer_mesh

HEAD = "ForMaskedLM"
SMALL = dict(num_hidden_layers=0)
"""Enough for what does not depend on layers, and soon compiled."""

DROPOUT = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
EMBEDDINGS = "roberta_prelayernorm.embeddings"
RATES = (1e-3, 3e-3, 2e-3, 1e-3)


TRAINERS = {}
"""Each compiles its steps once."""


def new(recipe, config=SMALL, head=HEAD):
    """A trainer at its first step."""
    key = recipe, head, tuple(config.items())
    if key not in TRAINERS:
        TRAINERS[key] = Trainer.build(tiny_config(**config), head, recipe)
    trainer = TRAINERS[key]
    trainer.model.frozen.clear()
    trainer.restore(begin(trainer.model.config, recipe, head))
    return trainer


def begin(config, recipe, head=HEAD):
    return start({name: x.astype(recipe.parameter_dtype) for name, x in random_tensors(config, head).items()})


def batch(step=0, rows=3):
    return labelled(padded(random_ids(rows, seed=step), (0, slice(7, None))), step)


def run(trainer, steps):
    """Losses of the steps with these numbers."""
    return [float(trainer.step(batch(step), RATES[step])) for step in steps]


def assert_same(ours, theirs, tolerance=0.0):
    assert ours.step == theirs.step
    for kind in ("weights", "first", "second"):
        ours_, theirs_ = getattr(ours, kind), getattr(theirs, kind)
        assert ours_.keys() == theirs_.keys()
        for name, array in ours_.items():
            assert array.dtype == theirs_[name].dtype
            np.testing.assert_allclose(array, theirs_[name], rtol=0, atol=tolerance, err_msg=f"{kind} of {name}")


def adamw(recipe, gradient, tensors, steps):
    """Losses, and the tensors behind some steps, in plain NumPy."""
    first, second = ({name: np.zeros_like(x) for name, x in tensors.items()} for _ in range(2))
    losses = []
    for step in steps:
        loss, slopes = gradient(tensors, batch(step))
        losses.append(loss)
        if recipe.clip is not None:
            norm = np.sqrt(sum((slope**2).sum() for slope in slopes.values()))
            slopes = {name: x * min(1, recipe.clip / (norm + CLIP_EPSILON)) for name, x in slopes.items()}
        tensors = dict(tensors)
        for name, g in slopes.items():
            first[name] = recipe.beta_1 * first[name] + (1 - recipe.beta_1) * g
            second[name] = recipe.beta_2 * second[name] + (1 - recipe.beta_2) * g**2
            m = first[name] / (1 - recipe.beta_1 ** (step + 1))
            v = second[name] / (1 - recipe.beta_2 ** (step + 1))
            decay = recipe.weight_decay * tensors[name] * (recipe.decayed == "all" or g.ndim > 1)
            tensors[name] = tensors[name] - RATES[step] * (m / (np.sqrt(v) + recipe.epsilon) + decay)
    return losses, tensors, first, second


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of what trainers begin with."""
    return random_checkpoint(tmp_path_factory.mktemp("model"), tiny_config(**SMALL), HEAD)


@pytest.fixture(scope="module")
def gradient(path):
    """The model's loss and its gradient, both in canonical tensors, without a trainer."""
    with precision("flax", "float64"):
        model = load("flax", path, HEAD)
        compiled = jax.jit(jax.value_and_grad(lambda params, inputs: model(**inputs, params=params).loss))

    def of(tensors, inputs):
        params = model.put([(model.parameters_of_schema[name], x) for name, x in tensors.items()], model.params)
        loss, slopes = compiled(params, inputs)
        return float(loss), weights.dump(model, slopes)

    return of


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({"clip": 100.0, "weight_decay": 0.2, "decayed": "all"}, ()),
        ({"clip": 0.1, "beta_1": 0.5, "beta_2": 0.8, "epsilon": 1e-3}, ()),
        ({"clip": 0.1}, (EMBEDDINGS,)),  # what is frozen does not count in the norm either
    ],
)
def test_steps_are_those_of_adamw(gradient, changes, frozen):
    recipe = Recipe(precision="float64", **changes)

    def of(tensors, inputs):
        loss, slopes = gradient(tensors, inputs)
        return loss, {name: x for name, x in slopes.items() if not name.startswith(frozen)}

    with precision("flax", "float64"):
        trainer = new(recipe)
        for part in frozen:
            trainer.model.freeze(part)
        losses, *found = adamw(recipe, of, begin(tiny_config(**SMALL), recipe).weights, range(4))
        assert run(trainer, range(4)) == pytest.approx(losses, abs=1e-12)
        snapshot = trainer.snapshot()
    assert_same(snapshot, type(snapshot)(4, *found), 1e-11)


def test_a_run_that_stops_goes_on_bit_for_bit():
    recipe, config = Recipe(seed=5), SMALL | DROPOUT
    trainer = new(recipe, config)
    losses = run(trainer, range(4))
    whole = trainer.snapshot()
    assert trainer._add._cache_size() == trainer._move._cache_size() == 1  # no step but the first compiles anything
    trainer.restore(begin(tiny_config(**config), recipe))
    again = run(trainer, range(2))
    stopped = trainer.snapshot()
    kept = {name: array.copy() for name, array in stopped.weights.items()}
    run(trainer, range(2, 4))
    other = Trainer.build(tiny_config(**config), HEAD, recipe)
    other.restore(stopped)
    assert again + run(other, range(2, 4)) == losses
    assert_same(other.snapshot(), whole)
    for name, array in stopped.weights.items():  # though steps reuse the memory of what they start from
        np.testing.assert_array_equal(array, kept[name])


def test_the_model_is_trained(path):
    """Its parameters are those behind the last step, in the type of the recipe."""
    recipe = Recipe(precision="float64", gradient_checkpointing=True)
    model = load("flax", path, HEAD, "float32")
    with precision("flax", "float64"):
        trainer = Trainer(model, recipe)
        before = begin(model.config, recipe)
        assert_same(trainer.snapshot(), before)
        trainer.step(batch(), 1e-3)
        behind = weights.dump(model, model.params)
    assert model.is_gradient_checkpointing
    assert (model.dtype, model.param_dtype) == ("float64", "float64")
    for name, array in before.weights.items():  # AdamW's first step has the length of the rate in every direction
        assert np.abs(behind[name] - array).max() == pytest.approx(1e-3, rel=1e-2)


def test_parts_of_a_batch_are_the_batch():
    """Also where they are more than there are rows, or have no label; see the meshes for other sizes."""
    inputs = batch(rows=2)
    inputs["labels"][1:] = -100
    with precision("flax", "float64"):
        one, many = (new(Recipe(precision="float64", accumulation=count, clip=None)) for count in (1, 3))
        assert float(many.step(inputs, 1e-3)) == pytest.approx(float(one.step(inputs, 1e-3)), abs=1e-13)
        assert_same(many.snapshot(), one.snapshot(), 1e-11)
    assert many._add._cache_size() == 1


def test_what_is_frozen_stays():
    trainer = new(Recipe())
    trainer.model.freeze(EMBEDDINGS)
    before = trainer.snapshot()
    run(trainer, [0])
    frozen = trainer.snapshot()
    for name, array in frozen.weights.items():
        assert (name in trainer.model.frozen) == name.startswith(EMBEDDINGS)
        assert np.array_equal(array, before.weights[name]) == name.startswith(EMBEDDINGS), name
        assert frozen.second[name].any() != name.startswith(EMBEDDINGS), name
    trainer.model.unfreeze(EMBEDDINGS)
    run(trainer, [1])
    assert not any(np.array_equal(array, before.weights[name]) for name, array in trainer.snapshot().weights.items())
    trainer.model.freeze(EMBEDDINGS)
    run(trainer, [2])
    assert not trainer.snapshot().first[f"{EMBEDDINGS}.word_embeddings.weight"].any()


def test_dropout_is_drawn_from_seed_step_and_part(monkeypatch):
    """With a rate of zero, and a batch of twice the same row, losses differ by it alone."""
    inputs = {name: np.concatenate([array] * 2) for name, array in batch(rows=1).items()}
    trainer = new(Recipe(accumulation=2), SMALL | DROPOUT)
    seeds = []
    monkeypatch.setattr(Recipe, "dropout_seed", lambda recipe, *numbers: seeds.append(numbers) or 7)
    losses = [float(trainer.step(inputs, 0.0)) for _ in range(2)]
    assert seeds == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert losses[0] == losses[1]
    monkeypatch.undo()
    losses += [float(trainer.step(inputs, 0.0)) for _ in range(2)]
    assert len({*losses}) == 3
    trainer.steps = 2
    assert float(trainer.step(inputs, 0.0)) == losses[2]


def test_bfloat16_computes_in_it_and_keeps_float32():
    one, other = (new(Recipe(precision=name)) for name in ("float32", "bfloat16"))
    exact, rough = run(one, range(1)), run(other, range(1))
    assert rough == pytest.approx(exact, rel=2**-6)  # its numbers have 8 binary digits
    assert rough != exact
    snapshot = other.snapshot()
    for array in (*snapshot.weights.values(), *snapshot.first.values(), *snapshot.second.values()):
        assert array.dtype == np.float32
    assert other.predict(batch())["losses"].dtype == np.float32
    assert (other.model.dtype, other.model.param_dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize("case", ["causal", "classes", "tokens", "an answer", "choices"])
def test_predictions_are_the_models(case):
    head, changes, inputs = HEADS[case]
    with precision("flax", "float64"):
        trainer = new(Recipe(precision="float64"), SMALL | DROPOUT | changes, head)
        found = trainer.predict(inputs)
        record = jax.jit(trainer.model)(**inputs)
    if head != "ForCausalLM":
        expected = {name: np.asarray(value) for name, value in record.items() if name.endswith("logits")}
    else:
        logits, labels = np.asarray(record.logits)[:, :-1], inputs["labels"].copy()
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[:, 1:, None], -1)[..., 0]
        expected = {"losses": np.pad(losses, ((0, 0), (1, 0))), "best": np.pad(logits.argmax(-1), ((0, 0), (1, 0)))}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-12)


def test_a_masked_language_model_says_nothing_where_there_is_no_label():
    inputs = batch()
    with precision("flax", "float64"):
        trainer = new(Recipe(precision="float64"))
        found = trainer.predict(inputs)
        record = jax.jit(trainer.model)(**inputs)
        nothing = trainer.predict(inputs | {"labels": np.full_like(inputs["labels"], -100)})
    chosen = inputs["labels"] != -100
    assert found["losses"].sum() / chosen.sum() == pytest.approx(float(record.loss), abs=1e-12)
    np.testing.assert_array_equal(found["best"], np.where(chosen, np.asarray(record.logits).argmax(-1), 0))
    np.testing.assert_array_equal(found["losses"] != 0, chosen)
    assert not any(array.any() for array in nothing.values())


@pytest.mark.parametrize(
    ("labels", "message"),
    [({}, "must have labels, got input_ids"), ({"labels": np.full((3, 11), 99)}, r"below 99, .* got 99")],
)
def test_predictions_that_cannot_be(labels, message):
    with pytest.raises(InputError, match=message):
        new(Recipe()).predict({"input_ids": random_ids(), **labels})


def test_what_does_not_divide_stays_whole():
    config = tiny_config(hidden_act="glu", intermediate_size=48, pruned_heads={0: [1]})  # a gate halves that size
    model = RobertaPreLayerNormForMaskedLM(config, _do_init=False)
    rules = sharding.fitting(model, SimpleNamespace(shape={"fsdp": 2, "tensor": 16}), {**STORED, **USED})
    assert {axis: over for axis, over in rules.items() if over} == {
        "hidden_size": "fsdp",
        "intermediate_size": "tensor",
    }
    assert rules.keys() == {*STORED, *USED}
    assert not any(sharding.fitting(model, SimpleNamespace(shape={"data": 2}), {**STORED, **USED}).values())


@pytest.mark.parametrize("text", ["data", "data=0", "data=1,data=1", "model=1", "data=3", "data=2,fsdp=2", "data=1 "])
def test_a_text_that_is_no_mesh(text):
    with pytest.raises(InputError, match=r"data, fsdp, tensor, such as .* number of devices \(1\), got '"):
        Trainer.build(tiny_config(), HEAD, Recipe(), text)


def test_a_mesh_of_other_axes():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(InputError, match="a mesh must have axes of data, fsdp, tensor, got model"):
        Trainer(RobertaPreLayerNormForMaskedLM(tiny_config(), _do_init=False), Recipe(), mesh)


def test_float64_needs_the_mode():
    with precision("flax", "float32"), pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        Trainer.build(tiny_config(), HEAD, Recipe(precision="float64"))


def begun(name, folder, devices):
    """The processes of a case of `trainer_mesh`; each writes its messages into the folder, under its number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    count = trainer_mesh.CASES[name].processes
    variables = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    variables["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    if count > 1:
        variables |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-m", "tests.flax.trainer_mesh", name, str(folder)]
    processes = []
    for index in range(count):
        environment = os.environ | variables | {"JAX_PROCESS_ID": str(index)}
        with open(folder / f"{index}.txt", "wb") as messages:
            processes.append(subprocess.Popen(command, env=environment, stdout=messages, stderr=messages))
    return processes


@pytest.mark.parametrize(("name", "devices", "share", "rows"), [("all axes", 8, 0.38, 2), ("processes", 1, 0.51, 4)])
def test_a_mesh_trains_as_one_device(tmp_path, name, devices, share, rows):
    """In batches that do not divide, and with labels that are not evenly spread; see `trainer_mesh`."""
    processes = begun(name, tmp_path, devices)
    try:
        with precision("flax", "float64"):
            _, expected = trainer_mesh.run(trainer_mesh.CASES[name]._replace(parallel=None, accumulation=1))
        for index, process in enumerate(processes):
            assert process.wait(timeout=200) == 0, (tmp_path / f"{index}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
    for index in range(len(processes)):
        with np.load(tmp_path / f"{index}.npz") as file:
            found = dict(file)
        assert found.pop("is_main") == (index == 0)
        assert found.pop("held") < share
        assert found.pop("rows") == rows
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-10, err_msg=key)
