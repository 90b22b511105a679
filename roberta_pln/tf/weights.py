"""Canonical tensors to and from this framework's parameters, driven by the schema."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from roberta_pln import schema
from roberta_pln.checkpoint.memory import arranged, can_be_taken_over
from roberta_pln.schema import Parameter

_blank = ContextVar("blank", default=False)


@contextmanager
def left_blank() -> Iterator[None]:
    """Models constructed in this context are not initialised: their weights come from somewhere else."""
    token = _blank.set(True)
    try:
        yield
    finally:
        _blank.reset(token)


def owner(model: keras.Model, parameter: Parameter) -> tuple[keras.Layer, str]:
    """The layer that holds a parameter, and the parameter's name in it."""
    layer = model
    for part in schema.path(parameter.name, model.head).split(".")[:-1]:
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    return layer, parameter.leaf.tf


def get(model: keras.Model, parameter: Parameter) -> keras.Variable:
    """The framework's array of a parameter."""
    layer, name = owner(model, parameter)
    return getattr(layer, name)


def check(model: keras.Model) -> None:
    """Check that the model holds the parameters of the schema and no other.

    Raises:
        RuntimeError: when construction and schema disagree, which is a fault of this library.
    """
    built = {id(variable): tuple(variable.shape) for variable in model.weights}
    told = {
        id(get(model, parameter)): parameter.shape[::-1] if parameter.leaf.transposed else parameter.shape
        for parameter in model.parameters_of_schema.values()
    }
    if built != told:
        wrong = [variable.path for variable in model.weights if told.get(id(variable)) != tuple(variable.shape)]
        raise RuntimeError(
            f"parameters differ from the schema: {len(built)} built, {len(told)} told, among them {wrong}"
        )


def initialize(model: keras.Model, parameters: Iterable[Parameter]) -> None:
    """Fill parameters as the schema says; the pad row of a padded table is zero. Draws in float32 from the
    model's generator, so that a seed gives the same weights in every dtype."""
    if _blank.get():
        return
    for parameter in parameters:
        variable = get(model, parameter)
        if parameter.initializer != "normal":
            variable.assign(np.full(variable.shape, parameter.initializer))
            continue
        values = keras.random.normal(
            variable.shape, stddev=model.config.initializer_range, dtype="float32", seed=model.seed_generator
        )
        if parameter.module.padding:
            values = tf.where(np.arange(len(values))[:, None] == model.config.pad_token_id, 0.0, values)
        variable.assign(values)


def load(model: keras.Model, tensors: Iterable[tuple[Parameter, np.ndarray]]) -> None:
    """Put canonical tensors in place; a tensor may have another shape than the one before.

    The variables take over the arrays' memory where they can: nobody else may use it then.
    """
    place(model, laid_out(tensors))


def laid_out(tensors: Iterable[tuple[Parameter, np.ndarray]]) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Canonical tensors as this framework has them, in memory that it can take over."""
    return arranged((parameter, array, parameter.leaf.transposed) for parameter, array in tensors)


def place(model: keras.Model, arrays: Iterable[tuple[Parameter, np.ndarray]]) -> None:
    """Put what `laid_out` gives in place."""
    for parameter, array in arrays:
        tensor = to_tensor(array)
        layer, name = owner(model, parameter)
        if getattr(layer, name).shape != tensor.shape:
            layer.replace_weight(name, tuple(tensor.shape))
        getattr(layer, name).assign(tensor)


def dump(model: keras.Model) -> dict[str, np.ndarray]:
    """The model's parameters as canonical tensors."""
    arrays = {}
    for name, parameter in model.parameters_of_schema.items():
        array = tf.convert_to_tensor(get(model, parameter)).numpy()
        arrays[name] = array.T if parameter.leaf.transposed else array
    return arrays


def to_tensor(array: np.ndarray) -> tf.Tensor:
    """A tensor in the array's own memory, which nobody else may use then; a copy where TensorFlow cannot work there."""
    if not can_be_taken_over(array):
        return tf.convert_to_tensor(array)
    if array.dtype == ml_dtypes.bfloat16:
        return tf.bitcast(to_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
