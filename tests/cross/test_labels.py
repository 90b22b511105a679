"""What the heads make of labels, and which they refuse with the same words."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends
from roberta_pln.checks import InputError
from tests.contract import load, random_checkpoint, random_ids, tiny_config

IDS = {"input_ids": random_ids(2, 5)}

REFUSED = {
    "three classes, label 3": ("ForSequenceClassification", {"num_labels": 3}, {"labels": np.array([0, 3])}, "below 3"),
    "a label for each of three rows": (
        "ForSequenceClassification",
        {"num_labels": 3},
        {"labels": np.array([0, 1, 2])},
        r"labels of a single_label_classification must have shape \(2,\) or \(2, 1\), got \(3,\)",
    ),
    "three targets for four labels": (
        "ForSequenceClassification",
        {"num_labels": 4},
        {"labels": np.zeros((2, 3), np.float32)},
        r"labels of a multi_label_classification must have shape \(2, 4\), got \(2, 3\)",
    ),
    "integers for independent targets": (
        "ForSequenceClassification",
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        {"labels": np.zeros((2, 4), np.int64)},
        "labels of a multi_label_classification must be floating-point numbers, got integers",
    ),
    "values for classes": (
        "ForSequenceClassification",
        {"num_labels": 4, "problem_type": "single_label_classification"},
        {"labels": np.zeros(2, np.float32)},
        "labels of a single_label_classification must be integers",
    ),
    "a token's class": (
        "ForTokenClassification",
        {"num_labels": 3},
        {"labels": np.full((2, 5), -1)},
        "labels must be at least 0 and below 3, or -100 to be ignored, got -1",
    ),
    "two axes of ids for choices": (
        "ForMultipleChoice",
        {},
        {},
        r"input_ids or inputs_embeds must have shape \(any, any, any\), got \(2, 5\)",
    ),
    "positions of an answer": (
        "ForQuestionAnswering",
        {},
        {"start_positions": np.zeros((2, 2), int), "end_positions": np.zeros(2, int)},
        r"start_positions must have shape \(2,\) or \(2, 1\), got \(2, 2\)",
    ),
}


@cache
def model(backend: str, head: str, changes: tuple):
    with tempfile.TemporaryDirectory() as folder:
        path = random_checkpoint(Path(folder), tiny_config(**dict(changes)), head)
        return load(backend, path, head, "float32")


@pytest.mark.parametrize("backend", backends.installed())
@pytest.mark.parametrize("name", REFUSED)
def test_refused(backend, name):
    head, changes, arguments, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        model(backend, head, tuple(changes.items()))(**IDS, **arguments)


@pytest.mark.parametrize("backend", backends.installed())
def test_question_answering_has_two_labels(backend, tmp_path):
    with pytest.raises(ValueError, match=r"needs num_labels=2 \(start and end\), got 3"):
        backends.BACKENDS[backend].model_class("ForQuestionAnswering")(tiny_config(num_labels=3))


@pytest.mark.parametrize("backend", backends.installed())
@pytest.mark.parametrize(
    ("count", "labels", "kind"),
    [
        (1, np.array([0, 1]), "regression"),
        (3, np.array([0, 1], np.int16), "single_label_classification"),
        (3, np.zeros((2, 3), np.float32), "multi_label_classification"),
    ],
)
def test_the_problem_type_is_settled_once(backend, count, labels, kind, tmp_path):
    path = random_checkpoint(tmp_path, tiny_config(num_labels=count), "ForSequenceClassification")
    classifier = load(backend, path, "ForSequenceClassification", "float32")
    classifier(**IDS, labels=labels)
    assert classifier.config.problem_type == kind


@pytest.mark.parametrize("backend", backends.installed())
def test_nothing_to_learn_from_is_nan(backend):
    """A mean over no labels, in every head that leaves labels out."""
    out = np.array([-100, -100])
    classes = model(backend, "ForSequenceClassification", (("num_labels", 3),))
    answers = model(backend, "ForQuestionAnswering", ())
    tokens = model(backend, "ForTokenClassification", (("num_labels", 3),))
    for loss in (
        classes(**IDS, labels=out).loss,
        answers(**IDS, start_positions=out, end_positions=out).loss,
        tokens(**IDS, labels=np.full((2, 5), -100)).loss,
    ):
        assert np.isnan(float(loss))
