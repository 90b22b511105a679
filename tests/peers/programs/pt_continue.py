"""Trains a causal language model, and continues texts with its cache."""

import torch
from transformers import RobertaPreLayerNormForCausalLM


def main(path, inputs, folder):
    model = RobertaPreLayerNormForCausalLM.from_pretrained(path, is_decoder=True)
    input_ids = torch.from_numpy(inputs["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss, logits = model(input_ids, labels=input_ids).to_tuple()[:2]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder, safe_serialization=False)

    model = RobertaPreLayerNormForCausalLM.from_pretrained(folder)
    outputs = model(input_ids, use_cache=True)
    scores = []
    for _ in range(5):
        token = outputs.logits[:, -1:].argmax(dim=-1)
        with torch.no_grad():
            outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)
        scores.append(outputs.logits)
    cached = outputs.past_key_values.get_seq_length()
    return {"losses": losses, "scores": torch.cat(scores, dim=1).numpy(), "shape": logits.shape, "cached": cached}
