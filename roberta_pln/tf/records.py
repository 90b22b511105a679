"""The records as TensorFlow users know them, and known to Keras' tree utilities: functional models and `predict` walk
them.

TensorFlow's own (`tf.nest`, and with it `tf.function`) find their way by the methods that the records have.
"""

import optree

from roberta_pln import outputs
from roberta_pln.outputs import RECORDS, ModelOutput


class BaseModelOutput(outputs.BaseModelOutput):
    """What the base model returns, with the cache before the hidden states, also by index and in iteration."""

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are present, in order."""
        first = ("last_hidden_state", "pooler_output", "past_key_values")
        return tuple(sorted(super().keys(), key=lambda name: name not in first))


def register(record: type[ModelOutput]) -> None:
    """Register one record: its present values are the children."""
    optree.register_pytree_node(
        record,
        lambda output: (output.to_tuple(), output.keys(), output.keys()),
        lambda names, values: record(**dict(zip(names, values, strict=True))),
        namespace="keras",  # where Keras looks
    )


for _record in (BaseModelOutput, *RECORDS):
    register(_record)
