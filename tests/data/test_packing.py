"""Rows and batches."""

import numpy as np
import pytest

from roberta_pln.data.packing import SHORT_ROWS, SHORTEST, Line, batches, encode_documents, pack

BOS, PAD, EOS = 0, 1, 2


def lines(*lengths, start=10):
    """Lines whose ids count on; a line's first id is one less when it starts a row."""
    ids = iter(range(start, 10**6, 2))
    inner = [[next(ids) for _ in range(length)] for length in lengths]
    return [Line([line[0] - 1, *line[1:]], line) for line in inner]


def test_lines_fill_rows_while_they_fit():
    (a, b, c), (d,) = lines(3, 3, 4), lines(2, start=1001)
    rows = pack([[a, b, c], [d]], 8, BOS, EOS)
    assert rows == [[BOS, *a.first, *b.inner, EOS], [BOS, *c.first, EOS], [BOS, *d.first, EOS]]


def test_a_long_line_is_cut_and_nothing_is_lost():
    short, long, last = lines(2, 15, 3)
    rows = pack([[short, long, last]], 8, BOS, EOS)
    inside = [index for row in rows for index in row[1:-1]]
    assert inside == [*short.first, *long.first, *last.inner]
    assert max(map(len, rows)) == 8


def test_random_rows_hold_every_line_once_and_vary():
    document = lines(*([4] * 200))
    passes = [pack([document], 32, BOS, EOS, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert passes[0] == passes[1] != passes[2]
    inside = [index for row in passes[0] for index in row[1:-1]]
    assert [index + index % 2 for index in inside] == [index for line in document for index in line.inner]
    assert any(len(row) < 25 for row in passes[0])
    assert max(map(len, passes[0])) <= 32


def test_share_of_short_rows():
    rows = pack([lines(*([1] * 10000))], 64, BOS, EOS, np.random.default_rng(0))[:-1]
    assert min(map(len, rows)) >= SHORTEST
    # a short row has full length with probability 1/57; five standard deviations of the binomial share
    expected = SHORT_ROWS * 56 / 57
    assert np.mean([len(row) < 64 for row in rows]) == pytest.approx(expected, abs=5 * (expected / len(rows)) ** 0.5)


def test_batches_keep_every_row_and_their_size():
    rows = [[BOS, *range(10, 10 + length), EOS] for length in np.random.default_rng(0).integers(1, 30, 100)]
    for rng in (None, np.random.default_rng(0)):
        found = list(batches(rows, 128, PAD, rng))
        assert all(batch.size <= 128 and batch.dtype == np.int64 for batch in found)
        kept = [[index for index in row.tolist() if index != PAD] for batch in found for row in batch]
        assert kept == rows if rng is None else sorted(kept) == sorted(rows)


def test_a_row_longer_than_a_batch_is_alone():
    found = list(batches([[0] * 9, [0] * 3, [0] * 3], 6, PAD))
    assert [batch.shape for batch in found] == [(1, 9), (2, 3)]


def test_encoded_lines_join_to_the_encoded_row():
    pytest.importorskip("tokenizers")
    from roberta_pln.tokenizer import Tokenizer

    document = ["In the beginning", "God created", "the heaven"]
    tokenizer = Tokenizer.train(document, 280)
    (row,) = pack(encode_documents([document], tokenizer), 64, BOS, EOS)
    assert row == tokenizer.encode(" ".join(document))
