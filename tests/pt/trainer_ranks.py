"""What several processes compute for `test_trainer`, and one process alone.

torchrun runs this in every process, with the folder to leave results in.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from roberta_pln.pt.training import Trainer
from roberta_pln.training import state
from roberta_pln.training.recipe import Recipe
from roberta_pln.training.shares import Arrays
from tests.contract import padded, random_ids, random_tensors, tiny_config

RATES = (1e-3, 2e-3, 1e-3)
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
RELATIVE = {"position_embedding_type": "relative_key", "is_decoder": True, "add_cross_attention": True}


class Case(NamedTuple):
    """What is trained."""

    head: str = "ForMaskedLM"
    config: dict[str, Any] = {}  # noqa: RUF012  nobody changes them
    recipe: dict[str, Any] = {}  # noqa: RUF012
    rows: int = 5
    frozen: tuple[str, ...] = ()


CASES = {
    "masked": Case(),
    "untied, in parts": Case(config={"tie_word_embeddings": False}, recipe={"accumulation": 2}, rows=7),
    "fewer rows than parts": Case(recipe={"accumulation": 2}, rows=2),
    "dropout": Case(config=DROPOUT, recipe={"gradient_checkpointing": True}),
    "causal, with parameters that it does not use": Case("ForCausalLM", RELATIVE),
    "classes, with frozen layers": Case(
        "ForSequenceClassification",
        {"num_labels": 3},
        frozen=("roberta_prelayernorm.embeddings", "roberta_prelayernorm.encoder.layer.0"),
    ),
    "a regression": Case("ForSequenceClassification", {"num_labels": 1}, {"decayed": "all"}),
    "choices": Case("ForMultipleChoice"),
    "answers": Case("ForQuestionAnswering", rows=3),
    "tokens of one row": Case("ForTokenClassification", {"num_labels": 4}, {"clip": None}, rows=1),
}


def batches(case: Case) -> list[Arrays]:
    """One for each step. The first rows have most labels, and of the last batch the second half has none."""
    return [batch(case, step) for step in range(len(RATES))]


def batch(case: Case, step: int) -> Arrays:
    rng, choices = np.random.default_rng(step), 3
    ids = random_ids(case.rows * (choices if case.head == "ForMultipleChoice" else 1), 9 + step, seed=step)
    inputs = padded(ids, (0, slice(6, None)))
    if case.head == "ForMultipleChoice":
        inputs = {name: array.reshape(case.rows, choices, -1) for name, array in inputs.items()}
        return {**inputs, "labels": rng.integers(0, choices, case.rows)}
    if case.head == "ForQuestionAnswering":
        return inputs | {name: rng.integers(0, 9, case.rows) for name in ("start_positions", "end_positions")}
    if case.head == "ForSequenceClassification":
        one = case.config["num_labels"] == 1
        return {**inputs, "labels": rng.random(case.rows) if one else rng.integers(0, 3, case.rows)}
    chosen = rng.random(ids.shape) < np.linspace(0.9, 0.1, case.rows)[:, None]
    chosen[0, 2] = True
    if step == len(RATES) - 1:
        chosen[(case.rows + 1) // 2 :] = False
    return {**inputs, "labels": np.where(chosen, ids % case.config.get("num_labels", 99), -100)}


def start(case: Case, parallel: str | None = None, **changes: Any) -> Trainer:
    """A trainer with weights that are far from their first values."""
    config = tiny_config(**case.config)
    recipe = Recipe(**{"precision": "float64", "weight_decay": 0.1, "clip": 0.5, **case.recipe, **changes})
    trainer = Trainer.build(config, case.head, recipe, parallel)
    for path in case.frozen:
        trainer.model.freeze(path)
    tensors = random_tensors(config, case.head)
    trainer.restore(state.start({name: array.astype(recipe.parameter_dtype) for name, array in tensors.items()}))
    return trainer


def flat(snapshot: state.Snapshot) -> Arrays:
    """The tensors of a state under one name each."""
    kinds = ("weights", "first", "second")
    return {f"{kind}.{name}": array for kind in kinds for name, array in getattr(snapshot, kind).items()}


def run(case: Case, parallel: str | None = None, **changes: Any) -> Arrays:
    """Losses, the state after all steps, and predictions. After the first step another trainer goes on."""
    trainer, losses = start(case, parallel, **changes), []
    for step, (arrays, rate) in enumerate(zip(batches(case), RATES, strict=True)):
        if step == 1:
            before, trainer = trainer.snapshot(), start(case, parallel, **changes)
            trainer.restore(before)
        losses.append(float(trainer.step(arrays, rate)))
        said = trainer.predict(arrays)
    trainer.wait()
    snapshot = trainer.snapshot()
    said = {f"said.{name}": array for name, array in said.items()}
    return {"losses": np.array(losses), "step": np.array(snapshot.step), **said, **flat(snapshot)}


def held(parallel: str) -> float:
    """The share of all parameters that a process holds, by their number."""
    trainer = start(CASES["masked"], parallel)
    assert trainer.is_main == (torch.distributed.get_rank() == 0)
    apart = [isinstance(module, FSDPModule) for module in trainer.model.base_model.encoder.layer]
    assert apart == [parallel == "fsdp"] * 2  # one layer after the other is put together
    tensors = [getattr(parameter, "_local_tensor", parameter) for parameter in trainer.model.parameters()]
    return sum(tensor.numel() for tensor in tensors) / sum(tensor.numel() for tensor in trainer.model.parameters())


def main(folder: Path, parallels: list[str]) -> None:
    torch.set_num_threads(1)
    for parallel in parallels:
        share = held(parallel)
        for name, case in CASES.items():
            found = run(case, parallel)
            np.savez(folder / f"{parallel}, {name}, {torch.distributed.get_rank()}.npz", held=share, **found)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
