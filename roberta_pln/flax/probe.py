"""What a model computes on some inputs, in NumPy: for the comparison of backends."""

import jax
import jax.numpy as jnp
import numpy as np

from roberta_pln.flax import weights
from roberta_pln.flax.pretrained import RobertaPreLayerNormPreTrainedModel
from roberta_pln.numerics import objective_weights
from roberta_pln.outputs import ModelOutput


def run(
    model: RobertaPreLayerNormPreTrainedModel, inputs: dict[str, np.ndarray], gradients: bool
) -> dict[str, np.ndarray]:
    """Every array of the record by name, and `gradient.<canonical name>` of every parameter if asked for.

    The outputs are those of inference; the gradient is that of the loss, or without labels of the outputs' sum
    weighted by `objective_weights`.
    """
    given = {"input_ids": None, **inputs}
    record = jax.jit(lambda params: model(**given, params=params, output_hidden_states=True))(model.params)
    arrays = {name: np.asarray(value) for name, value in record.named_arrays()}
    if gradients:
        found = jax.jit(jax.grad(lambda params: objective(model(**given, params=params))))(model.params)
        arrays |= {f"gradient.{name}": array for name, array in weights.dump(model, found).items()}
    return arrays


def objective(record: ModelOutput) -> jax.Array:
    """The scalar to differentiate."""
    if "loss" in record:
        return record.loss
    return sum(
        (value * jnp.asarray(objective_weights(value.shape), value.dtype)).sum() for _, value in record.named_arrays()
    )
