"""Which axes of the parameters a mesh of devices shares out, as the schema names them; and arrays that come and go."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from roberta_pln import schema
from roberta_pln.checks import InputError
from roberta_pln.flax import weights
from roberta_pln.flax.weights import Path

if TYPE_CHECKING:
    from roberta_pln.flax.pretrained import RobertaPreLayerNormPreTrainedModel as Model

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Axes of `schema.MODULES`, such as `intermediate_size`, to the axis or axes of the mesh that share them out."""


def partition_specs(model: Model, mesh: Mesh | AbstractMesh, rules: Rules) -> dict[Path, PartitionSpec]:
    """The axes of the mesh for the axes of every array; see `partition_specs` of the model."""
    check(mesh, rules)
    rules = {"activated_size": rules.get("intermediate_size"), **rules}  # that axis behind a gated activation
    specs, problems = {}, []
    for name, parameter in model.parameters_of_schema.items():
        axes = parameter.module.axes[: len(parameter.shape)]  # a bias has the first one only
        spec = share(axes, rules)
        for axis, length, over in zip(axes, parameter.shape, spec, strict=True):
            if length % math.prod(mesh.shape[part] for part in over):
                problems.append(f"{name}: {axis} is {length}, and {' x '.join(over)} does not divide it")
        entries = [over[0] if len(over) == 1 else over or None for over in spec]
        specs[weights.owner(model, parameter)] = PartitionSpec(*entries[:: -1 if parameter.leaf.transposed else 1])
    if problems:
        sizes = dict(mesh.shape)
        raise ValueError(f"a mesh of {sizes} does not fit: change it or drop a rule\n  " + "\n  ".join(problems))
    return specs


def check(mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """The rules name axes of parameters and of the mesh, which leaves it to XLA how results are shared out."""
    if any(kind.name == "Explicit" for kind in mesh.axis_types):
        raise ValueError(
            "the mesh has explicit axes, for which the model's code would have to name the sharding of every result: "
            "make it with axis_types=(jax.sharding.AxisType.Auto, ...)"
        )
    axes = {axis for module in schema.MODULES for axis in module.axes}
    if unknown := sorted(rules.keys() - axes):
        raise ValueError(f"no parameter has an axis {', '.join(unknown)}; there are {', '.join(sorted(axes))}")
    if unknown := sorted({part for over in rules.values() for part in names(over)} - set(mesh.shape)):
        raise ValueError(f"the mesh has no axis {', '.join(unknown)}; it has {', '.join(mesh.shape)}")


def share(axes: tuple[str, ...], rules: Rules) -> list[tuple[str, ...]]:
    """Axes of the mesh for each axis of one array; each of them is used once, as JAX asks."""
    spec: list[tuple[str, ...]] = []
    for axis in axes:
        over = names(rules.get(axis))
        taken = any(part in earlier for earlier in spec for part in over)
        spec.append(() if taken else over)
    return spec


def names(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Axes of the mesh as a tuple."""
    return (over,) if isinstance(over, str) else tuple(over or ())


def fitting(model: Model, mesh: Mesh | AbstractMesh, rules: Mapping[str, str]) -> Rules:
    """The rules whose axes the mesh has, and divides in all parameters; the other axes stay whole."""
    chosen: dict[str, str | None] = {axis: over if over in mesh.shape else None for axis, over in rules.items()}
    for parameter in model.parameters_of_schema.values():
        for axis, length in zip(parameter.module.axes, parameter.shape, strict=False):  # a bias has the first one only
            if length % math.prod(mesh.shape[part] for part in names(chosen.get(axis))):
                chosen[axis] = None
    return chosen


def mesh_of(text: str, axes: Sequence[str]) -> Mesh:
    """All devices as a mesh.

    Args:
        text: sizes of some axes, such as `data=2,tensor=4`. The devices are those of several processes where the
            environment has JAX_COORDINATOR_ADDRESS, and JAX_NUM_PROCESSES and JAX_PROCESS_ID unless JAX knows the
            cluster.
        axes: names that there may be.

    Raises:
        InputError: when the text is something else, or the product is not the number of devices.
    """
    met = getattr(jax.distributed, "is_initialized", lambda: False)  # JAX 0.5 has none, and refuses a second meeting
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not met():
        numbers = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(None, *(None if number is None else int(number) for number in numbers))
    found = [re.fullmatch(rf"({'|'.join(axes)})=([1-9]\d*)", part) for part in text.split(",")]
    sizes = {match[1]: int(match[2]) for match in found if match}
    if len(sizes) < len(found) or math.prod(sizes.values()) != jax.device_count():
        raise InputError(
            f"a mesh must give sizes to some of {', '.join(axes)}, such as {axes[0]}=2,{axes[1]}=2, whose product is "
            f"the number of devices ({jax.device_count()}), got {text!r}"
        )
    return Mesh(mesh_utils.create_device_mesh(tuple(sizes.values())), tuple(sizes))


def place(array: np.ndarray, where: NamedSharding) -> Array:
    """An array that every process has, on the devices of all."""
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def gathered(array: Array) -> np.ndarray:
    """A whole array, on every process; all of them call it together."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
