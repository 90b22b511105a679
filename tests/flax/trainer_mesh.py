"""What `test_trainer` lets meshes of devices do, and one device: some steps in float64.

`python -m tests.flax.trainer_mesh <case> <folder>` writes what it finds there, under the number of the process.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from roberta_pln.flax.training import Trainer
from roberta_pln.training.recipe import Recipe
from roberta_pln.training.state import start
from tests.contract import random_ids, random_tensors, tiny_config

HEAD = "ForMaskedLM"
FROZEN = "roberta_prelayernorm.encoder.layer.0.intermediate"


class Case(NamedTuple):
    """What is trained, and where."""

    parallel: str
    processes: int
    rows: int
    dropout: float
    accumulation: int


CASES = {
    # Parts of four rows, which are shared out, and of three, which are not; see `batches` for their labels.
    "all axes": Case("data=2,fsdp=2,tensor=2", 1, 7, 0.0, 2),
    "processes": Case("fsdp=2", 2, 8, 0.1, 1),  # what dropout draws does not depend on who draws it
}


def batches(rows: int) -> list[dict[str, np.ndarray]]:
    """Rows with fewer and fewer labels; in the second batch the last three have none."""
    made = []
    for step in range(2):
        ids = random_ids(rows, seed=step)
        chosen = np.random.default_rng(step).random(ids.shape) < np.linspace(0.9, 0.1, rows)[:, None]
        chosen[rows - 3 * step :] = False
        mask = np.ones_like(ids)
        mask[0, 7:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": np.where(chosen, ids, -100)})
    return made


def run(case: Case) -> tuple[Trainer, dict[str, np.ndarray]]:
    """Losses, the state behind the steps, and predictions."""
    # Two devices divide all axes but the vocabulary.
    config = tiny_config(
        intermediate_size=36,
        num_hidden_layers=1,
        hidden_dropout_prob=case.dropout,
        attention_probs_dropout_prob=case.dropout,
    )
    recipe = Recipe(precision="float64", accumulation=case.accumulation, weight_decay=0.1, clip=0.5)
    trainer = Trainer.build(config, HEAD, recipe, case.parallel)
    trainer.model.freeze(FROZEN)
    tensors = random_tensors(config, HEAD)
    trainer.restore(start({name: array.astype(np.float64) for name, array in tensors.items()}))
    losses = [float(trainer.step(batch, 1e-3)) for batch in batches(case.rows)]
    trainer.restore(now := trainer.snapshot())
    found = {f"said.{name}": array for name, array in trainer.predict(batches(case.rows)[1]).items()}
    for kind in ("weights", "first", "second"):
        found |= {f"{kind}.{name}": array for name, array in getattr(now, kind).items()}
    return trainer, {"losses": np.array(losses), "step": np.array(now.step), **found}


def held(trainer: Trainer) -> float:
    """The share of all parameters that one device holds."""
    arrays = jax.tree.leaves(trainer.model.params)
    return sum(array.addressable_shards[0].data.size for array in arrays) / sum(array.size for array in arrays)


def main(name: str, folder: str) -> None:
    trainer, found = run(CASES[name])
    rows = trainer.rows(batches(8)[0])["input_ids"].addressable_shards[0].data.shape[0]
    found |= {"held": np.array(held(trainer)), "rows": np.array(rows), "is_main": np.array(trainer.is_main)}
    np.savez(Path(folder, f"{jax.process_index()}.npz"), **found)
    trainer.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
