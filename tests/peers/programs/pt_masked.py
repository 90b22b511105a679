"""Adds tokens to a masked language model, trains it on, and fills in masks."""

import torch
from transformers import RobertaPreLayerNormForMaskedLM


def main(path, inputs, folder):
    model, info = RobertaPreLayerNormForMaskedLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    before = model.num_parameters()
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = {name: torch.from_numpy(value) for name, value in inputs.items()}
    batch["input_ids"][:, 2] = model.config.vocab_size - 1  # one of the new tokens

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.save(model.state_dict(), f"{folder}.pt")

    model = RobertaPreLayerNormForMaskedLM(model.config)
    model.load_state_dict(torch.load(f"{folder}.pt", weights_only=True))
    model.eval()
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = model(**batch, return_dict=False)[0]
    likeliest = logits[labels != -100].topk(3)
    return {
        "losses": losses,
        "probabilities": likeliest.values.softmax(dim=-1).numpy(),
        "added": model.num_parameters() - before,
        "embeddings": model.num_parameters() - model.num_parameters(exclude_embeddings=True),
    }
