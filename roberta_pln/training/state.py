"""The state of a run between two steps, in canonical tensors: what one framework stops with, another goes on with."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from roberta_pln import checkpoint, loading, schema
from roberta_pln.checkpoint import CheckpointError, safetensors_file
from roberta_pln.checks import InputError
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.schema import Parameter

Tensors = dict[str, NDArray[Any]]
"""Canonical names to arrays, in PyTorch's orientation."""

MOMENTS_FILE: Final = "moments.safetensors"
PROGRESS_FILE: Final = "progress.json"
_MOMENTS: Final = ("first", "second")


@dataclass(frozen=True)
class Snapshot:
    """What a number of steps has made of a model."""

    step: int
    """Number of optimizer steps done."""
    weights: Tensors
    first: Tensors
    """AdamW's mean of the gradient of every parameter; zero at the start, and of what is frozen."""
    second: Tensors
    """AdamW's mean of its square."""

    def require(self, names: Collection[str]) -> None:
        """See that this is the state of a model with parameters of such names.

        Raises:
            InputError: when it is not.
        """
        for kind in ("weights", *_MOMENTS):
            there = getattr(self, kind).keys()
            lacking, unknown = sorted(set(names) - there), sorted(there - set(names))
            if lacking or unknown:
                raise InputError(
                    f"{kind} of a state must be those of the parameters of the model, got one without "
                    f"{_few(lacking)}, and with {_few(unknown)} besides: build the trainer with the config and the "
                    f"head of the state"
                )


def start(weights: Tensors) -> Snapshot:
    """The state before the first step."""
    return Snapshot(0, weights, _zeros(weights), _zeros(weights))


def pretrained(
    path: str | os.PathLike[str], head: str, dtype: str, seed: int, **overrides: Any
) -> tuple[RobertaPreLayerNormConfig, Tensors]:
    """The weights of a checkpoint for a head; those it lacks are drawn, the same ones for every backend.

    Args:
        path: a checkpoint, see `loading.prepare`. What it lacks is drawn without a warning: it is to be trained.
        head: one of `schema.HEADS`.
        dtype: of the weights.
        seed: see `fresh`.
        **overrides: fields of the config.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = loading.prepare(path, head, dtype=dtype, **overrides)
    weights = {parameter.name: np.array(array) for parameter, array in loaded.tensors()}
    weights |= fresh(loaded.config, loaded.fresh(), dtype, seed)
    return loaded.config, {name: weights[name] for name in loaded.parameters}


def fresh(config: RobertaPreLayerNormConfig, parameters: Iterable[Parameter], dtype: str, seed: int) -> Tensors:
    """New weights as the schema says; each depends on the seed and its own name only.

    Args:
        config: the model's.
        parameters: such as the values of `schema.expand`.
        dtype: of the weights; they are drawn in float64.
        seed: at least 0.
    """
    drawn = {}
    for parameter in parameters:
        if parameter.initializer == "normal":
            rng = np.random.default_rng([seed, zlib.crc32(parameter.name.encode())])
            array = rng.normal(0.0, config.initializer_range, parameter.shape)
        else:
            array = np.full(parameter.shape, parameter.initializer)
        if parameter.module.padding:
            array[config.pad_token_id] = 0.0
        drawn[parameter.name] = array.astype(dtype)
    return drawn


def save(
    snapshot: Snapshot, folder: Path, config: RobertaPreLayerNormConfig, head: str, progress: Mapping[str, Any]
) -> None:
    """Write a state into an empty folder: a checkpoint that can be loaded as every other, moments and progress.

    Args:
        snapshot: weights, moments and step.
        folder: made if it is not there.
        config, head: the model's.
        progress: what else a run goes on with, as JSON can hold it.
    """
    checkpoint.save(snapshot.weights, folder, config, head)
    moments = {f"{kind}.{name}": array for kind in _MOMENTS for name, array in getattr(snapshot, kind).items()}
    save_file({name: np.ascontiguousarray(array) for name, array in moments.items()}, folder / MOMENTS_FILE)
    text = json.dumps({"step": snapshot.step, **progress}, indent=2)
    (folder / PROGRESS_FILE).write_text(text + "\n", encoding="utf-8")


def load(folder: Path, head: str, dtype: str) -> tuple[Snapshot, dict[str, Any]]:
    """Read what `save` wrote.

    Returns:
        The snapshot, and the progress.

    Raises:
        CheckpointError: when a file is missing or damaged, or moments and weights do not belong together.
    """
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        step = int(progress.pop("step"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / PROGRESS_FILE} cannot be read ({error}): the state is not whole") from error
    loaded = loading.prepare(folder, head, dtype=dtype)
    if loaded.fresh():
        raise CheckpointError(f"{folder} lacks weights of {schema.architecture(head)}: it is a state of another head")
    weights = {parameter.name: np.array(array) for parameter, array in loaded.tensors()}
    stored = safetensors_file.read(folder / MOMENTS_FILE).tensors
    expected = {f"{kind}.{name}": array.shape for kind in _MOMENTS for name, array in weights.items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if found != expected:
        wrong = sorted(name for name, _ in found.items() ^ expected.items())
        raise CheckpointError(f"moments and weights of {folder} do not belong together: {', '.join(wrong[:5])}")
    first, second = ({name: np.array(stored[f"{kind}.{name}"].read(), dtype) for name in weights} for kind in _MOMENTS)
    return Snapshot(step, weights, first, second), progress


def _few(names: list[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if names[3:] else [])]) or "nothing"


def _zeros(weights: Tensors) -> Tensors:
    return {name: np.zeros_like(array) for name, array in weights.items()}
