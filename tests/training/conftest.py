"""A tiny model with a tokenizer, and tiny files of examples of every task."""

import json

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from roberta_pln.tokenizer import Tokenizer
from tests.contract import random_checkpoint, tiny_config

WORDS = ("light", "darkness", "heaven", "earth", "water", "day", "night", "seed", "tree", "fruit")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A masked language model of one layer."""
    folder = tmp_path_factory.mktemp("model")
    lines = [f"And God made the {a} and the {b}, and saw that the {a} was good." for a in WORDS for b in WORDS]
    tokenizer = Tokenizer.train(lines, 300, 38)
    dropped = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, **dropped)
    random_checkpoint(folder, config, "ForMaskedLM")
    tokenizer.save_pretrained(folder)
    return folder


def example(task, rng):
    a, b, c = (str(word) for word in rng.choice(WORDS, 3, replace=False))
    context = f"And God made the {a}, and he saw the {b} in the {c}."
    kind = {"light": "sky", "heaven": "sky", "day": "sky", "night": "sky", "darkness": "sky"}
    return {
        "classification": {"text": context, "label": kind.get(a, "ground")},
        "regression": {"text": context, "label": float(len(a))},
        "token-classification": {
            "words": context.split(),
            "labels": ["B-THING" if word.strip(",.") in (a, b, c) else "O" for word in context.split()],
        },
        "question-answering": {
            "question": "What did God make?",
            "context": context,
            "answers": {"text": [a], "answer_start": [context.index(a)]},
        },
        "multiple-choice": {
            "prompt": f"God made the {a}.",
            "choices": [f"He made the {x}." for x in (b, a)],
            "label": 1,
        },
        "masked-lm": {"text": context},
        "causal-lm": {"text": context},
    }[task]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A function of a task: the files of 40 examples to learn from, and of 12 to measure on."""
    folder = tmp_path_factory.mktemp("examples")

    def of(task):
        paths = folder / f"{task}-train.jsonl", folder / f"{task}-eval.jsonl"
        rng = np.random.default_rng(0)
        for path, count in zip(paths, (40, 12), strict=True):
            if not path.exists():
                path.write_text("".join(json.dumps(example(task, rng)) + "\n" for _ in range(count)))
        return {"train": str(paths[0]), "eval": str(paths[1])}

    return of
