"""The recipe: learning rates, what decays, seeds, and what is refused."""

import math

import pytest

from roberta_pln.checks import InputError
from roberta_pln.training.recipe import SCHEDULES, Recipe

STEPS = 100


def rates(**settings):
    recipe = Recipe(learning_rate=2.0, **settings)
    return [recipe.rate(step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_rises_to_the_highest_rate(schedule):
    found = rates(schedule=schedule, warmup=0.06)
    assert found[:6] == pytest.approx([2 * (step + 1) / 6 for step in range(6)], rel=1e-15)  # a rounding or two
    assert found[6] == max(found) == 2.0


def test_what_follows_the_warm_up():
    assert rates(schedule="constant", warmup=0.0) == [2.0] * STEPS
    assert rates(schedule="linear", warmup=0.0, end_rate=1.0) == pytest.approx([2 - i / STEPS for i in range(STEPS)])
    cosine = rates(schedule="cosine", warmup=0.0)
    assert cosine == pytest.approx([1 + math.cos(math.pi * i / STEPS) for i in range(STEPS)])
    cubic = rates(schedule="polynomial", power=3.0, warmup=0.5)
    assert cubic[75] == 2 * 0.5**3
    assert rates(schedule="polynomial") == rates(schedule="linear")


def test_the_warm_up_is_of_whole_steps_and_may_be_the_first_alone():
    recipe = Recipe(learning_rate=1.0, warmup=0.01)
    assert [recipe.rate(step, 3) for step in range(3)] == [1.0, 1.0, 0.5]


def test_what_decays():
    assert [Recipe().decays(shape) for shape in ((3,), (3, 2))] == [False, True]
    assert Recipe(decayed="all").decays((3,))


def test_every_part_of_every_step_drops_otherwise():
    recipes = [Recipe(seed=0), Recipe(seed=1)]
    seeds = {recipe.dropout_seed(step, part) for recipe in recipes for step in range(20) for part in range(4)}
    assert len(seeds) == 160
    assert Recipe().dropout_seed(7, 1) == Recipe().dropout_seed(7, 1) < 2**32


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("learning_rate", -1.0, "a number of at least 0, got -1.0"),
        ("learning_rate", math.nan, "a number of at least 0, got nan"),
        ("schedule", "sine", "one of linear, cosine, polynomial, constant, got 'sine'"),
        ("warmup", 1, r"in \[0, 1\), got 1"),
        ("beta_2", 1.0, r"in \[0, 1\), got 1.0"),
        ("decayed", "some", "one of matrices, all, got 'some'"),
        ("clip", 0, "a positive number, or None, got 0"),
        ("accumulation", 0, "an integer of at least 1, got 0"),
        ("precision", "float16", "one of float32, bfloat16, float64, got 'float16'"),
        ("gradient_checkpointing", 1, "True or False, got 1"),
        ("freeze", ["a"], "paths of parameters"),
        ("seed", -1, "an integer of at least 0, got -1"),
    ],
)
def test_what_is_refused(name, value, rule):
    with pytest.raises(InputError, match=f"{name} must be .*{rule}"):
        Recipe(**{name: value})


def test_a_step_is_in_the_run():
    with pytest.raises(InputError, match=r"step must be in \[0, 3\), got 3"):
        Recipe().rate(3, 3)
