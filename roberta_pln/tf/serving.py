"""What `model.export` writes: named inputs of any batch and length, and a tensor for each field of the record."""

from typing import Any

import keras
import tensorflow as tf

from roberta_pln.outputs import ModelOutput


class Served(keras.Model):
    """A model whose outputs are a dictionary of tensors, which is what a SavedModel can return."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.built = True

    def call(self, *inputs: Any) -> dict[str, tf.Tensor]:
        return tensors_of(self.model(*inputs, return_dict=True))


def tensors_of(record: ModelOutput) -> dict[str, tf.Tensor]:
    """A tensor for each field of a record: what it has for each layer is stacked, a cache is (N, 2, B, H, S, K).

    A cache with cross keys and values, which have another length, is a tensor for each of its parts, named as
    `named_arrays` has it: `past_key_values.0.3`.
    """
    tensors = {}
    for name, value in record.items():
        if name == "past_key_values" and any(len(layer) > 2 for layer in value):
            tensors.update(type(record)(**{name: value}).named_arrays())
        elif not isinstance(value, tuple) or value:  # a model without layers has no attentions
            tensors[name] = stacked(value)
    return tensors


def stacked(value: Any) -> tf.Tensor:
    """A nest of tuples of one length as one tensor."""
    return tf.stack([stacked(item) for item in value]) if isinstance(value, tuple) else value


def signature(model: keras.Model) -> list[dict[str, tf.TensorSpec]]:
    """Ids, mask and token types as int32: (B, T), with several choices (B, C, T)."""
    axes = (None,) * (3 if model.head == "ForMultipleChoice" else 2)
    return [{name: tf.TensorSpec(axes, tf.int32, name) for name in ("input_ids", "attention_mask", "token_type_ids")}]
