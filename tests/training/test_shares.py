"""Shares of a batch: together they weigh what the whole does, and none is without a row or a label."""

import numpy as np
import pytest

from roberta_pln.checks import InputError
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.training.shares import labels_of, share_out
from tests.contract import random_ids

RNG = np.random.default_rng(0)
IDS = random_ids(5, 7)
TEXTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 3, 3, 3, 0], [1, 2, 3, 4, 0, 0, 0], [0] * 7])
"""As in `segment_ids`; the last two rows have nothing that a token before it predicts."""
TOKENS = np.where(RNG.random(IDS.shape) < 0.4, IDS, IGNORE_INDEX)
TOKENS[3:] = IGNORE_INDEX  # whole rows without a label

BATCHES = {
    "ForMaskedLM": {"input_ids": IDS, "labels": TOKENS},
    "ForCausalLM": {"input_ids": IDS, "labels": TOKENS},
    "ForCausalLM, packed": {"input_ids": IDS, "labels": IDS, "segment_ids": TEXTS},
    "ForTokenClassification": {"input_ids": IDS, "labels": np.where(TOKENS > 0, TOKENS % 3, IGNORE_INDEX)},
    "ForSequenceClassification": {"input_ids": IDS, "labels": np.array([0, 2, IGNORE_INDEX, 1, IGNORE_INDEX])},
    "ForQuestionAnswering": {
        "input_ids": IDS,
        "start_positions": RNG.integers(0, 7, 5),
        "end_positions": IDS[:, 0] % 7,
    },
    "regression": {"input_ids": IDS, "labels": RNG.random(5).astype(np.float32)},
}


def losses(batch, head):
    """A made-up loss of every label that counts: its value."""
    if "start_positions" in batch:
        return (batch["start_positions"] + batch["end_positions"]) / 2
    labels = batch["labels"]
    if head == "ForCausalLM":
        texts = batch.get("segment_ids", np.ones_like(labels))
        counts = [[i > 0 and row[i] == row[i - 1] > 0 for i in range(len(row))] for row in texts]
        labels = np.where(counts, labels, IGNORE_INDEX)
    return labels[labels != IGNORE_INDEX]


@pytest.mark.parametrize("head", BATCHES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_weighted_means_of_the_shares_add_up_to_the_mean(head, count):
    batch, head = BATCHES[head], head.split(",")[0]
    shares = share_out(batch, count, head)
    assert len(shares) == count
    assert sum(share.weight for share in shares) == pytest.approx(1, abs=1e-15)  # of at most eight roundings
    assert all(len(losses(share.arrays, head)) for share in shares), "the mean of a share would be NaN"
    found = sum(share.weight * losses(share.arrays, head).mean() for share in shares)
    assert found == pytest.approx(losses(batch, head).mean(), rel=1e-6 if head == "regression" else 1e-14)  # float32


def test_rows_keep_their_order_and_differ_by_one_in_number():
    shares = share_out(BATCHES["ForMaskedLM"], 3, "ForMaskedLM")
    assert [len(share.arrays["input_ids"]) for share in shares] == [2, 2, 1]
    assert np.array_equal(np.concatenate([share.arrays["input_ids"] for share in shares]), IDS)


def test_the_batch_stays_as_it_is():
    before = TOKENS.copy()
    share_out(BATCHES["ForMaskedLM"], 5, "ForMaskedLM")
    assert np.array_equal(TOKENS, before)


def test_the_first_column_of_a_causal_model_is_no_label():
    labels = np.full((1, 4), IGNORE_INDEX)
    labels[0, 0] = 5
    assert labels_of({"input_ids": IDS[:1, :4], "labels": labels}, "ForCausalLM") == 0
    with pytest.raises(InputError, match="a batch to train on must have a label, got none"):
        share_out({"input_ids": IDS[:1, :4], "labels": labels}, 2, "ForCausalLM")


def test_labels_must_be_there():
    with pytest.raises(InputError, match="must have labels or start_positions, got input_ids"):
        share_out({"input_ids": IDS}, 2, "ForMaskedLM")


@pytest.mark.parametrize("position", [-1, 7])
def test_answers_outside_of_their_rows_cannot_be_shared_out(position):
    batch = {**BATCHES["ForQuestionAnswering"], "end_positions": np.array([0, 1, position, 2, 3])}
    assert share_out(batch, 1, "ForQuestionAnswering")[0].arrays is batch
    with pytest.raises(InputError, match=r"end_positions must be in \[0, 7\), .* got -?\d to \d: leave out the rows"):
        share_out(batch, 2, "ForQuestionAnswering")
