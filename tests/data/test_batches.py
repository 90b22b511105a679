"""The order of batches, where they go on, and who reads what."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import roberta_pln
from roberta_pln.checks import InputError
from roberta_pln.data.batches import START, Batches, Position, collate, masker
from roberta_pln.data.masking import mask_tokens
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

ASSET = f"{roberta_pln.__path__[0]}/assets/kjv"
PAD = 1


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ASSET)


def rows(count=37, seed=0, longest=40):
    """Features whose second id tells them apart."""
    lengths = np.random.default_rng(seed).integers(4, longest + 1, count)
    return [{"input_ids": [0, 10 + n, *range(100, 97 + length), 2], "labels": n} for n, length in enumerate(lengths)]


def read(batches, start=START, epochs=2):
    return list(batches.run(start, epochs))


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def for_tokens(given):
    """The same, with labels of tokens."""
    return [{"input_ids": row["input_ids"], "labels": [row["labels"]] * len(row["input_ids"])} for row in given]


SETTINGS = [
    {"batch_size": 6},
    {"batch_size": 6, "shuffle": False},
    {"batch_size": 6, "by_length": False, "drop_last": True},
    {"batch_size": 6, "drop_last": True, "lengths": [48, 16]},
    {"tokens": 200, "multiple": 8},
    {"tokens": 200},
    {"tokens": 200, "shuffle": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_epoch_holds_every_row_once(settings):
    given = rows()
    batches = Batches(given, PAD, **settings)
    sizes = []
    for epoch in range(5):
        found = [array for array, _ in read(batches, Position(epoch), epoch + 1)]
        assert len(found) == len(batches)
        numbers = [number for arrays in found for number in arrays["labels"].tolist()]
        assert len(set(numbers)) == len(numbers) == (36 if "drop_last" in settings else 37)
        for arrays in found:
            for ids, mask, number in zip(arrays["input_ids"], arrays["attention_mask"], arrays["labels"], strict=True):
                np.testing.assert_array_equal(ids[mask == 1], given[number]["input_ids"])
                assert (ids[mask == 0] == PAD).all()
            assert all(array.dtype == np.int64 for array in arrays.values())
            if "tokens" in settings:
                assert arrays["input_ids"].size <= 200
            elif "drop_last" in settings:
                assert len(arrays["labels"]) == 6
            if "lengths" in settings:
                assert arrays["input_ids"].shape[1] in (16, 48)
            elif "multiple" in settings:
                assert arrays["input_ids"].shape[1] % 8 == 0
            else:
                assert arrays["attention_mask"].any(0).all()  # no longer than the longest row
        indices = [index for batch in range(len(batches)) for index in batches.indices(Position(epoch, batch))]
        assert indices == numbers
        sizes.append(sorted(len(arrays["labels"]) for arrays in found))
    assert all(size == sizes[0] for size in sizes)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_order_is_that_of_the_seed_and_the_epoch(settings):
    def order(epoch, seed=0):
        batches = Batches(rows(), PAD, seed=seed, **settings)
        return [
            number for at in range(len(batches)) for number in batches.batch(Position(epoch, at))["labels"].tolist()
        ]

    assert order(3) == order(3)
    if settings.get("shuffle", True):
        assert order(3) != order(4)
        assert order(3) != order(3, seed=1)
        assert order(0) != sorted(order(0))
    else:
        assert order(3) == order(4) == order(3, seed=1) == list(range(37))


def test_rows_of_a_batch_have_similar_lengths():
    given = rows(400)
    padding = {}
    for by_length in (True, False):
        batches = Batches(given, PAD, batch_size=20, by_length=by_length)
        masks = [batches.batch(Position(0, at))["attention_mask"] for at in range(len(batches))]
        padding[by_length] = sum((mask == 0).sum() for mask in masks) / sum(mask.size for mask in masks)
        widths = [mask.shape[1] for mask in masks]
        assert widths != sorted(widths)
    # rows of a batch are at most two buckets of 8 apart, so less than 16 of some 22 tokens; on average far less
    assert padding[True] < 0.25 < padding[False]


def test_what_is_dropped_changes():
    given = rows(8)
    batches = Batches(given, PAD, batch_size=5, drop_last=True)
    kept = [frozenset(batches.indices(Position(epoch))) for epoch in range(40)]
    assert set.union(*map(set, kept)) == set(range(8))  # also the longest, which come last by length


@pytest.mark.parametrize("settings", [*SETTINGS, {"batch_size": 2, "pack": 48}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_run_goes_on_at_every_position(tokenizer, settings, masked):
    given = for_tokens(rows()) if "pack" in settings else rows()

    def made():
        return Batches(given, PAD, seed=3, label=masker(tokenizer, 0.3) if masked else None, **settings)

    whole = read(made(), epochs=3)
    positions = [Position(), *(position for _, position in whole)]
    assert positions[-1] == Position(3, 0)
    for at, position in enumerate(positions):
        position = Position(**json.loads(json.dumps(position._asdict())))
        same([arrays for arrays, _ in read(made(), position, 3)], [arrays for arrays, _ in whole[at:]])


def test_a_run_goes_on_for_ever():
    batches = Batches(rows(5), PAD, batch_size=3)
    positions = [position for _, position in itertools.islice(batches.run(), 5)]
    assert positions == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_masks_are_those_of_the_batch_and_every_row_has_one(tokenizer):
    given = [{"input_ids": row["input_ids"]} for row in rows(64)]
    batches = Batches(given, PAD, batch_size=32, seed=7, label=masker(tokenizer, 0.05, "80-10-10", True))
    plain = Batches(given, PAD, batch_size=32, seed=7)
    again = 0
    for epoch, at in itertools.product(range(2), range(2)):
        ids, found = plain.batch(Position(epoch, at))["input_ids"], batches.batch(Position(epoch, at))
        settings = 0.05, tokenizer.mask_token_id, tokenizer.special_ids, "80-10-10", tokenizer.vocab_size
        rng = np.random.default_rng([7, epoch, 1 + at])
        new, labels = mask_tokens(ids, rng, *settings, tokenizer.word_starts)
        kept = (labels != IGNORE_INDEX).any(1)
        again += (~kept).sum()
        np.testing.assert_array_equal(found["input_ids"][kept], new[kept])
        np.testing.assert_array_equal(found["labels"][kept], labels[kept])
        predicted = found["labels"] != IGNORE_INDEX
        assert predicted.any(1).all()
        np.testing.assert_array_equal(found["labels"][predicted], ids[predicted])
    assert again > 0
    first, later = (batches.batch(Position(epoch))["labels"] for epoch in range(2))
    assert first.shape != later.shape or (first != later).any()


# ---------------------------------------------------------------------- several in a row


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"tokens": 200}, {"batch_size": 3, "shuffle": False}], ids=str)
def test_packed_rows_hold_every_feature_once_and_apart(settings):
    given = for_tokens(rows())
    batches = Batches(given, PAD, pack=48, **settings)
    fewest = -(-sum(len(row["input_ids"]) for row in given) // 48)
    for epoch in range(3):
        found, seen = [batches.batch(Position(epoch, at)) for at in range(len(batches))], []
        for at, arrays in enumerate(found):
            assert arrays.keys() == {"input_ids", "segment_ids", "position_ids", "labels"}
            inside = []
            for ids, segments, positions, labels in zip(*(arrays[name] for name in arrays), strict=True):
                assert ids.shape == (48,)
                assert (np.diff(segments[segments > 0]) >= 0).all()  # side by side, in order
                for segment in range(1, segments.max() + 1):
                    one = segments == segment
                    assert ids[one].tolist() == given[labels[one][0]]["input_ids"]
                    assert labels[one].tolist() == given[labels[one][0]]["labels"]
                    assert positions[one].tolist() == list(range(PAD + 1, PAD + 1 + one.sum()))
                    inside.append(int(labels[one][0]))
                padding = segments == 0
                assert (ids[padding] == PAD).all()
                assert (positions[padding] == PAD).all()
                assert (labels[padding] == IGNORE_INDEX).all()
            assert inside == batches.indices(Position(epoch, at))
            seen += inside
        assert sorted(seen) == list(range(37))
        sizes = [len(arrays["input_ids"]) for arrays in found]
        assert fewest <= sum(sizes) <= fewest * 11 / 9 + 1  # the bound of `packing.pack_sequences`
        assert max(sizes) <= (3 if "batch_size" in settings else 200 // 48)


def test_packed_rows_of_another_epoch_and_seed_are_others():
    def order(epoch, **settings):
        return Batches(for_tokens(rows()), PAD, batch_size=3, pack=48, **settings).order(epoch)

    assert order(1) == order(1) != order(2)
    assert order(1) != order(1, seed=1)
    assert order(1, shuffle=False) == order(2, shuffle=False)


def test_a_masked_text_among_others(tokenizer):
    """Masks of a packed row are those of its ids; its texts begin and end where they did."""
    given = [{"input_ids": row["input_ids"]} for row in rows()]
    packed = Batches(given, PAD, batch_size=3, pack=48, label=masker(tokenizer, 0.4))
    plain = Batches(given, PAD, batch_size=3, pack=48)
    for arrays, other in zip(read(packed), read(plain), strict=True):
        ids, labels = arrays[0]["input_ids"], arrays[0]["labels"]
        np.testing.assert_array_equal(np.where(labels == IGNORE_INDEX, ids, labels), other[0]["input_ids"])
        assert (ids[labels != IGNORE_INDEX] == tokenizer.mask_token_id).all()
        np.testing.assert_array_equal(arrays[0]["segment_ids"], other[0]["segment_ids"])


# ---------------------------------------------------------------------- arrays


def test_arrays_of_every_task():
    x = IGNORE_INDEX
    for given, expected in (
        (
            [{"input_ids": [0, 5, 2], "labels": [x, 1, x]}, {"input_ids": [0, 2], "labels": [x, 3]}],
            {
                "input_ids": [[0, 5, 2, 1], [0, 2, 1, 1]],
                "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
                "labels": [[x, 1, x, x], [x, 3, x, x]],
            },
        ),
        (
            [{"input_ids": [[0, 5, 2], [0, 2]], "labels": 1}],
            {
                "input_ids": [[[0, 5, 2, 1], [0, 2, 1, 1]]],
                "attention_mask": [[[1, 1, 1, 0], [1, 1, 0, 0]]],
                "labels": [1],
            },
        ),
        (
            [{"input_ids": [0, 2], "start_positions": 0, "end_positions": 1}],
            {
                "input_ids": [[0, 2, 1, 1]],
                "attention_mask": [[1, 1, 0, 0]],
                "start_positions": [0],
                "end_positions": [1],
            },
        ),
        (
            [{"input_ids": [0, 2], "labels": 0.5}],
            {"input_ids": [[0, 2, 1, 1]], "attention_mask": [[1, 1, 0, 0]], "labels": [0.5]},
        ),
    ):
        arrays = collate(given, PAD, 4)
        assert {name: array.tolist() for name, array in arrays.items()} == expected
        real = {name for name, array in arrays.items() if array.dtype == np.float32}
        assert real == ({"labels"} if expected.get("labels") == [0.5] else set())
        assert all(array.dtype == np.int64 for name, array in arrays.items() if name not in real)
        longest = collate(given, PAD)
        assert longest["attention_mask"].any(tuple(range(longest["attention_mask"].ndim - 1))).all()


def test_a_budget_counts_every_choice():
    given = [{"input_ids": [[0, 5, 2]] * 4, "labels": 1}] * 9
    for shuffle in (False, True):
        sizes = [arrays["input_ids"].size for arrays, _ in read(Batches(given, PAD, tokens=100, shuffle=shuffle))]
        assert 24 < max(sizes) <= 100


def test_choices_must_be_as_many():
    with pytest.raises(InputError, match=r"same number of choices, got \[1, 2\]"):
        collate([{"input_ids": [[0, 2]], "labels": 0}, {"input_ids": [[0, 2], [0, 2]], "labels": 0}], PAD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of batch_size and tokens is needed, got None and None"),
        ({"batch_size": 2, "tokens": 9}, "one of batch_size and tokens is needed, got 2 and 9"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2, "multiple": 0}, "multiple must be at least 1, got 0"),
        ({"batch_size": 2, "rows": []}, "rows must be at least 1, got 0"),
        ({"batch_size": 2, "seed": -1}, "seed must be at least 0, got -1"),
        ({"tokens": 99, "by_length": False}, "leave by_length and drop_last"),
        ({"tokens": 99, "drop_last": True}, "leave by_length and drop_last"),
        (
            {"batch_size": 4, "lengths": [8, 16]},
            r"must fit into one of lengths \[8, 16\], got \d+ tokens: add a longer",
        ),
        ({"batch_size": 2, "pack": 0}, "pack must be at least 1, got 0"),
        ({"batch_size": 2, "pack": 48}, "hold what belongs to tokens, .* got labels that does not: leave pack"),
        (
            {"batch_size": 2, "pack": 8, "rows": for_tokens(rows())},
            r"from 1 to 8 tokens to be packed into a row, got \d+ at index 0: make features of a shorter max_length",
        ),
        ({"batch_size": 99, "drop_last": True}, "drop_last needs at least 99 rows, which fill a batch, got 37"),
    ],
)
def test_settings_that_do_not_go(settings, message):
    with pytest.raises(InputError, match=message):
        Batches(settings.pop("rows", rows()), PAD, **settings)


@pytest.mark.parametrize("position", [Position(0, 7), Position(0, -1), Position(-1, 0)])
def test_positions_that_are_not_there(position):
    with pytest.raises(InputError, match=r"a batch in \[0, 7\), got Position.*other data or settings"):
        next(Batches(rows(), PAD, batch_size=6).run(position))
