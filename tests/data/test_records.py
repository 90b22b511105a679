"""Examples in files, and what is wrong with them."""

import json
import sys

import pytest

from roberta_pln.checks import InputError
from roberta_pln.data import records

GOOD = {
    "classification": {"text": "a", "label": 1},
    "regression": {"text": "a", "text_pair": "b", "label": 0.5},
    "token-classification": {"words": ["a", "b"], "labels": ["X", "Y"]},
    "question-answering": {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}, "id": "1"},
    "multiple-choice": {"choices": ["a", "b"], "label": 0},
    "masked-lm": {"text": "a"},
    "causal-lm": {"text": ""},
}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def test_every_task_has_a_good_record():
    assert GOOD.keys() == records.COLUMNS.keys()
    for task, record in GOOD.items():
        records.check([record, {**record, "other": None}], task)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines(tmp_path, suffix):
    text = "\ufeff" + json.dumps({"text": "é\u2028\n", "n": None}, ensure_ascii=False) + '\n\n{"text": "b"}\r\n'
    assert records.read(write(tmp_path / f"a{suffix}", text)) == [{"text": "é\u2028\n", "n": None}, {"text": "b"}]


def test_lines_of_text(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\u2028 three\n")
    assert [record["text"] for record in records.read(path, "causal-lm")] == ["one", "", "two\u2028 three"]


def test_tables(tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    path = write(tmp_path / "a.csv", 'text,label\n"NA",1\n"a, ""b""\nc",0\n')
    assert records.read(path, "classification") == [{"text": "NA", "label": 1}, {"text": 'a, "b"\nc', "label": 0}]
    assert not datasets.are_progress_bars_disabled()  # as before
    several = [GOOD["question-answering"], {**GOOD["question-answering"], "answers": {"text": [], "answer_start": []}}]
    datasets.Dataset.from_list(several).to_parquet(str(tmp_path / "a.parquet"))
    capfd.readouterr()
    assert records.read(tmp_path / "a.parquet", "question-answering") == several
    assert capfd.readouterr() == ("", "")
    for name, text, reason in (
        ("b.csv", "", "EmptyDataError: No columns"),
        ("b.parquet", "", "ArrowInvalid: .*0 bytes"),
        ("c.csv", "text,label\n", "no data"),
    ):
        with pytest.raises(InputError, match=rf"{name} must hold a table of at least one example.*\(.*{reason}.*\): "):
            records.read(write(tmp_path / name, text))
    with pytest.raises(InputError, match=r"label must be a finite number, got 'x' \(str\) in record 1 of .*d\.csv"):
        records.read(write(tmp_path / "d.csv", "text,label\na,x\nb,1\n"), "regression")


def test_tables_name_their_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(ImportError, match=r"pip install 'roberta_pln\[data\]'"):
        records.read(write(tmp_path / "a.csv", "text\na\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "a.jsonl must hold at least one example, got none"),
        ("a.jsonl", "\n \n", "must hold at least one example"),
        ("a.txt", "", "must hold at least one example"),
        ("a.tsv", "a", r"suffix .* one of \.jsonl, \.ndjson, \.json, \.txt, \.csv, \.parquet, got 'a.tsv'"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": }\n',
            r"got '\{\"text\": \}' in line 2 \(Expecting value.*one example per",
        ),
        ("a.jsonl", '\n["a"]\n', r"must be a JSON object, got \['a'\] \(list\) in line 2: write it as"),
        ("a.jsonl", b'{"text": "\xff"}\n', "must be UTF-8 text, got other bytes .*: convert it"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        records.read(write(tmp_path / name, text))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.jsonl"):
        records.read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "masked-lm",
            {"text": 5},
            r"text must be a string of Unicode characters, got 5 \(int\) in record 2 of the records",
        ),
        ("causal-lm", {"text": "a\ud800"}, r"Unicode characters, got 'a\\ud800' \(str\)"),
        ("classification", {"label": True}, r"label must be a string or an integer, got True \(bool\)"),
        ("classification", {"label": 0.5}, "label must be a string or an integer, got 0.5"),
        ("classification", {"text_pair": 3}, "text_pair must be a string of Unicode characters, got 3"),
        ("regression", {"label": float("nan")}, "label must be a finite number, got nan"),
        ("regression", {"label": "0.5"}, "label must be a finite number, got '0.5'"),
        ("token-classification", {"words": "a b"}, r"words must be a list of strings, got 'a b' \(str\)"),
        ("token-classification", {"labels": [1, 2]}, r"labels must be a list of strings, got \[1, 2\]"),
        ("question-answering", {"answers": None}, "answers must be .* got None"),
        ("question-answering", {"answers": {"text": ["c"]}}, "answers must be "),
        ("question-answering", {"answers": {"text": ["c"], "answer_start": []}}, "as many integers"),
        ("question-answering", {"context": "c" * 99, "question": ["q" * 99]}, r"got \['q+\.\.\. \(list\)"),
        ("multiple-choice", {"label": "0"}, "label must be an integer"),
        ("multiple-choice", {"choices": None}, "choices must be a list of strings, got None"),
    ],
)
def test_values_that_do_not_fit(task, change, message):
    with pytest.raises(InputError, match=message):
        records.check([GOOD[task], {**GOOD[task], **change}], task)


def test_none_is_no_value_of_an_optional_column():
    records.check([{**GOOD["classification"], "text_pair": None}], "classification")


def test_other_records_that_do_not_fit():
    with pytest.raises(InputError, match="must have the columns text, text_pair, label; record 2 of x has a, b but not "
                       "text, label: rename"):  # fmt: skip
        records.check([GOOD["classification"], {"a": 1, "b": 2}], "classification", "x")
    with pytest.raises(InputError, match="record 1 of the records has none but not text"):
        records.check([{}], "masked-lm")
    with pytest.raises(InputError, match="masked-lm needs at least one record"):
        records.check([], "masked-lm")
    with pytest.raises(InputError, match="task must be one of classification, .*causal-lm, got 'ner'"):
        records.check([{}], "ner")
