"""Texts that share rows train a model as texts in rows of their own do, in every backend."""

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from roberta_pln import backends
from roberta_pln.data.batches import collate, collate_packed
from roberta_pln.training import state
from roberta_pln.training.loop import trainer_class
from roberta_pln.training.recipe import Recipe
from tests.contract import precision, random_ids, random_tensors, tiny_config

# AdamW divides what is zero in exact arithmetic, a rounding of 1e-17, by an epsilon of 1e-8, times a rate of 1e-3:
# 1e-12 in a step; and the gradients are sums in another order.
TOLERANCE = 1e-10
CLASSES = 4
ROWS = [[5, 1, 4], [9], [2, 3, 4], [8, 2]]
"""Lengths of the texts of each row of 10."""


def features(head):
    """Texts with labels at about half of their tokens; all of the last row have none."""
    rng = np.random.default_rng(0)
    classes = 99 if head != "ForTokenClassification" else CLASSES
    rows = []
    for number, lengths in enumerate(ROWS):
        row = []
        for length in lengths:
            labels = np.where(rng.random(length) < 0.6, rng.integers(0, classes, length), -100)
            labels = labels if number < len(ROWS) - 1 else np.full(length, -100)
            ids = random_ids(1, length, seed=int(rng.integers(99)))[0]
            row.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        rows.append(row)
    return rows


def trained(backend, trainer, batch):
    """The loss, the state behind a step, and predictions."""
    with precision(backend, "float64"):
        tensors = random_tensors(trainer.model.config, trainer.model.head)
        trainer.restore(state.start({name: array.astype("float64") for name, array in tensors.items()}))
        loss = float(trainer.step(batch, 1e-3))
        return loss, trainer.snapshot().weights, trainer.predict(batch)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "ForCausalLM"])
@pytest.mark.parametrize("backend", backends.installed())
def test_a_step_is_the_same(backend, head):
    rows = features(head)
    alone = collate([feature for row in rows for feature in row], 1)
    packed = collate_packed(rows, 1, 10)
    assert packed["input_ids"].shape == (4, 10)
    config = tiny_config(num_labels=CLASSES)
    with precision(backend, "float64"):
        whole, in_shares = (
            trainer_class(backend).build(config, head, Recipe(precision="float64", accumulation=count))
            for count in (1, 4)
        )
    expected = trained(backend, whole, alone)
    for trainer in (whole, in_shares):  # the last of four shares has no label
        loss, weights, said = trained(backend, trainer, packed)
        assert abs(loss - expected[0]) < 1e-13  # roundings of sums of some dozen numbers near 5
        for name, array in expected[1].items():
            np.testing.assert_allclose(weights[name], array, rtol=0, atol=TOLERANCE, err_msg=name)
        places = [
            (row, slice(end - length, end))
            for row, lengths in enumerate(ROWS)
            for length, end in zip(lengths, np.cumsum(lengths), strict=True)
        ]
        for name, array in expected[2].items():
            for theirs, (row, at) in zip(array, places, strict=True):
                ours = said[name][row, at]
                np.testing.assert_allclose(ours, theirs[: len(ours)], rtol=0, atol=1e-8)  # weights differ by 1e-10
