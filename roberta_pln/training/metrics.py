"""How good predictions are, by task. Each function returns numbers by name, those that matter most first."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def classification(labels: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, F1 (the mean over the classes), and Matthews' correlation, through scikit-learn."""
    from sklearn import metrics

    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
    }


def regression(labels: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Correlation of Pearson and of Spearman, through SciPy, and mean squared error.

    A correlation with something constant is undefined, and given as 0.
    """
    from scipy import stats

    varied = len(set(labels)) > 1 and len(set(predicted)) > 1
    correlations = {name: getattr(stats, f"{name}r") for name in ("pearson", "spearman")}
    error = np.asarray(labels, np.float64) - np.asarray(predicted, np.float64)
    return {
        **{name: float(of(labels, predicted).statistic) if varied else 0.0 for name, of in correlations.items()},
        "mse": float(np.mean(error**2)),
    }


def entities(labels: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of whole names, and accuracy of words.

    Labels are `O`, or `B-` or `I-` and a kind, and a name is right if its words and its kind are, as CoNLL-2003 scores
    them (the strict scores of nervaluate). Labels of another form have the accuracy only, and F1 is the mean over them.
    """
    words = [label for row in labels for label in row]
    guesses = [label for row in predicted for label in row]
    right = float(np.mean([a == b for a, b in zip(words, guesses, strict=True)]))
    kinds = sorted({label[2:] for label in {*words, *guesses} if label[:2] in ("B-", "I-")})
    if any(label != "O" and label[:2] not in ("B-", "I-") for label in words) or not kinds:
        from sklearn import metrics

        score = float(metrics.f1_score(words, guesses, average="macro", zero_division=0))
        return {"f1": score, "accuracy": right}
    from nervaluate.evaluator import Evaluator

    found = Evaluator([*map(list, labels)], [*map(list, predicted)], tags=kinds, loader="list").evaluate()
    strict = found["overall"]["strict"]
    return {"f1": strict.f1, "precision": strict.precision, "recall": strict.recall, "accuracy": right}


def answers(references: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """F1 of words and exact match, each the best over the references of a question; no reference stands for no answer.

    Case, punctuation, articles and white space do not count. Source: Rajpurkar et al. 2016, section 6.1, and 2018.
    """
    exact, overlap = [], []
    for given, answer in zip(references, predicted, strict=True):
        pairs = [(_words(reference), _words(answer)) for reference in given or ("",)]
        exact.append(max(float(a == b) for a, b in pairs))
        overlap.append(max(_f1(a, b) for a, b in pairs))
    return {"f1": float(np.mean(overlap)), "exact_match": float(np.mean(exact))}


def language_model(losses: NDArray[Any], right: NDArray[Any]) -> dict[str, float]:
    """Mean of -log p(token), its exponential, and accuracy.

    Args:
        losses: (n,) of each predicted token.
        right: (n,) whether the most likely token is the one.
    """
    loss = float(np.mean(losses, dtype=np.float64))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": float(np.mean(right))}


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(reference: list[str], answer: list[str]) -> float:
    common = sum((Counter(reference) & Counter(answer)).values())
    if not reference or not answer:
        return float(reference == answer)
    return 2 * common / (len(reference) + len(answer))
