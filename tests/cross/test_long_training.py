"""A thousand steps of training are the same in every backend, in float64: alone, by turns, and in transformers' model.

The tolerances: every step adds the roundings of a gradient, 1e-16, which AdamW turns into up to 1e-12 of a step where a
gradient is zero in exact arithmetic (see test_training.py); a thousand steps add up, and what they have moved is in all
later steps, which a loss that falls does not make grow. Another epsilon, rate or decay of one step shows at 1e-8.
"""

from functools import cache

import numpy as np
import pytest

from roberta_pln import backends, checkpoint
from roberta_pln.training import state
from roberta_pln.training.loop import trainer_class
from roberta_pln.training.recipe import Recipe
from tests.contract import precision, random_checkpoint, random_ids, tiny_config

LOSS_TOLERANCE = 1e-9
PARAMETER_TOLERANCE = 1e-8
STEPS, TURN = 1000, 200
RECIPE = Recipe(learning_rate=1e-3, schedule="cosine", precision="float64")

NAMES = backends.installed()
pytestmark = pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")

HEADS = {"ForMaskedLM": {}, "ForSequenceClassification": {"num_labels": 3}}
"""Changes of the tiny config."""


def batch(head, step):
    """Sixteen different batches of texts that can be learned, again and again."""
    rng = np.random.default_rng(step % 16)
    ids = np.sort(random_ids(4, 11, seed=step % 16), -1)
    mask = np.ones_like(ids)
    mask[0, 7:] = 0
    inputs = {"input_ids": np.where(mask > 0, ids, 1), "attention_mask": mask}
    if head == "ForSequenceClassification":
        return {**inputs, "labels": ids[:, 0] % 3}
    hidden = (rng.random(ids.shape) < 0.3) & (mask > 0)
    hidden[0, 0] = True
    return {**inputs, "input_ids": np.where(hidden, 4, inputs["input_ids"]), "labels": np.where(hidden, ids, -100)}


@cache
def beginning(head, folder):
    path = random_checkpoint(folder, tiny_config(**HEADS[head]), head)
    opened = checkpoint.open(path)
    return path, opened.needed_config(), state.start({name: opened[name].astype("float64") for name in opened})


def run(backend, head, config, start, steps):
    """Losses of some steps, and the state behind them."""
    with precision(backend, "float64"):
        trainer = trainer_class(backend).build(config, head, RECIPE)
        trainer.restore(start)
        losses = [
            float(trainer.step(batch(head, step), RECIPE.rate(step, STEPS)))
            for step in range(start.step, start.step + steps)
        ]
        return losses, trainer.snapshot()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses and last state, by backend (or `by turns`) and head."""
    folders = {head: tmp_path_factory.mktemp(head) for head in HEADS}

    @cache
    def of(backend, head):
        _, config, now = beginning(head, folders[head])
        if backend != "by turns":
            return run(backend, head, config, now, STEPS)
        losses = []
        for turn in range(STEPS // TURN):
            some, now = run(NAMES[turn % len(NAMES)], head, config, now, TURN)
            losses += some
        return losses, now

    of.folders = folders
    return of


def differences(ours, theirs):
    losses = max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True))
    kinds = [(getattr(ours[1], kind), getattr(theirs[1], kind)) for kind in ("weights", "first", "second")]
    return losses, *(max(np.abs(a[name] - b[name]).max() for name in b) for a, b in kinds)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("other", [*NAMES[1:], "by turns"])
def test_a_thousand_steps_are_the_same(trained, head, other):
    losses, weights, first, second = differences(trained(other, head), trained(NAMES[0], head))
    assert losses < LOSS_TOLERANCE
    assert max(weights, first, second) < PARAMETER_TOLERANCE


@pytest.mark.parametrize("head", HEADS)
def test_something_is_learned(trained, head):
    """Else equality would be cheap."""
    losses = trained(NAMES[0], head)[0]
    assert np.mean(losses[-16:]) < np.mean(losses[:16]) / 2


def test_the_comparison_can_fail(trained):
    """One step at a rate 0.1 % higher, in the middle."""
    head = "ForSequenceClassification"
    _, config, now = beginning(head, trained.folders[head])
    with precision(NAMES[0], "float64"):
        trainer = trainer_class(NAMES[0]).build(config, head, RECIPE)
        trainer.restore(now)
        for step in range(STEPS):
            trainer.step(batch(head, step), RECIPE.rate(step, STEPS) * (1 + 1e-3 * (step == 500)))
        there = trainer.snapshot().weights
    theirs = trained(NAMES[0], head)[1].weights
    assert max(np.abs(there[name] - theirs[name]).max() for name in theirs) > PARAMETER_TOLERANCE


@pytest.mark.parametrize("head", HEADS)
def test_the_model_of_transformers_in_the_same_loop_is_the_same(trained, head):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if "pt" not in NAMES:
        pytest.skip("the loop is PyTorch's")
    from roberta_pln import schema
    from roberta_pln.pt.training import Trainer

    path, _, _ = beginning(head, trained.folders[head])
    model = getattr(transformers, schema.architecture(head)).from_pretrained(path, torch_dtype=torch.float64)
    trainer = Trainer(model, RECIPE)
    losses = [float(trainer.step(batch(head, step), RECIPE.rate(step, STEPS))) for step in range(STEPS)]
    ours, now = trained("pt", head)
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < LOSS_TOLERANCE
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    assert max(np.abs(now.weights[name] - theirs[name]).max() for name in now.weights) < PARAMETER_TOLERANCE
