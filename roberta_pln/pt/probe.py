"""What a model computes on some inputs, in NumPy: for the comparison of backends."""

import numpy as np
import torch

from roberta_pln.numerics import objective_weights
from roberta_pln.pt import weights
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel


def run(
    model: RobertaPreLayerNormPreTrainedModel, inputs: dict[str, np.ndarray], gradients: bool
) -> dict[str, np.ndarray]:
    """Every array of the record by name, and `gradient.<canonical name>` of every parameter if asked for.

    The outputs are those of inference; the gradient is that of the loss, or without labels of the outputs' sum
    weighted by `objective_weights`.
    """
    tensors = {name: torch.as_tensor(value, device=model.device) for name, value in inputs.items()}
    with torch.inference_mode():
        record = model(**tensors, output_hidden_states=True)
    arrays = {name: weights.to_array(value) for name, value in record.named_arrays()}
    if gradients:
        model.zero_grad()
        objective(model(**tensors)).backward()
        for name, parameter in model.parameters_of_schema.items():
            gradient = weights.get(model, parameter).grad
            arrays[f"gradient.{name}"] = np.zeros(parameter.shape) if gradient is None else weights.to_array(gradient)
    return arrays


def objective(record) -> torch.Tensor:
    """The scalar to differentiate."""
    if "loss" in record:
        return record.loss
    return sum((value * value.new_tensor(objective_weights(value.shape))).sum() for _, value in record.named_arrays())
