"""Trains the last layers of a question-answering model, and reads answers off."""

import torch
from transformers import RobertaPreLayerNormForQuestionAnswering


def main(path, inputs, folder):
    model = RobertaPreLayerNormForQuestionAnswering.from_pretrained(path)
    for parameter in model.base_model.embeddings.parameters():
        parameter.requires_grad = False
    batch = {name: torch.from_numpy(value).to(model.device) for name, value in inputs.items()}
    trained = (p for p in model.parameters() if p.requires_grad)
    # A shift of all logits changes no loss: the last bias has a gradient of roundings, which a small eps would enlarge.
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
    model.train()
    losses = []
    for _ in range(3):
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(outputs.loss.item())
    model.save_pretrained(folder)

    model = RobertaPreLayerNormForQuestionAnswering.from_pretrained(folder)
    question = {name: value for name, value in batch.items() if "positions" not in name}
    with torch.no_grad():
        start_logits, end_logits = model(**question).to_tuple()
        attentions = model(**question, output_attentions=True).attentions
    start, end = start_logits.argmax(dim=1), end_logits.argmax(dim=1)
    return {
        "losses": losses,
        "start": start_logits.numpy(),
        "end": end_logits.numpy(),
        "spans": torch.stack([start, end]).numpy(),
        "attention": attentions[0].numpy(),
        "trainable": model.num_parameters(only_trainable=True),
    }
