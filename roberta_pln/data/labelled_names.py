"""Names of persons, places and peoples in the King James Bible, found by what stands around them and by WordNet.

A name is a word that is never written small. What kind of name it is, the whole text says: a kind is believed when
there is enough evidence for it, and next to none against. A verse with a capital that stays unexplained is left out, so
that a word labelled `O` is no name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any, Final, NamedTuple

from roberta_pln.data.labelled import Bible, Parts, Verse, of_length, ordered
from roberta_pln.data.labelled_wordnet import Synsets, all_above

PERSON: Final = "PERSON"
PLACE: Final = "PLACE"
PEOPLE: Final = "PEOPLE"
TRIBE: Final = "TRIBE"
"""No label: names of tribes are those of a person, of a people and of a land, so their verses are left out."""

_NAME: Final = r"(?P<name>[A-Z][a-z]+)\b(?!')"
_KIN: Final = "son|daughter|brother|sister|wife|father|mother|servant|concubine"
_DEEDS: Final = "said|answered|spake|took|rose|sent|commanded|bare|conceived|died|lived|slept|reigned"
_PLACES: Final = (
    "land|inhabitants?|wilderness|plains?|river|borders?|gate|field|valley|waters|coasts?|kings?|queen|mount"
)

CUES: Final[Mapping[str, tuple[str, ...]]] = {
    PERSON: (
        rf"\bbegat {_NAME}",
        rf"\b{_NAME} begat\b",
        rf"\b{_NAME},? (?:the|his|her) (?:[a-z]+ )?(?:{_KIN})\b",
        rf"\b(?:his|her|thy|my|our|your|their) (?:{_KIN}) {_NAME}",
        rf"\b(?:son|wife|brother|mother|sister) of {_NAME}",
        rf"\b{_NAME} (?:{_DEEDS})\b",
        rf"\b(?P<name>[A-Z][a-z]+)'s (?:{_KIN}|sons|daughters|servants|house|hand)\b",
        rf"\b{_NAME},? the (?:prophet|priest|scribe|captain|high|king)\b",
        rf"\b(?:king|prophet|priest) {_NAME}",
        rf"\b(?:his|her|whose) name (?:was )?{_NAME}",
    ),
    PLACE: (
        rf"\b(?:in|at|into|out of) {_NAME}",
        rf"\b(?:{_PLACES}) of {_NAME}",
        rf"\bmount {_NAME}",
    ),
    TRIBE: (rf"\b(?:tribes?|children) of {_NAME}",),
}
"""What says that a name is of a kind."""
ENOUGH: Final = 3
"""Least evidence for a kind: an occurrence of a cue is one, and WordNet counts `SAID_BY_WORDNET`."""
SAID_BY_WORDNET: Final = 2
CERTAIN: Final = 10
"""Evidence for a kind is this many times that for all others together."""

_ARTICLE: Final = re.compile(r"\b(?:the|an?|these|those) ([A-Z][a-z]+)\b")
MOSTLY: Final = 0.3
"""Names that follow an article in this share of their uses are of peoples: `the Philistines`, `an Egyptian`."""
UNSURE: Final = frozenset(
    {"Almighty", "Baptist", "Belial", "Godhead", "Messiah", "Messias", "Tirshatha", "Edom", "Midian", "Moab"}
)
"""Words that look like names of a kind, but are none, or are also of another kind; their verses are left out."""
NEVER_NAMES: Final = frozenset(
    {
        *("I", "O", "LORD", "Lord", "GOD", "God", "Father", "Son", "Spirit", "Holy", "Ghost", "One", "Saviour"),
        *("Highest", "Redeemer", "Maker", "Creator", "Amen", "Selah", "Hallelujah"),
    }
)
"""Words with a capital that are no names of persons, places or peoples; they do not keep a verse out."""
RARELY: Final = 0.05
"""Other words that are also written small are no names if at most this share of their capitals is inside a sentence."""


class Names(NamedTuple):
    """What is known of the words with a capital."""

    kinds: Mapping[str, str]
    """The names, each with `PERSON`, `PLACE` or `PEOPLE`."""
    plain: Set[str]
    """Words that are none."""
    proper: Set[str]
    """All words that are never written small, whether their kind is known or not."""

    def labels(self, words: Sequence[str]) -> list[str] | None:
        """A label in BIO for each word; None when a capital is unexplained.

        Names of the same kind that follow one another without punctuation are one, and `mount` is part of the name.
        """
        labels: list[str] = []
        for index, word in enumerate(words):
            core = bare(word)
            kind = self.kinds.get(core, "O")
            if kind == "O":
                if core[:1].isupper() and core not in self.plain:
                    return None
                labels.append("O")
                continue
            if kind == PLACE and index and words[index - 1] == "mount":
                labels[-1] = f"B-{kind}"
            goes_on = index > 0 and words[index - 1][-1].isalpha() and labels[-1].endswith(kind)
            if goes_on and "'" in word:  # `Simon Peter's brother`, or `Sarai Abram's wife`?
                return None
            labels.append(f"{'I' if goes_on else 'B'}-{kind}")
        return labels


def bare(word: str) -> str:
    """A word without punctuation around it, and without the `'s` of a genitive."""
    return re.sub(r"'s?$", "", word.strip(".,;:?!()"))


def instances(synsets: Synsets) -> dict[str, set[str]]:
    """For each name that WordNet has as an instance of something, the kinds that it may be of.

    A person is below `person`; a place is below `location`, `body_of_water`, `geological_formation` or `land`; a name
    with an empty set is of something else only.
    """
    found: dict[str, set[str]] = {}
    for name, synset in synsets.items():
        if synset.is_instance:
            lemmas = {synsets[above].lemmas[0] for above in all_above(synsets, name)}
            is_place = not lemmas.isdisjoint({"location", "body_of_water", "geological_formation", "land"})
            kinds = {PERSON} if "person" in lemmas else {PLACE} if is_place else set()
            for lemma in synset.lemmas:
                found.setdefault(lemma, set()).update(kinds)
    return found


def find_names(verses: Iterable[str], known: Mapping[str, Collection[str]]) -> Names:
    """Find the names in a text, and their kinds.

    Args:
        verses: the whole text.
        known: what `instances` says.
    """
    verses = list(verses)
    large, inside, small = _count_capitals(verses)
    after_article = Counter(name for verse in verses for name in _ARTICLE.findall(verse))
    evidence: dict[str, Counter[str]] = {name: Counter() for name in inside if name.lower() not in small}
    for kind, cues in CUES.items():
        for cue in cues:
            for match in re.finditer(cue, "\n".join(verses)):
                if match["name"] in evidence:
                    evidence[match["name"]][kind] += 1
    kinds: dict[str, str | None] = {}
    for name in evidence.keys() - UNSURE - NEVER_NAMES:
        is_people = after_article[name] >= MOSTLY * large[name]
        kinds[name] = PEOPLE if is_people else _kind(evidence[name], known.get(name))
    plain = {word for word in large if word.lower() in small and inside[word] <= RARELY * large[word]}
    sure = {name: kind for name, kind in kinds.items() if kind in (PERSON, PLACE, PEOPLE)}
    return Names(sure, plain | NEVER_NAMES, evidence.keys() - NEVER_NAMES)


def _count_capitals(verses: Iterable[str]) -> tuple[Counter[str], Counter[str], set[str]]:
    """Words with a capital; the same, but only behind a word without punctuation; words without a capital."""
    large: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    small = set()
    for verse in verses:
        before = "."
        for word in verse.split():
            core = bare(word)
            if core[:1].isupper():
                large[core] += 1
                inside[core] += before[-1].isalpha()
            else:
                small.add(core)
            before = word
    return large, inside, small


def _kind(evidence: Counter[str], known: Collection[str] | None) -> str | None:
    """The kind of a name, if it is certain; what WordNet knows must agree."""
    if not evidence:
        return None
    total = evidence + Counter(dict.fromkeys(known or (), SAID_BY_WORDNET))
    kind, most = total.most_common(1)[0]
    certain = most >= ENOUGH and most >= CERTAIN * (total.total() - most)
    return kind if certain and evidence[kind] and (known is None or kind in known) else None


def names(bible: Bible, found: Names, train: int, evaluation: int, shortest: int = 40, longest: int = 150) -> Parts:
    """The words of a verse, with their punctuation, and a label in BIO for each.

    One verse of ten has no name, and another one of ten, as far as there are any, a name of several words. Of a part
    with fewer verses, all.
    """

    def part(verses: Iterable[Verse], count: int) -> list[dict[str, Any]]:
        groups: dict[str, list[dict[str, Any]]] = {"O": [], "B": [], "I": []}
        for verse in of_length(verses, shortest, longest):
            words = verse.text.split()
            labels = found.labels(words)
            if labels is not None:
                last = next(letter for letter in "IBO" if any(label[0] == letter for label in labels))
                groups[last].append({"words": words, "labels": labels})
        few = groups["O"][: count // 10] + groups["I"][: count // 10]
        return ordered(few + groups["B"][: count - len(few)], lambda record: " ".join(record["words"]))

    return Parts(part(bible.training, train), part(bible.held_out, evaluation))
