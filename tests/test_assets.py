"""The checkpoint that ships: its size, its files, and the numbers of its card, measured again."""

import json
from importlib import resources

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("torch")

import torch

from roberta_pln.data import corpus, evaluation, model_card
from roberta_pln.pt import RobertaPreLayerNormForMaskedLM
from roberta_pln.tokenizer import Tokenizer

ASSETS = resources.files("roberta_pln") / "assets"
KJV = ASSETS / "kjv"
MOST_BYTES = 6_000_000
MARGIN = 0.15
"""By how much the model beats the bigram baseline, in accuracy; several standard deviations of the sample's share."""


@pytest.fixture(scope="module")
def card():
    return json.loads((KJV / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(KJV)


@pytest.fixture(scope="module")
def model():
    return RobertaPreLayerNormForMaskedLM.from_pretrained(KJV)


@pytest.fixture(scope="module")
def predict(model):
    def predict(input_ids, attention_mask):
        with torch.inference_mode():
            return model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask)).logits.numpy()

    return predict


@pytest.mark.parametrize("rate", ["0.4", "0.15"])
def test_card_numbers_are_measured_again(card, tokenizer, model, predict, rate):
    documents = corpus.read_documents(KJV / "held_out.txt")
    masked = evaluation.masked_documents(documents, tokenizer, model.config.max_sequence_length, float(rate))
    scores, stated = evaluation.evaluate(predict, masked), card["sample"][rate]
    assert scores.tokens == stated["tokens"]
    # The card has four digits. Another processor rounds logits otherwise, which may turn two near ties, not more.
    assert scores.accuracy == pytest.approx(stated["accuracy"], abs=2 / scores.tokens + 1e-4)
    assert scores.perplexity == pytest.approx(stated["perplexity"], rel=1e-4)
    assert scores.accuracy > stated["bigram_accuracy"] + MARGIN > stated["unigram_accuracy"] + MARGIN


def test_held_out_part_agrees_with_its_sample(card):
    for rate, whole in card["held_out"].items():
        sample = card["sample"][rate]
        deviation = np.sqrt(whole["accuracy"] * (1 - whole["accuracy"]) / sample["tokens"])
        assert sample["accuracy"] == pytest.approx(whole["accuracy"], abs=5 * deviation)
        assert whole["accuracy"] > whole["bigram_accuracy"] + MARGIN


def test_examples_are_answered_as_the_card_says(card, tokenizer, predict):
    examples = json.loads((KJV / "examples.json").read_text(encoding="utf-8"))
    ranks = [evaluation.rank(predict, tokenizer, example) for example in examples]
    stated = card["examples"]
    found = {"count": len(ranks), "first": sum(r < 1 for r in ranks), "in_five": sum(r < 5 for r in ranks)}
    assert found == stated


def test_card_describes_the_model(card, tokenizer, model):
    assert model.num_parameters() == card["parameters"]
    assert tokenizer.vocab_size == model.config.vocab_size
    assert tokenizer.max_length == model.config.max_sequence_length == card["recipe"]["length"]
    assert card["steps"] == card["planned_steps"]
    assert "Chip Chapin" in card["licence"]
    assert model_card.readme(card) == (KJV / "README.md").read_text(encoding="utf-8")


def test_assets_are_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert KJV / "model.safetensors" in files
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
