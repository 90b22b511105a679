"""Rows and batches."""

import numpy as np
import pytest

from roberta_pln.data.packing import SHORT_ROWS, SHORTEST, Line, batches, encode_documents, pack, pack_sequences

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


# ---------------------------------------------------------------------- several sequences in a row


def sequences(count=500, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.0, 0.8, count).astype(int), 1, 128)
    return [rng.integers(0, 99, length) for length in lengths]


@pytest.mark.parametrize("rows", [None, 7])
def test_every_token_is_there_once_and_in_order(rows):
    given = sequences()
    packed = pack_sequences(given, 128, PAD, rows)
    assert len({part.shape for batch in packed.batches for part in batch}) == 1
    assert all(part.dtype == np.int64 for batch in packed.batches for part in batch)
    if rows is not None:
        assert packed.shape == (len(packed.batches), rows, 128)
    for part, ids in zip(packed.unpack([batch.input_ids for batch in packed.batches]), given, strict=True):
        assert np.array_equal(part, ids)
    seen = set()
    for at, part in zip(packed.places, packed.unpack([batch.segment_ids for batch in packed.batches]), strict=True):
        assert part[0] > 0
        assert (part == part[0]).all()
        seen.add((at.batch, at.row, int(part[0])))
    assert len(seen) == len(given)  # no number twice in a row
    inside = np.concatenate([batch.segment_ids for batch in packed.batches]) > 0
    assert inside.sum() == sum(map(len, given)) == round(packed.fill * inside.size)  # nothing overlaps
    for batch in packed.batches:
        assert (batch.input_ids[batch.segment_ids == 0] == PAD).all()
        assert (np.diff(np.where(batch.segment_ids, batch.segment_ids, 10**6)) >= 0).all()  # 1, 2, ..., then padding


def test_few_rows_hold_them():
    given = sequences(2000)
    tokens = sum(map(len, given))
    assert pack_sequences(given, 128, PAD).shape[1] <= 1.3 * np.ceil(tokens / 128)
    assert len(given) > 3 * 1.3 * np.ceil(tokens / 128)  # the control: a row for each would not do


def test_a_small_case():
    (batch,) = pack_sequences([[5, 6], [7, PAD, 8, 9], [4]], 5, PAD, rows=3).batches
    assert batch.input_ids.tolist() == [[7, PAD, 8, 9, 4], [5, 6, PAD, PAD, PAD], [PAD] * 5]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2], [1, 1, 0, 0, 0], [0] * 5]
    assert batch.position_ids.tolist() == [[2, 1, 3, 4, 2], [2, 3, 1, 1, 1], [1] * 5]


def test_labels_and_outputs():
    packed = pack_sequences([[5, 6], [7, 8, 9], [4]], 4, PAD, rows=1)
    labels = packed.labels([[50, 60], [70, -100, 90], [40]])
    assert [rows.tolist() for rows in labels] == [[[70, -100, 90, 40]], [[50, 60, -100, -100]]]
    assert [part.tolist() for part in packed.unpack(labels)] == [[50, 60], [70, -100, 90], [40]]
    assert [part.shape for part in packed.unpack([np.zeros((1, 4, 3))] * 2)] == [(2, 3), (3, 3), (1, 3)]
    with pytest.raises(ValueError, match=r"outputs must be 2 of \(1, 4, \.\.\.\), one for each batch, got"):
        packed.unpack([np.zeros((2, 4))])
    for wrong, message in (
        ([[50, 60], [70, 80], [40]], r"for each token, \(3,\), got \(2,\) of int64 at index 1"),
        ([[50, 60], [70, 80, 90], [4.5]], r"for each token, \(1,\), got \(1,\) of float64 at index 2"),
        ([[50, 60]], "labels must be those of 3 sequences, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            packed.labels(wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[5], [6] * 5], "from 1 to 4 tokens, the length of a row, got 5 at index 1: .* split a long one"),
        ([[5], []], "from 1 to 4 tokens, the length of a row, got 0 at index 1: leave an empty one out"),
        ([[5.0]], r"the ids of one text, \(tokens,\) integers, got \(1,\) of float64 at index 0"),
        ([[[5]]], r"the ids of one text, \(tokens,\) integers, got \(1, 1\) of int64 at index 0"),
        ([], "at least one sequence and one row are needed, got 0"),
    ],
)
def test_sequences_that_cannot_be_packed(given, message):
    with pytest.raises(ValueError, match=message):
        pack_sequences(given, 4, PAD)
    with pytest.raises(ValueError, match="one row are needed, got 1 and rows=0"):
        pack_sequences([[5]], 4, PAD, rows=0)
