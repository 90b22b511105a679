"""Canonical tensors to and from this framework's parameters, driven by the schema."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from roberta_pln import schema
from roberta_pln.schema import Parameter

if TYPE_CHECKING:
    from roberta_pln.flax.pretrained import RobertaPreLayerNormPreTrainedModel as Model

Path = tuple[str, ...]
"""Where a parameter is in the nested dicts."""


def owner(model: Model, parameter: Parameter) -> Path:
    """The path of a parameter."""
    module_path = schema.path(parameter.name, model.head).split(".")[:-1]
    return (*module_path, parameter.leaf.flax)


def get(params: Mapping[str, Any], path: Path) -> Array:
    """The framework's array of a parameter."""
    for name in path:
        params = params[name]
    return params


def shapes(model: Model) -> dict[str, Any]:
    """What initialising the module would make, without doing it."""
    return jax.eval_shape(model.module.init, model.key, jnp.zeros(model.input_shape, jnp.int32))["params"]


def check(model: Model) -> None:
    """Check that the module makes the parameters of the schema and no other.

    Raises:
        RuntimeError: when module and schema disagree, which is a fault of this library.
    """
    built = {path: value.shape for path, value in flatten_dict(shapes(model)).items()}
    told = {
        owner(model, parameter): parameter.shape[::-1] if parameter.leaf.transposed else parameter.shape
        for parameter in model.parameters_of_schema.values()
    }
    if built != told:
        raise RuntimeError(f"parameters differ from the schema in {sorted(built.items() ^ told.items())}")


def initialize(model: Model, paths: Iterable[Path], rng: Array, input_shape: tuple[int, ...]) -> dict[Path, Array]:
    """Fresh parameters as the module's initialisers make them, which say the same as the schema."""
    return 0


def nested(params: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dicts of what is at each path."""
    return unflatten_dict(params)
