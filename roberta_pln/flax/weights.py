"""Canonical tensors to and from this framework's parameters, driven by the schema."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.typing import DTypeLike

from roberta_pln import schema
from roberta_pln.checkpoint.memory import arranged
from roberta_pln.flax.layers import at_least_float32
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


def shape_of(parameter: Parameter) -> tuple[int, ...]:
    """The shape of the framework's array of a parameter."""
    return parameter.shape[::-1] if parameter.leaf.transposed else parameter.shape


def shapes(model: Model) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and type of the array at each path, as the schema says."""
    return {
        owner(model, parameter): jax.ShapeDtypeStruct(shape_of(parameter), model.param_dtype)
        for parameter in model.parameters_of_schema.values()
    }


def check(model: Model, input_shape: tuple[int, ...]) -> None:
    """Check that the module makes the parameters of the schema and no other, without making them.

    Raises:
        RuntimeError: when module and schema disagree, which is a fault of this library.
    """
    made = jax.eval_shape(model.module.init, jax.random.PRNGKey(0), jnp.zeros(input_shape, jnp.int32))
    built, told = flatten_dict(made.get("params", {})), shapes(model)
    if built != told:
        raise RuntimeError(f"parameters differ from the schema in {set(built.items()) ^ set(told.items())}")


def initialize(model: Model, parameters: Iterable[Parameter], rng: Array) -> dict[Path, Array]:
    """Fresh arrays as the schema says; the pad row of a padded table is zero.

    Every parameter has a key of its own, made of `rng` and its name, so what is drawn does not depend on what else is.
    """
    fresh = {}
    for parameter in parameters:
        shape = shape_of(parameter)
        if parameter.initializer == "normal":
            key = jax.random.fold_in(rng, np.uint32(zlib.crc32(parameter.name.encode())))
            array = normal(key, model.config.initializer_range, shape, model.param_dtype)
        else:
            array = jnp.full(shape, parameter.initializer, model.param_dtype)
        if parameter.module.padding:
            array = array.at[model.config.pad_token_id].set(0)
        fresh[owner(model, parameter)] = array
    return fresh


@partial(jax.jit, static_argnums=(2, 3))
def normal(key: Array, scale: float, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draws from N(0, scale^2), in at least float32."""
    wide = at_least_float32(dtype)
    return (jax.random.normal(key, shape, wide) * scale).astype(dtype)


def load(model: Model, tensors: Iterable[tuple[Parameter, np.ndarray]]) -> dict[Path, Array]:
    """Canonical tensors as this framework's arrays."""
    laid_out = arranged((parameter, array, parameter.leaf.transposed) for parameter, array in tensors)
    return {owner(model, parameter): to_array(array) for parameter, array in laid_out}


def dump(model: Model, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters as canonical tensors; they share memory with the arrays where they can."""
    canonical = {}
    for name, parameter in model.parameters_of_schema.items():
        array = np.asarray(get(params, owner(model, parameter)))
        canonical[name] = array.T if parameter.leaf.transposed else array
    return canonical


def to_array(array: np.ndarray) -> Array:
    """An array of the values; it may share memory with what it is made of, which nobody else may write to then."""
    with jax.ensure_compile_time_eval():  # a model may be loaded while a function that uses it is traced
        return jax.device_put(np.ascontiguousarray(array))
