"""Small labelled data from free texts, for every task; `scripts/make-tasks` writes them into `assets/tasks`.

Here are the parts of the King James Bible, and what is drawn from it by chapter. `labelled_names.py` labels names,
`labelled_questions.py` asks about verses, and `labelled_wordnet.py` has all that is drawn from WordNet.

Nothing here is random: examples are put in the order of digests of their own texts, see `ordered`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from roberta_pln.data import corpus

TASKS: Final[Mapping[str, str]] = {
    "books": "classification",
    "names": "token-classification",
    "questions": "question-answering",
    "definitions": "multiple-choice",
    "fields": "classification",
    "similarity": "regression",
    "verses": "masked-lm",
}
"""For each of the data, the task whose columns it has. `verses` has those of `causal-lm` too."""

T = TypeVar("T")


class Parts(NamedTuple):
    """Records to learn from, and others to measure with."""

    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]


def digest(text: str) -> str:
    """A number that looks random, but belongs to the text: 64 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def ordered(items: Iterable[T], key: Callable[[T], str] = str) -> list[T]:
    """The items in an order that looks random, but is the same everywhere, and stays when other items come or go."""
    return sorted(items, key=lambda item: (digest(key(item)), key(item)))


# ---------------------------------------------------------------------- the King James Bible

RUN: Final = 10
"""As many words that follow one another are the same in both parts only if the text repeats itself."""
GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "law": ("Exo", "Lev", "Num", "Deu"),
    "history": ("Josh", "Jdgs", "Ruth", "1Sm", "2Sm", "1Ki", "2Ki", "1Chr", "2Chr", "Ezra", "Neh", "Est"),
    "wisdom": ("Job", "Psa", "Prv", "Eccl"),
    "prophets": ("Isa", "Jer", "Eze", "Hos", "Joel", "Amos", "Mic", "Nahum", "Hab", "Zep", "Hag", "Zec", "Mal"),
    "gospels": ("Mat", "Mark", "Luke", "John"),
    "letters": (
        *("Rom", "1Cor", "2Cor", "Gal", "Eph", "Phi", "Col", "1Th", "2Th", "1Tim", "2Tim", "Titus", "Phmn", "Heb"),
        *("Jas", "1Pet", "2Pet", "1Jn", "2Jn", "3Jn", "Jude"),
    ),
}
"""Books of the Bible that speak alike. Genesis, Daniel, Jonah and others stand between them and are in none."""


class Verse(NamedTuple):
    """A line of the Bible and where it stands: `chapter` is a name such as `Ge1`, `number` counts from 1."""

    chapter: str
    number: int
    text: str

    @property
    def book(self) -> str:
        """Such as `Ge` of `Ge1`."""
        return self.chapter.rstrip("0123456789")


class Bible(NamedTuple):
    """The verses that the shipped models were trained on, and those of the chapters that were held out."""

    training: list[Verse]
    held_out: list[Verse]

    @classmethod
    def of(cls, chapters: Mapping[str, corpus.Document]) -> Bible:
        """Split what `corpus.read_chapters` read as for training; held-out verses that `repeat` it are left out."""
        training, held_out = (
            [Verse(name, number, text) for name, lines in part for number, text in enumerate(lines, 1)]
            for part in corpus.split(list(chapters.items()))
        )
        repeated = repeat(held_out, training)
        return cls(training, [verse for verse in held_out if verse not in repeated])


def repeat(verses: Iterable[Verse], others: Iterable[Verse]) -> set[Verse]:
    """The verses of which `RUN` words that follow one another, or all words if there are fewer, are in another one."""
    places: dict[tuple[str, ...], list[Verse]] = {}
    for verse in verses:
        for run in _runs(verse.text):
            places.setdefault(run, []).append(verse)
    return {verse for other in others for run in _runs(other.text) for verse in places.get(run, ())}


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", text.lower())
    for start in range(max(1, len(words) - RUN + 1)):
        yield tuple(words[start : start + RUN])


def of_length(verses: Iterable[Verse], shortest: int, longest: int) -> list[Verse]:
    """The verses of so many characters, each text once, in the order of `ordered`."""
    texts = {verse.text: verse for verse in verses if shortest <= len(verse.text) <= longest}
    return ordered(texts.values(), lambda verse: verse.text)


def books(bible: Bible, train: int, evaluation: int, shortest: int = 50, longest: int = 120) -> Parts:
    """A verse, and which of `GROUPS` its book is in; as many of each."""

    def part(verses: Iterable[Verse], count: int) -> list[dict[str, Any]]:
        chosen = of_length(verses, shortest, longest)
        groups = {
            group: [{"text": verse.text, "label": group} for verse in chosen if verse.book in names]
            for group, names in GROUPS.items()
        }
        return balanced(groups, count)

    return Parts(part(bible.training, train), part(bible.held_out, evaluation))


def verses(bible: Bible, train: int, evaluation: int, shortest: int = 40, longest: int = 140) -> Parts:
    """Verses as they are."""
    parts = (
        [{"text": verse.text} for verse in of_length(of, shortest, longest)[:count]]
        for of, count in ((bible.training, train), (bible.held_out, evaluation))
    )
    return Parts(*parts)


def balanced(groups: Mapping[str, list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The first records of each group, `count` in all, the groups taking turns.

    Raises:
        ValueError: when a group has too few.
    """
    each = -(-count // len(groups))
    for name, records in groups.items():
        if len(records) < each:
            raise ValueError(f"{name} must have {each} records, got {len(records)}: ask for fewer")
    turns = zip(*(records[:each] for records in groups.values()), strict=True)
    return list(itertools.chain.from_iterable(turns))[:count]
