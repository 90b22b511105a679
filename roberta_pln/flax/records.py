"""Teaches JAX's tree utilities to walk the records, which every transformation of a model's call needs."""

import jax

from roberta_pln.outputs import RECORDS, ModelOutput


def register(record: type[ModelOutput]) -> None:
    """Register one record: its present values are the children."""
    jax.tree_util.register_pytree_with_keys(
        record,
        lambda output: ([(jax.tree_util.GetAttrKey(name), value) for name, value in output.items()], output.keys()),
        lambda names, values: record(**dict(zip(names, values, strict=True))),
        flatten_func=lambda output: (output.to_tuple(), output.keys()),
    )


for _record in RECORDS:
    register(_record)
