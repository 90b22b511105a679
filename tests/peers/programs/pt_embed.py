"""Turns texts into vectors with the base model."""

import torch
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormModel


def main(path, inputs, folder):
    config = RobertaPreLayerNormConfig.from_pretrained(path)
    model = RobertaPreLayerNormModel.from_pretrained(path, config=config, add_pooling_layer=False).eval()
    mask = torch.from_numpy(inputs["attention_mask"])
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs["input_ids"]), mask, output_hidden_states=True)
    assert outputs.pooler_output is None
    weights = mask[..., None].to(outputs.last_hidden_state.dtype)
    means = (outputs.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)
    vectors = torch.nn.functional.normalize(means, dim=-1)
    layers = torch.stack(outputs.hidden_states).mean(dim=(1, 2))
    assert len(layers) == config.num_hidden_layers + 1
    return {"similarities": (vectors @ vectors.T).numpy(), "layers": layers.numpy(), "keys": len(outputs.keys())}
