"""What a model computes on some inputs, in NumPy: for the comparison of backends."""

import numpy as np
import tensorflow as tf

from roberta_pln.numerics import objective_weights
from roberta_pln.outputs import ModelOutput
from roberta_pln.tf import weights
from roberta_pln.tf.pretrained import RobertaPreLayerNormPreTrainedModel


def run(
    model: RobertaPreLayerNormPreTrainedModel, inputs: dict[str, np.ndarray], gradients: bool
) -> dict[str, np.ndarray]:
    """Every array of the record by name, and `gradient.<canonical name>` of every parameter if asked for.

    The outputs are those of inference; the gradient is that of the loss, or without labels of the outputs' sum
    weighted by `objective_weights`.
    """
    record = model(**inputs, output_hidden_states=True)
    arrays = {name: value.numpy() for name, value in record.named_arrays()}
    if gradients:
        parameters = model.parameters_of_schema.values()
        with tf.GradientTape() as tape:
            scalar = objective(model(**inputs))
        variables = [weights.get(model, parameter).value for parameter in parameters]
        found = tape.gradient(scalar, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        for parameter, gradient in zip(parameters, found, strict=True):
            array = tf.convert_to_tensor(gradient).numpy()
            arrays[f"gradient.{parameter.name}"] = array.T if parameter.leaf.transposed else array
    return arrays


def objective(record: ModelOutput) -> tf.Tensor:
    """The scalar to differentiate."""
    if "loss" in record:
        return record.loss
    return tf.add_n(
        [
            tf.reduce_sum(value * tf.cast(objective_weights(value.shape), value.dtype))
            for _, value in record.named_arrays()
        ]
    )
