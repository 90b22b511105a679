"""The checkpoints that ship: their sizes, their files, and the numbers of their cards, measured again."""

import importlib
import json
from importlib import resources

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("torch")

import torch

from roberta_pln import backends, parity
from roberta_pln.data import corpus, evaluation, model_card
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer
from tests.contract import load, precision

ASSETS = resources.files("roberta_pln") / "assets"
MODELS = {"kjv": ("ForMaskedLM", 6_000_000), "kjv-decoder": ("ForCausalLM", 4_000_000)}
"""For each checkpoint its head, and most bytes."""

LABELLED = {
    ("kjv", "0.4"): lambda *of: evaluation.masked_documents(*of, rate=0.4),
    ("kjv", "0.15"): lambda *of: evaluation.masked_documents(*of, rate=0.15),
    ("kjv-decoder", "model"): evaluation.continued_documents,
}
"""What each table of scores was measured on, from documents, tokenizer and length."""

MARGIN = 0.15
"""By how much the encoder beats the bigram baseline, in accuracy; several standard deviations of the sample's share."""
RATIO = 0.5
"""At most this part of the bigram baseline's perplexity is the decoder's."""


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name):
    return ASSETS / name


@pytest.fixture(scope="module")
def card(folder):
    return json.loads((folder / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(name, folder):
    return load("pt", folder, MODELS[name][0], "float32")


@pytest.fixture(scope="module")
def predict(model):
    def predict(input_ids, attention_mask):
        with torch.inference_mode():
            return model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask)).logits.numpy()

    return predict


def beats_the_baselines(name, table, key):
    """Whether the scores of a table, under a key, are as far above counting as they should be."""
    scores = table[key]
    if name == "kjv":
        return scores["accuracy"] > scores["bigram_accuracy"] + MARGIN > scores["unigram_accuracy"] + MARGIN
    bigram, unigram = (table[baseline]["perplexity"] for baseline in ("bigram", "unigram"))
    return scores["perplexity"] < RATIO * bigram < RATIO * unigram


@pytest.mark.parametrize(("name", "key"), LABELLED, indirect=["name"])
def test_card_numbers_are_measured_again(name, folder, card, tokenizer, model, predict, key):
    documents = corpus.read_documents(folder / "held_out.txt")
    labelled = LABELLED[name, key](documents, tokenizer, model.config.max_sequence_length)
    scores, stated = evaluation.evaluate(predict, labelled), card["sample"][key]
    assert scores.tokens == stated["tokens"]
    # The card has four digits. Another processor rounds logits otherwise, which may turn two near ties, not more.
    assert scores.accuracy == pytest.approx(stated["accuracy"], abs=2 / scores.tokens + 1e-4)
    assert scores.perplexity == pytest.approx(stated["perplexity"], rel=1e-4)
    assert beats_the_baselines(name, {**card["sample"], key: {**stated, **scores.to_dict()}}, key)


@pytest.mark.parametrize(("name", "key"), LABELLED, indirect=["name"])
def test_held_out_part_agrees_with_its_sample(name, card, key):
    whole, sample = card["held_out"][key], card["sample"][key]
    deviation = np.sqrt(whole["accuracy"] * (1 - whole["accuracy"]) / sample["tokens"])
    assert sample["accuracy"] == pytest.approx(whole["accuracy"], abs=5 * deviation)
    assert beats_the_baselines(name, card["held_out"], key)


def test_examples_are_answered_as_the_card_says(folder, card, tokenizer, predict):
    examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    ranks = [evaluation.rank(predict, tokenizer, example) for example in examples]
    stated = card["examples"]
    found = {"count": len(ranks), "first": sum(r < 1 for r in ranks), "in_five": sum(r < 5 for r in ranks)}
    assert found == stated


def test_card_describes_the_model(name, folder, card, tokenizer, model):
    config = model.config
    assert model.num_parameters() == card["parameters"]
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.max_length == config.max_sequence_length == card["recipe"]["length"]
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, role) == getattr(config, role)
    assert config.is_decoder == (MODELS[name][0] == "ForCausalLM") == (card["objective"] == "causal")
    assert card["steps"] == card["planned_steps"]
    assert "Chip Chapin" in card["licence"]
    assert model_card.readme(card) == (folder / "README.md").read_text(encoding="utf-8")


def test_every_backend_continues_text_alike():
    """In float64; and the loss, whose labels the model shifts by itself, is that of the card's perplexity."""
    folder, answers = ASSETS / "kjv-decoder", {}
    documents = corpus.read_documents(folder / "held_out.txt")[:8]
    labelled = evaluation.continued_documents(documents, Tokenizer.from_pretrained(folder), 128)
    ((ids, mask, _),) = labelled
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask > 0, ids, IGNORE_INDEX)}
    for backend in backends.installed():
        with precision(backend, "float64"):
            probe = importlib.import_module(f"roberta_pln.{backend}.probe")
            answers[backend] = probe.run(load(backend, folder, "ForCausalLM"), inputs, gradients=False)
    assert [difference for difference in parity.differences(answers, "float64") if not difference.passed] == []
    for found in answers.values():
        scores = evaluation.evaluate(lambda ids, mask, found=found: found["logits"], labelled)
        assert np.log(scores.perplexity) == pytest.approx(found["loss"], rel=1e-12)  # sums of some hundred terms


def test_assets_are_small(name, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "model.safetensors" in files
    assert sum(path.stat().st_size for path in files) <= MODELS[name][1]
