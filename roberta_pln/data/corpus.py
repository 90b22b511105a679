"""Texts as documents of lines, and the part of them that training never sees."""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
from pathlib import Path
from typing import Final, TypeVar

Document = list[str]
"""Lines that follow one another, such as the verses of a chapter."""

T = TypeVar("T")

HELD_OUT_EVERY: Final = 20
HELD_OUT_FIRST: Final = 10
"""Documents 10, 30, 50, ... (counted from 0) are held out."""


def read_documents(path: str | os.PathLike[str]) -> list[Document]:
    """Read a UTF-8 text: one line per verse or sentence, blank lines between documents.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds too few documents to hold any out.
    """
    blocks = re.split(r"\n\s*\n", Path(path).read_text(encoding="utf-8"))
    documents = [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks]
    documents = [document for document in documents if document]
    if len(documents) <= HELD_OUT_FIRST:
        raise ValueError(
            f"{path} must hold more than {HELD_OUT_FIRST} documents so that some can be held out, got "
            f"{len(documents)}: put a blank line between documents (chapters, articles)"
        )
    return documents


def split(documents: list[T]) -> tuple[list[T], list[T]]:
    """Training documents and held-out documents; whole documents, by position alone."""
    held_out = range(HELD_OUT_FIRST, len(documents), HELD_OUT_EVERY)
    training = [document for index, document in enumerate(documents) if index not in held_out]
    return training, [documents[index] for index in held_out]


def sample(held_out: list[Document]) -> list[Document]:
    """The first two lines of every held-out document: little enough to ship with a model."""
    return [document[:2] for document in held_out]


def debian_file(package: str, name: str, folder: str | os.PathLike[str]) -> Path:
    """Find a file of a Debian package, or download the package and unpack it into FOLDER/PACKAGE; needs no root.

    Args:
        package: name of the package.
        name: path of the file (or directory) from the root of the file system on, without its first `/`.
        folder: where packages were, or are to be, unpacked; made if it is not there.

    Returns:
        The file as it is installed or, if the package is not installed, in FOLDER/PACKAGE.

    Raises:
        FileNotFoundError: when it is in neither, and `apt-get` and `dpkg` cannot fetch it.
    """
    folder = Path(folder)
    places = (Path("/") / name, folder / package / name)
    if not any(place.exists() for place in places):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            archive = max(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(archive), str(folder / package)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FileNotFoundError(
                f"no /{name}, and its Debian package cannot be fetched ({error}): install {package}"
            ) from error
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"the Debian package {package} must hold {name}, but does not: install another release")


# ---------------------------------------------------------------------- the King James Bible of Debian's bible-kjv-text

BIBLE_PACKAGE: Final = "bible-kjv-text"
BIBLE_FILE: Final = "usr/lib/bible.data"
BIBLE_SOURCE: Final = f"The King James Bible, from Debian's package {BIBLE_PACKAGE}"
BIBLE_LICENCE: Final = (
    "The King James translation (1611) is out of copyright. The file that carries it in the Debian package has this "
    'legend: "Bible Retrieval System. Chip Chapin, Hewlett Packard Company. Initial release, September 5, 1989. Last '
    "Updated: April 26, 1993. This file is provided for unrestricted use provided that this legend is included on all "
    "tape media and as a part of the software program in whole or part. Users may copy, modify or distribute this "
    'file at will. -- Chip Chapin, September 4, 1989". Weights and tokenizer are under the licence of this package.'
)

_COMPRESS_HEADER: Final = b"\x1f\x9d\x90"
"""compress(1): magic number, block mode, codes of up to 16 bits."""
_WINDOWS_AT: Final = 0x54
_VERSE: Final = re.compile(r"(\d?[A-Za-z]+\d+):\d+ (.+)")


def read_bible(path: str | os.PathLike[str]) -> list[Document]:
    """The chapters of `read_chapters`, in order, without their names."""
    return list(read_chapters(path).values())


def read_chapters(path: str | os.PathLike[str]) -> dict[str, Document]:
    """Read the chapters of `bible.data`, the text file of Debian's package bible-kjv-text.

    The file holds its text in windows, each compressed by itself by compress(1) without that program's header. At byte
    0x54 stand, as big-endian 32-bit numbers, the size of a window, their number n, and n + 1 offsets. The text has one
    verse per line, `Ge1:1 In the beginning ...`, after one title line.

    Returns:
        The verses of each chapter by its name, such as `Ge1`, in the order of the text.

    Raises:
        FileNotFoundError: when there is no such file, or no gzip program, which undoes compress(1).
        ValueError: when the file is not laid out so.
    """
    data = Path(path).read_bytes()
    try:
        size, count = struct.unpack_from(">II", data, _WINDOWS_AT)
        offsets = struct.unpack_from(f">{count + 1}I", data, _WINDOWS_AT + 8)
    except struct.error as error:
        raise ValueError(f"{path} is not the text file of bible-kjv-text: {error}") from error
    windows = [_expand(data[start:end]) for start, end in itertools.pairwise(offsets)]
    if any(len(window) != size for window in windows[:-1]):
        raise ValueError(f"{path} must expand to windows of {size} bytes, got other sizes: the file is damaged")
    return _chapters(b"".join(windows).decode("ascii"))


def _expand(window: bytes) -> bytes:
    return subprocess.run(["gzip", "-dc"], input=_COMPRESS_HEADER + window, capture_output=True, check=True).stdout


def _chapters(text: str) -> dict[str, Document]:
    chapters: dict[str, Document] = {}
    for line in text.splitlines()[1:]:
        verse = _VERSE.fullmatch(line.strip())
        if verse is None:
            raise ValueError(f"a line must be a verse such as 'Ge1:1 In the beginning', got {line!r}")
        chapters.setdefault(verse[1], []).append(verse[2].strip())
    return chapters
