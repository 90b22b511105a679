"""What `test_trainer` lets two replicas on processors do, in one process or in two, and one device.

`python -m tests.tf.trainer_workers <parallel> <folder>` writes what it finds there, under the number of the process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from roberta_pln.tf.training import Trainer
from roberta_pln.training import state
from roberta_pln.training.recipe import Recipe
from roberta_pln.training.shares import Arrays
from tests.contract import padded, random_ids, random_tensors, tiny_config

RATES = (1e-3, 2e-3, 1e-3)
ROWS = (7, 4, 3)
"""Of the batches: four shares have as many, or not, or one of them has none."""

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
FROZEN = "roberta_prelayernorm.encoder.layer.0.intermediate"
CONFIGS = {
    "ForCausalLM": {"is_decoder": True},
    "ForSequenceClassification": {"num_labels": 1},
    "ForTokenClassification": {"num_labels": 4},
}


def batches(head: str = "ForMaskedLM") -> list[Arrays]:
    """One for each step, of different lengths. First rows have most labels, and the second of four shares has none."""
    return [batch(head, step, rows) for step, rows in enumerate(ROWS)]


def batch(head: str, step: int, rows: int) -> Arrays:
    rng, length = np.random.default_rng(step), 9 + step
    if head == "ForMultipleChoice":
        inputs = padded(random_ids(rows * 3, length, seed=step), (0, slice(6, None)))
        inputs = {name: array.reshape(rows, 3, length) for name, array in inputs.items()}
        return {**inputs, "labels": rng.integers(0, 3, rows)}
    inputs = padded(random_ids(rows, length, seed=step), (0, slice(6, None)))
    if head == "ForQuestionAnswering":
        return inputs | {name: rng.integers(0, length, rows) for name in ("start_positions", "end_positions")}
    if head == "ForSequenceClassification":
        return {**inputs, "labels": rng.random(rows).astype(np.float32)}
    chosen = rng.random((rows, length)) < np.linspace(0.9, 0.1, rows)[:, None]
    chosen[:, 2] = True
    chosen[-(-rows // 4) : -(-rows // 2)] = False
    classes = CONFIGS.get(head, {}).get("num_labels", 99)
    return {**inputs, "labels": np.where(chosen, inputs["input_ids"] % classes, -100)}


def build(
    head: str = "ForMaskedLM", config: dict[str, Any] | None = None, parallel: str | None = None, **recipe: Any
) -> Trainer:
    """A trainer of a model of one layer."""
    asked = Recipe(**{"precision": "float64", "weight_decay": 0.1, "clip": 0.5, **recipe})
    changes = {"num_hidden_layers": 1, **CONFIGS.get(head, {}), **(config or {})}
    return Trainer.build(tiny_config(**changes), head, asked, parallel)


def begin(trainer: Trainer) -> Trainer:
    """The trainer, with weights that are far from their first values."""
    tensors = random_tensors(trainer.model.config, trainer.model.head)
    trainer.restore(
        state.start({name: array.astype(trainer.recipe.parameter_dtype) for name, array in tensors.items()})
    )
    return trainer


def flat(snapshot: state.Snapshot) -> Arrays:
    """The tensors of a state under one name each."""
    kinds = ("weights", "first", "second")
    return {f"{kind}.{name}": array for kind in kinds for name, array in getattr(snapshot, kind).items()}


def run(trainer: Trainer) -> Arrays:
    """Losses and the state behind all steps. Behind the first step it makes a detour, and comes back."""
    begin(trainer)
    losses = []
    for step, (arrays, rate) in enumerate(zip(batches(trainer.model.head), RATES, strict=True)):
        if step == 1:
            before = trainer.snapshot()
            trainer.step(arrays, 1.0)
            trainer.restore(before)
        losses.append(float(trainer.step(arrays, rate)))
    return {"losses": np.array(losses), "step": np.array(trainer.steps), **flat(trainer.snapshot())}


def said(trainer: Trainer) -> Arrays:
    """Predictions for all batches, which the replicas cannot share out evenly either."""
    found = [trainer.predict(arrays) for arrays in batches(trainer.model.head)]
    return {f"{name}.{number}": array for number, arrays in enumerate(found) for name, array in arrays.items()}


def main(parallel: str, folder: str) -> None:
    if parallel == "mirrored":
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
    trainer = build(config=DROPOUT, parallel=parallel, accumulation=2, freeze=(FROZEN,))
    found = run(trainer) | said(trainer)
    index = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]
    replicas = trainer.strategy.num_replicas_in_sync
    np.savez(Path(folder, f"{parallel}-{index}.npz"), is_main=trainer.is_main, replicas=replicas, **found)
    trainer.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
