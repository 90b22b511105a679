"""Rows of the tasks in which an example is a row."""

import pytest

pytest.importorskip("tokenizers")

import roberta_pln
from roberta_pln.checks import InputError
from roberta_pln.data import features
from roberta_pln.tokenizer import Tokenizer

ASSET = f"{roberta_pln.__path__[0]}/assets/kjv"
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "And God said, Let there be light: and there was light.",
    "naïve 漢字 👩‍👩‍👧 zyxwvut",
    "Amen.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ASSET)


def examples(labels, **more):
    return [{"text": text, "label": label, **more} for text, label in zip(TEXTS, labels, strict=True)]


@pytest.mark.parametrize(
    ("labels", "given", "names", "indices"),
    [
        (["no", "yes", "no", "maybe"], None, ("maybe", "no", "yes"), [1, 2, 1, 0]),
        ([10, 9, 10, -1], None, ("-1", "9", "10"), [2, 1, 2, 0]),
        ([10, "9", 10, 9], None, ("10", "9"), [0, 1, 0, 1]),
        ([1, 0, 1, 1], ["1", "0", "2"], ("1", "0", "2"), [0, 1, 0, 0]),
    ],
)
def test_classes(tokenizer, labels, given, names, indices):
    found = features.classification(examples(labels), tokenizer, 128, given)
    assert found.label_names == names
    assert [row["labels"] for row in found.rows] == indices
    assert [row["input_ids"] for row in found.rows] == [tokenizer.encode(text) for text in TEXTS]
    assert (found.cut, found.left_out) == (0, 0)


def test_long_texts_are_cut_and_counted(tokenizer):
    whole = [len(tokenizer.encode(text)) for text in TEXTS]
    assert min(whole) < 12 < max(whole)
    found = features.regression(examples([1, 2.5, 3, 4]), tokenizer, 12)
    for text, row in zip(TEXTS, found.rows, strict=True):
        ids = tokenizer.encode(text)
        assert row["input_ids"] == (ids if len(ids) <= 12 else [*ids[:11], tokenizer.eos_token_id])
    assert found.cut == sum(length > 12 for length in whole)
    assert [row["labels"] for row in found.rows] == [1.0, 2.5, 3.0, 4.0]
    assert all(isinstance(row["labels"], float) for row in found.rows)
    assert found.label_names == ()
    later = features.classification([*examples([0, 1, 1, 1])] * 300, tokenizer, 12)  # more than are encoded at once
    assert [row["input_ids"] for row in later.rows] == [row["input_ids"] for row in found.rows] * 300
    assert later.cut == found.cut * 300


def test_pairs_are_cut_at_the_longer_text(tokenizer):
    short, long = tokenizer.encode("Amen.")[1:-1], tokenizer.encode(TEXTS[0])[1:-1]
    found = features.classification(examples([0, 1, 1, 1], text_pair="Amen."), tokenizer, 12)
    assert found.rows[0]["input_ids"] == [0, *long[: 8 - len(short)], 2, 2, *short, 2]


def test_choices(tokenizer):
    records = [
        {"prompt": "And God", "choices": TEXTS[:3], "label": 2},
        {"prompt": "", "choices": TEXTS[1:], "label": 0},
        {"choices": ["a", "b", "c"], "label": 1},
    ]
    found = features.multiple_choice(records, tokenizer, 128)
    assert [row["labels"] for row in found.rows] == [2, 0, 1]
    assert [row["input_ids"] for row in found.rows] == [
        [tokenizer.encode("And God", text) for text in TEXTS[:3]],
        [tokenizer.encode(text) for text in TEXTS[1:]],
        [tokenizer.encode(text) for text in "abc"],
    ]
    assert found.cut == 0
    cut = features.multiple_choice(records, tokenizer, 10)
    assert cut.cut == 2
    assert max(len(ids) for row in cut.rows for ids in row["input_ids"]) == 10


def texts(*several):
    return [{"text": text} for text in several]


@pytest.mark.parametrize("length", [8, 9, 16, 128])
def test_rows_of_a_masked_model_hold_the_text(tokenizer, length):
    joined = features.masked_lm(texts(*TEXTS, " ", ""), tokenizer, length)
    inside = [index for row in joined.rows for index in row["input_ids"][1:-1]]
    assert tokenizer.decode(inside).replace(" ", "") == "".join(TEXTS).replace(" ", "")
    assert joined.left_out == 2
    assert all(row["input_ids"][0] == 0 and row["input_ids"][-1] == 2 for row in joined.rows)
    assert max(len(row["input_ids"]) for row in joined.rows) <= length
    apart = features.masked_lm(texts(*TEXTS, "<s>"), tokenizer, length, join=False)
    assert apart.left_out == 1
    for text in TEXTS:
        ids = tokenizer.encode(text)[1:-1]
        for start in range(0, len(ids), length - 2):
            assert {"input_ids": [0, *ids[start : start + length - 2], 2]} in apart.rows


def test_joined_rows_are_encoded_as_joined_texts(tokenizer):
    (row,) = features.masked_lm(texts(*TEXTS), tokenizer, 128).rows
    assert row["input_ids"] == tokenizer.encode(" ".join(TEXTS))
    (row,) = features.masked_lm(texts(f" {TEXTS[0]}\n\n{TEXTS[1]}", TEXTS[2]), tokenizer, 128).rows
    assert row["input_ids"] == tokenizer.encode(" ".join(TEXTS[:3]))


@pytest.mark.parametrize("length", range(8, 40))
def test_blocks_joined_are_the_texts(tokenizer, length):
    found = features.causal_lm(texts(*TEXTS, ""), tokenizer, length)
    stream = [index for row in found.rows for index in row["input_ids"]]
    whole = [index for text in TEXTS for index in tokenizer.encode(text)]
    assert found.left_out == 1 + (len(whole) % length == 1)
    assert [*stream, *whole[len(stream) :]] == whole
    assert whole[len(stream) :] == ([tokenizer.eos_token_id] if len(whole) % length == 1 else [])
    assert {len(row["input_ids"]) for row in found.rows[:-1]} <= {length}
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) > 1 for row in found.rows)


@pytest.mark.parametrize(("last", "left_out"), [(1, 1), (2, 0)])
def test_a_last_block_of_one_token_is_left_out(tokenizer, last, left_out):
    length = sum(len(tokenizer.encode(text)) for text in TEXTS) - last
    found = features.causal_lm(texts(*TEXTS), tokenizer, length)
    assert [len(row["input_ids"]) for row in found.rows] == [length, last][: 2 - left_out]
    assert found.left_out == left_out


BAD = {"text": "a", "label": 0}


@pytest.mark.parametrize(
    ("make", "records", "options", "message"),
    [
        ("classification", [{**BAD, "label": "new"}], {"label_names": ["x", "y"]}, r"known ones \(x, y\), got 'new'"),
        ("classification", [BAD], {}, "at least two different label names are needed, each once, got 0"),
        ("classification", [BAD], {"label_names": ["0", "0"]}, "each once, got 0, 0"),
        ("classification", [BAD, {**BAD, "text_pair": "b"}], {"label_names": "01"}, "or none, got 1 of 2 without"),
        (
            "classification",
            [BAD],
            {"label_names": "01", "max_length": 7},
            "max_length must be at least 8 tokens, got 7",
        ),
        ("regression", [{"text": "a"}], {}, "record 1 of the records has text but not label"),
        ("multiple_choice", [{"choices": ["a"], "label": 0}], {}, "at least two, got 1 in record 1"),
        ("multiple_choice", [{"choices": ["a", "b"], "label": 2}], {}, "index of one of 2 choices, got 2 in record 1"),
        ("multiple_choice", [{"choices": ["a", "b"], "label": -1}], {}, "got -1 in record 1"),
        (
            "multiple_choice",
            [{"choices": ["a", "b"], "label": 0}, {"choices": ["a", "b", "c"], "label": 0}],
            {},
            "got 3 in record 2 and 2 in the first",
        ),
        ("masked_lm", [{"text": " "}, {"text": ""}], {}, "something to learn, got 2 that have nothing"),
        ("masked_lm", [{"text": "<mask>"}], {}, "got 1 that have nothing"),
        ("causal_lm", [{"text": ""}], {}, "something to learn, got 1 that have nothing"),
        ("causal_lm", [{"text": "a"}], {"max_length": 0}, "max_length must be at least 8 tokens, got 0"),
    ],
)
def test_what_cannot_be_learnt_from(tokenizer, make, records, options, message):
    with pytest.raises(InputError, match=message):
        getattr(features, make)(records, tokenizer, **{"max_length": 16, **options})
