"""Documents and the held-out part."""

import shutil
import struct

import pytest

from roberta_pln.data import corpus

TEXT = "Holy Bible\nGe1:1 In the beginning.\nGe1:2 And the earth.\n1Sm3:9 Speak, LORD.\nGe2:1 Thus.\n"


def literal_codes(text):
    """compress(1)'s codes for a text without any compression: nine bits per byte, lowest bits first."""
    bits = sum(byte << (9 * index) for index, byte in enumerate(text.encode("ascii")))
    return bits.to_bytes((9 * len(text) + 7) // 8, "little")


def bible(text, size):
    windows = [text[start : start + size] for start in range(0, len(text), size)]
    compressed = [literal_codes(window) for window in windows]
    start = corpus._WINDOWS_AT + 8 + 4 * (len(windows) + 1)
    offsets = [start + sum(map(len, compressed[:index])) for index in range(len(windows) + 1)]
    table = struct.pack(f">II{len(offsets)}I", size, len(windows), *offsets)
    return b"EC02Compressed Data File".ljust(corpus._WINDOWS_AT, b"\0") + table + b"".join(compressed)


@pytest.mark.skipif(shutil.which("gzip") is None, reason="needs the gzip program")
def test_bible_is_read_by_chapter(tmp_path):
    (tmp_path / "bible.data").write_bytes(bible(TEXT, 40))
    expected = {"Ge1": ["In the beginning.", "And the earth."], "1Sm3": ["Speak, LORD."], "Ge2": ["Thus."]}
    assert corpus.read_chapters(tmp_path / "bible.data") == expected
    assert corpus.read_bible(tmp_path / "bible.data") == list(expected.values())


@pytest.mark.skipif(shutil.which("gzip") is None, reason="needs the gzip program")
@pytest.mark.parametrize(
    ("text", "size", "message"),
    [("Title\nno verse\n", 40, "must be a verse"), ("", 40, "not the text file")],
)
def test_other_files_are_refused(tmp_path, text, size, message):
    (tmp_path / "bible.data").write_bytes(bible(text, size) if text else b"short")
    with pytest.raises(ValueError, match=message):
        corpus.read_bible(tmp_path / "bible.data")


def test_a_package_that_was_unpacked_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no /no/such/file, and its Debian package.* install no-such"):
        corpus.debian_file("no-such", "no/such/file", tmp_path / "work")
    path = tmp_path / "work" / "no-such" / "no" / "such" / "file"
    path.parent.mkdir(parents=True)
    path.touch()
    assert corpus.debian_file("no-such", "no/such/file", tmp_path / "work") == path


def test_blank_lines_separate_documents(tmp_path):
    path = tmp_path / "text"
    path.write_text("\n\n" + "one\n two \n\n \nthree\n\n" + "\n\n".join("abcdefghij"), encoding="utf-8")
    assert corpus.read_documents(path) == [["one", "two"], ["three"], *([letter] for letter in "abcdefghij")]


def test_too_few_documents_are_refused(tmp_path):
    (tmp_path / "text").write_text("one\n\ntwo\n")
    with pytest.raises(ValueError, match=r"more than 10 documents.*got 2"):
        corpus.read_documents(tmp_path / "text")


def test_held_out_documents_are_whole_and_fixed():
    documents = [[str(index), "second", "third"] for index in range(60)]
    training, held_out = corpus.split(documents)
    assert [document[0] for document in held_out] == ["10", "30", "50"]
    assert sorted(training + held_out) == sorted(documents)
    assert corpus.sample(held_out) == [["10", "second"], ["30", "second"], ["50", "second"]]
