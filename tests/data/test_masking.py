"""Choosing tokens to predict, and hiding them."""

import numpy as np
import pytest

from roberta_pln.data.masking import mask_tokens, next_tokens
from roberta_pln.numerics import IGNORE_INDEX

MASK, SPECIAL, VOCAB = 99, (0, 1, 2, 3, 99), 100


@pytest.fixture
def ids():
    ids = np.random.default_rng(0).integers(4, 99, (64, 128))
    ids[:, 0], ids[:, -1], ids[1::2, 100:] = 0, 2, 1
    return ids


def masked(ids, seed=0, rate=0.4, scheme="always"):
    return mask_tokens(ids, np.random.default_rng(seed), rate, MASK, SPECIAL, scheme, VOCAB)


@pytest.mark.parametrize("scheme", ["always", "80-10-10"])
def test_labels_are_the_old_ids_and_the_rest_is_untouched(ids, scheme):
    before = ids.copy()
    new, labels = masked(ids, scheme=scheme)
    predicted = labels != IGNORE_INDEX
    np.testing.assert_array_equal(ids, before)
    np.testing.assert_array_equal(labels[predicted], ids[predicted])
    np.testing.assert_array_equal(new[~predicted], ids[~predicted])
    assert not np.isin(ids[predicted], SPECIAL).any()
    assert new.dtype == labels.dtype == np.int64


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_rate_counts_only_ordinary_tokens(ids, rate):
    _, labels = masked(ids, rate=rate)
    ordinary = ~np.isin(ids, SPECIAL)
    tolerance = 5 * np.sqrt(rate * (1 - rate) / ordinary.sum())  # five standard deviations of the binomial share
    assert (labels != IGNORE_INDEX).sum() / ordinary.sum() == pytest.approx(rate, abs=tolerance)


def test_always_means_always(ids):
    new, labels = masked(ids)
    assert (new[labels != IGNORE_INDEX] == MASK).all()


def test_rate_one_predicts_every_ordinary_token(ids):
    _, labels = masked(ids, rate=1.0)
    np.testing.assert_array_equal(labels != IGNORE_INDEX, ~np.isin(ids, SPECIAL))


def test_80_10_10_has_these_shares(ids):
    new, labels = masked(ids, scheme="80-10-10")
    chosen = labels != IGNORE_INDEX
    hidden, kept = new[chosen] == MASK, new[chosen] == labels[chosen]
    # a random token is the old one with probability 1/95, so slightly more than a tenth is kept
    for share, expected in (
        (hidden.mean(), 0.8),
        (kept.mean(), 0.1 + 0.1 / 95),
        ((~hidden & ~kept).mean(), 0.1 * 94 / 95),
    ):
        assert share == pytest.approx(expected, abs=5 * np.sqrt(expected * (1 - expected) / chosen.sum()))
    assert not np.isin(new[chosen][~hidden], SPECIAL).any()


def test_a_seed_gives_one_masking(ids):
    for first, second in zip(masked(ids, seed=3), masked(ids, seed=3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert (masked(ids, seed=3)[1] != masked(ids, seed=4)[1]).any()


def test_there_is_always_a_label():
    row = np.array([0, 50, 51, 52, 2, 1])
    chosen = set()
    for seed in range(50):
        new, labels = masked(row, seed=seed, rate=1e-9)
        (position,) = np.flatnonzero(labels != IGNORE_INDEX)
        assert new[position] == MASK
        chosen.add(int(position))
    assert chosen == {1, 2, 3}


def test_every_token_predicts_the_next_one_that_is_no_padding():
    ids = np.array([[0, 50, 51, 2], [0, 52, 2, 1]], dtype=np.int32)
    new, labels = next_tokens(ids, 1)
    x = IGNORE_INDEX
    assert labels.tolist() == [[50, 51, 2, x], [52, 2, x, x]]
    np.testing.assert_array_equal(new, ids)
    assert new is not ids
    assert new.dtype == labels.dtype == np.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, r"rate must be in \(0, 1\], got 0.0"),
        ({"rate": 1.5}, "got 1.5"),
        ({"scheme": "never"}, "scheme must be one of always, 80-10-10, got 'never'"),
        ({"scheme": "80-10-10", "vocab_size": None}, "pass vocab_size"),
        ({"scheme": "80-10-10", "vocab_size": 4}, "not be special to draw"),
        ({"input_ids": np.array([[0, 2, 1]])}, "at least one token must not be special"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(arguments, message):
    right = {
        "input_ids": np.array([[0, 50, 2]]),
        "rng": np.random.default_rng(0),
        "rate": 0.4,
        "mask_token_id": MASK,
        "special_ids": SPECIAL,
    }
    with pytest.raises(ValueError, match=message):
        mask_tokens(**{**right, **arguments})
