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


# ---------------------------------------------------------------------- whole words

STARTS = np.arange(VOCAB) % 3 == 0  # every third id begins a word
STARTS[list(SPECIAL)] = False


def words(row):
    """Places of the tokens of each word of a row."""
    found, before = [], None
    for place, index in enumerate(row):
        if index not in SPECIAL:
            if STARTS[index] or before != place - 1:
                found.append([])
            found[-1].append(place)
            before = place
    return found


@pytest.mark.parametrize("scheme", ["always", "80-10-10"])
def test_all_tokens_of_a_word_are_predicted_or_none(ids, scheme):
    ids[::3, 50] = MASK  # a special token also ends a word
    rng = np.random.default_rng(0)
    new, labels = mask_tokens(ids, rng, 0.4, MASK, SPECIAL, scheme, VOCAB, STARTS)
    chosen = labels != IGNORE_INDEX
    shares = [row[word].mean() for row, some in zip(chosen, map(words, ids), strict=True) for word in some]
    assert set(shares) == {0.0, 1.0}
    # the share of words, and of tokens, is the rate; five standard deviations, and words have at most 20 tokens
    assert np.mean(shares) == pytest.approx(0.4, abs=5 * np.sqrt(0.24 / len(shares)))
    sizes = np.array([len(word) for some in map(words, ids) for word in some])
    assert sizes.max() > 5
    tolerance = 5 * np.sqrt(0.24 * (sizes**2).sum()) / sizes.sum()
    assert chosen.sum() / sizes.sum() == pytest.approx(0.4, abs=tolerance)
    assert not np.isin(ids[chosen], SPECIAL).any()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    if scheme == "always":
        np.testing.assert_array_equal(new, np.where(chosen, MASK, ids))


def test_single_tokens_are_words_of_one_token(ids):
    every = mask_tokens(
        ids, np.random.default_rng(5), 0.3, MASK, SPECIAL, "80-10-10", VOCAB, np.ones(VOCAB, dtype=bool)
    )
    for ours, theirs in zip(every, masked(ids, 5, 0.3, "80-10-10"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_word_ends_with_its_row():
    ids, seen = np.array([[7, 8], [7, 8]]), set()  # neither id begins a word
    for seed in range(50):
        _, labels = mask_tokens(ids, np.random.default_rng(seed), 0.5, MASK, SPECIAL, word_starts=STARTS)
        seen.add(tuple((labels != IGNORE_INDEX).ravel().tolist()))
    assert seen == {(True, True, True, True), (True, True, False, False), (False, False, True, True)}


def test_there_is_always_a_word():
    row = np.array([0, 6, 7, 8, 9, 10, 2, 10, 1])  # 6, 9 begin words, and 10 does behind 2
    chosen = set()
    for seed in range(50):
        _, labels = mask_tokens(row, np.random.default_rng(seed), 1e-9, MASK, SPECIAL, word_starts=STARTS)
        chosen.add(tuple(np.flatnonzero(labels != IGNORE_INDEX).tolist()))
    assert chosen == {(1, 2, 3), (4, 5), (7,)}


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
