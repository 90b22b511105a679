"""The metrics, on cases that can be computed by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("nervaluate")

from roberta_pln.training import metrics


def test_classification():
    found = metrics.classification([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0])
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    # 6 right products: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)), Gorodkin 2004
    assert found["matthews"] == pytest.approx((4 * 6 - (3 * 3 + 3 * 2)) / math.sqrt((36 - 18) * (36 - 14)))


def test_regression():
    found = metrics.regression([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 4, 9, 16])[0, 1])
    assert found["mse"] == pytest.approx((0 + 4 + 36 + 144) / 4)


def test_a_constant_has_no_correlation():
    found = metrics.regression([1.0, 2.0], [3.0, 3.0])
    assert found == {"pearson": 0.0, "spearman": 0.0, "mse": 2.5}


def test_names_are_right_as_a_whole():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER", "B-PER"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["O", "B-PER", "I-PER"]]
    # found: PER (0,0) wrong, LOC right, PER (1,1)-(1,2) wrong: 1 of 3 guesses, 1 of 4 names
    found = metrics.entities(labels, guess)
    assert found == {
        "f1": pytest.approx(2 / 7),
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 4),
        "accuracy": pytest.approx(5 / 7),
    }
    assert metrics.entities(labels, labels)["f1"] == 1.0
    assert metrics.entities([["O"]], [["B-PER"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 0.0}


def test_labels_that_are_no_names():
    assert metrics.entities([["noun", "verb"]], [["noun", "noun"]]) == {
        "f1": pytest.approx((2 / 3 + 0) / 2),
        "accuracy": 0.5,
    }


@pytest.mark.parametrize(
    ("references", "answer", "f1", "exact"),
    [
        (["the Lord"], "LORD!", 1.0, 1.0),
        (["in the land of Nod"], "land of Nod", 6 / 7, 0.0),
        (["Cain", "the land of Nod"], "land of Nod", 1.0, 1.0),
        ([], "", 1.0, 1.0),
        ([], "Nod", 0.0, 0.0),
        (["Nod"], "", 0.0, 0.0),
        (["Nod Nod"], "Nod", 2 / 3, 0.0),
    ],
)
def test_answers(references, answer, f1, exact):
    assert metrics.answers([references], [answer]) == {"f1": pytest.approx(f1), "exact_match": exact}


def test_language_models():
    found = metrics.language_model(np.log([2.0, 8.0]), np.array([True, False]))
    assert found == {"loss": pytest.approx(math.log(4)), "perplexity": pytest.approx(4), "accuracy": 0.5}
    assert metrics.language_model(np.array([1e4]), np.array([True]))["perplexity"] == math.exp(700)
