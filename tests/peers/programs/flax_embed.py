"""Turns texts into vectors with the base model in a compiled function."""

import jax
from transformers import FlaxRobertaPreLayerNormModel


def main(path, inputs, folder):
    model = FlaxRobertaPreLayerNormModel.from_pretrained(path)

    @jax.jit
    def encode(params, input_ids, attention_mask):
        return model(input_ids, attention_mask, params=params, output_attentions=True, return_dict=False)

    hidden, pooled, attentions = encode(model.params, **inputs)
    return {"hidden": hidden, "pooled": pooled, "attention": attentions[-1]}
