"""Which axes of the parameters a mesh of devices shares out; the schema names the axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from roberta_pln import schema
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
