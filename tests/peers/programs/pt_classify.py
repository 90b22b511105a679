"""Trains a classifier of texts, saves it, and labels texts with the saved one."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForSequenceClassification


def main(path, inputs, folder):
    config = RobertaPreLayerNormConfig.from_pretrained(path, id2label={0: "bad", 1: "fair", 2: "good"})
    model = RobertaPreLayerNormForSequenceClassification.from_pretrained(path, config=config).to("cpu")
    batches = DataLoader(TensorDataset(*(torch.from_numpy(value) for value in inputs.values())), batch_size=4)

    decayed = [p for n, p in model.named_parameters() if not n.endswith(("bias", "LayerNorm.weight"))]
    others = [p for n, p in model.named_parameters() if n.endswith(("bias", "LayerNorm.weight"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))

    model.train()
    losses = []
    for _ in range(2):
        for input_ids, attention_mask, labels in batches:
            outputs = model(input_ids, attention_mask=attention_mask, labels=labels)
            loss = outputs[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.save_pretrained(folder)

    model = RobertaPreLayerNormForSequenceClassification.from_pretrained(folder, output_hidden_states=True)
    model.eval()
    logits, states = [], []
    for input_ids, attention_mask, _ in batches:
        with torch.no_grad():
            outputs = model(input_ids=input_ids, attention_mask=attention_mask)
        logits.append(outputs.logits)
        states.append(outputs["hidden_states"][-1])
    classes = torch.cat(logits).argmax(dim=-1)
    assert {model.config.id2label[index] for index in classes.tolist()} <= {"bad", "fair", "good"}
    return {
        "losses": losses,
        "logits": torch.cat(logits).numpy(),
        "states": torch.cat(states).numpy(),
        "classes": model.config.num_labels,
        "parameters": model.num_parameters(),
    }
