"""The models of transformers beside ours: how each is loaded and called, with NumPy on both ends."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from roberta_pln import backends, checkpoint
from roberta_pln.schema import architecture
from tests.contract import random_tensors, tiny_config

PREFIX = {"pt": "", "tf": "TF", "flax": "Flax"}
"""What comes before the names of transformers' classes."""


def saved(root: Path, head: str, changes: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A checkpoint in every installed framework's own format, in a folder for each; random weights if not given."""
    config = tiny_config(**changes)
    tensors = tensors or random_tensors(config, head)
    for backend in backends.installed():
        checkpoint.save(tensors, root / backend, config, head, backends.BACKENDS[backend].native_format)
    return root


def theirs(backend: str, root: Path, head: str, **options):
    """transformers' model in one framework."""
    model_class = getattr(transformers, PREFIX[backend] + architecture(head))
    if backend != "flax":
        return model_class.from_pretrained(root / backend, **options)
    # by itself it would compile an initialisation first, and throw the result away
    model, params = model_class.from_pretrained(root / backend, _do_init=False, **options)
    model._is_initialized, model.params = True, params
    return model


def call(backend: str, model, inputs: dict, **options):
    """Call a model of either library, in inference; arrays become the framework's tensors."""
    arguments = {name: tensor(backend, value) for name, value in inputs.items()} | options
    first = arguments.pop("input_ids", None)  # by position, which all of them take
    if backend != "pt":
        return model(first, **arguments)
    import torch

    with torch.no_grad():
        return model(first, **arguments)


def tensor(backend: str, value: Any) -> Any:
    """An array as the framework's tensor."""
    if not isinstance(value, np.ndarray) or backend == "flax":
        return value
    if backend == "pt":
        import torch

        return torch.as_tensor(value)
    import tensorflow

    return tensorflow.constant(value)


def arrays(record) -> dict[str, np.ndarray]:
    """Every array of a record of either library by name; items of tuples are numbered, as in `hidden_states.0`."""
    return dict(_named(record.items()))


def _named(items):
    for name, value in items:
        if hasattr(value, "to_legacy_cache"):
            value = value.to_legacy_cache()
        if isinstance(value, tuple | list):
            yield from _named((f"{name}.{index}", item) for index, item in enumerate(value))
        elif value is not None and not isinstance(value, dict):  # a dict is the cache of transformers' Flax models
            yield name, array(value)


def array(value) -> np.ndarray:
    """A tensor of any framework as an array; PyTorch's bfloat16, which NumPy has not, as float32."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    return (value.detach().float() if str(value.dtype) == "torch.bfloat16" else value.detach()).numpy()


@contextmanager
def messages() -> Iterator[list[str]]:
    """What transformers logs as warnings."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger, verbosity = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        yield texts
    finally:
        transformers.logging.set_verbosity(verbosity)
        logger.removeHandler(handler)
