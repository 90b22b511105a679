"""Teaches Keras' tree utilities to walk the records, which functional models and `predict` need.

TensorFlow's own (`tf.nest`, and with it `tf.function`) find their way by the methods that the records have.
"""

import optree

from roberta_pln.outputs import RECORDS, ModelOutput


def register(record: type[ModelOutput]) -> None:
    """Register one record: its present values are the children."""
    optree.register_pytree_node(
        record,
        lambda output: (output.to_tuple(), output.keys(), output.keys()),
        lambda names, values: record(**dict(zip(names, values, strict=True))),
        namespace="keras",  # where Keras looks
    )


for _record in RECORDS:
    register(_record)
