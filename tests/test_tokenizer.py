"""Text to ids and back."""

import json
import sys

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

from roberta_pln.tokenizer import Tokenizer

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void; and darkness was upon the face of the deep.",
    "And God said, Let there be light: and there was light.",
]
ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "tab\tand\nline\r\n",
    "naïve café — “quotes”",
    "漢字かな交じり文",
    "👩‍👩‍👧 🏳️‍🌈",
    "e\u0301 \u200b\ufeff\x00\x7f",
    "a" * 300,
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=300, max_length=24)


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


def test_special_tokens_have_roberta_ids(tokenizer):
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos", "unk", "mask")]
    assert ids == [0, 1, 2, 3, tokenizer.vocab_size - 1]
    assert [tokenizer.id_to_token(index) for index in ids] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.special_ids == tuple(ids)


def test_one_text_has_two_ends_and_a_pair_four(tokenizer):
    first, second = tokenizer.encode("light")[1:-1], tokenizer.encode("earth")[1:-1]
    assert tokenizer.encode("light") == [0, *first, 2]
    assert tokenizer.encode("light", "earth") == [0, *first, 2, 2, *second, 2]


def test_mask_takes_the_space_before_it(tokenizer):
    ids = tokenizer.encode("the <mask> said")
    assert ids == [0, *tokenizer.encode("the")[1:-1], tokenizer.mask_token_id, *tokenizer.encode(" said")[1:-1], 2]


@pytest.mark.parametrize("text", ODD_TEXTS + TEXTS)
def test_every_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>{text}</s>"


def test_batch_is_padded_on_the_right(tokenizer):
    batch = tokenizer(["God", "the earth was void"])
    short, long = tokenizer.encode("God"), tokenizer.encode("the earth was void")
    padding = len(long) - len(short)
    np.testing.assert_array_equal(batch["input_ids"], [short + [1] * padding, long])
    np.testing.assert_array_equal(batch["attention_mask"], [[1] * len(short) + [0] * padding, [1] * len(long)])
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"texts": "a"}, (1, 3)),
        ({"texts": ["a", "b"], "padding": False}, (2, 3)),
        ({"texts": ["a", "the earth"], "padding": 24}, (2, 24)),
        ({"texts": TEXTS, "max_length": 8, "truncation": True}, (3, 8)),
        ({"texts": TEXTS, "pairs": TEXTS, "max_length": 9, "truncation": True}, (3, 9)),
    ],
)
def test_batch_shapes(tokenizer, arguments, shape):
    batch = tokenizer(**arguments)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == shape
    assert set(batch["input_ids"][:, 0]) == {0}


def test_truncation_does_not_outlive_its_call(tokenizer):
    whole = tokenizer.encode(TEXTS[0])
    tokenizer(TEXTS[0], max_length=5, truncation=True)
    assert tokenizer.encode(TEXTS[0]) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": TEXTS, "max_length": 8}, "at most max_length=8 tokens, got"),
        ({"texts": TEXTS, "padding": 8}, "at most padding=8 tokens, got"),
        ({"texts": TEXTS, "padding": False}, "equal length"),
        ({"texts": TEXTS, "padding": True}, "padding must be"),
        ({"texts": TEXTS, "padding": "max_length"}, "padding must be"),
        ({"texts": TEXTS, "pairs": TEXTS[:1]}, "1 pairs for 3 texts"),
        ({"texts": []}, "got none"),
    ],
)
def test_wrong_calls_say_what_is_wrong(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(**arguments)


@pytest.mark.parametrize("index", [-1, 300])
def test_ids_out_of_range_are_refused(tokenizer, index):
    with pytest.raises(ValueError, match=rf"in \[0, {tokenizer.vocab_size}\), got {index}"):
        tokenizer.decode([0, index])


def test_unknown_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'nowhere'"):
        tokenizer.token_to_id("nowhere")


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("text", ODD_TEXTS + TEXTS)
def test_spans_cover_the_text_without_its_spaces(tokenizer, text, trim):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())  # other files may leave spaces in the spans
    backend.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False
    )
    ids, spans = Tokenizer(backend).encode_with_spans(text)
    assert ids == tokenizer.encode(text)[1:-1]
    assert len(spans) == len(ids)
    assert {place for start, end in spans for place in range(start, end)} == {
        place for place, character in enumerate(text) if character != " "
    }
    assert spans == sorted(spans)


def test_rows_are_cut_and_counted(tokenizer):
    texts = [*TEXTS, "God"] * 400  # more than are encoded at once
    whole, none = tokenizer.encode_rows(texts)
    assert none == 0
    assert whole == [tokenizer.encode(text) for text in texts]
    rows, cut = tokenizer.encode_rows(texts, max_length=8)
    assert rows == [row if len(row) <= 8 else [*row[:7], 2] for row in whole]
    assert cut == sum(len(row) > 8 for row in whole) == 1200


def test_words_start_with_a_space(tokenizer):
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    assert [tokens[index] for index in np.flatnonzero(tokenizer.word_starts)] == [t for t in tokens if t[0] == "Ġ"]
    assert {False, True} == set(tokenizer.word_starts.tolist())


# ---------------------------------------------------------------------- files


def test_saved_tokenizer_is_the_same(tokenizer, directory):
    loaded = Tokenizer.from_pretrained(directory)
    assert loaded.max_length == 24
    assert [loaded.encode(text) for text in TEXTS + ODD_TEXTS] == [tokenizer.encode(text) for text in TEXTS + ODD_TEXTS]


def test_vocabulary_and_merges_are_enough(directory, tmp_path):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(directory)
    cases = [*TEXTS, *ODD_TEXTS, "the <mask> said"]
    assert [ours.encode(text, text) for text in cases] == [theirs.encode(text, text) for text in cases]


def test_absent_files_are_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*vocab\.json with merges\.txt"):
        Tokenizer.from_pretrained(tmp_path)


def test_vocabulary_without_special_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "a": 1}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"<pad>, </s>, <unk>, <mask> is missing"):
        Tokenizer.from_pretrained(tmp_path)


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer.from_pretrained(tmp_path)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 261"):
        Tokenizer.train(TEXTS, vocab_size=260)


def test_missing_library_names_the_extra(monkeypatch, directory):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # importing it fails
    with pytest.raises(ImportError, match=r"roberta_pln\[text\]"):
        Tokenizer.from_pretrained(directory)


def test_transformers_reads_the_files_and_agrees(tokenizer, directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.RobertaTokenizerFast.from_pretrained(directory)
    assert (theirs.mask_token_id, theirs.pad_token_id, len(theirs)) == (
        tokenizer.mask_token_id,
        1,
        tokenizer.vocab_size,
    )
    assert theirs.model_max_length == 24
    for text in [*TEXTS, *ODD_TEXTS, "the <mask> said", "<mask>", "a  <mask>  b"]:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.encode(text, "void") == theirs.encode(text, "void")
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ours = tokenizer(TEXTS, TEXTS[::-1], max_length=21, truncation=True)
    expected = theirs(TEXTS, TEXTS[::-1], max_length=21, truncation=True, padding=True, return_tensors="np")
    for name, array in ours.items():
        np.testing.assert_array_equal(array, expected[name])
