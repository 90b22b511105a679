"""Labelled data from the nouns of WordNet: fields and kinds of definitions, and how near two of them are.

A definition is for training or for evaluation in all data alike, by its own digest, and no two synsets here have the
same one; so nothing of a definition that is measured was seen.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from roberta_pln.data.labelled import Parts, balanced, digest, ordered

PACKAGE: Final = "wordnet-base"
FOLDER: Final = "usr/share/wordnet"
SYNSETS_FILE: Final = "data.noun"
SENSES_FILE: Final = "index.noun"

FIELDS: Final[Mapping[str, int]] = {
    "animal": 5,
    "artifact": 6,
    "body": 8,
    "food": 13,
    "person": 18,
    "plant": 20,
    "time": 28,
}
"""Lexicographer files of WordNet, `noun.animal` and so on, with their numbers. See lexnames(5WN)."""
KINDS: Final = (
    *("person", "body_part", "mammal", "bird", "fish", "tree", "beverage", "garment", "furniture", "building"),
    *("room", "vehicle", "language", "feeling"),
)
"""Words whose first sense is above many nouns; none of them is above another one."""
RELATED_FIELDS: Final = ("animal", "food", "person", "plant")
"""Where `similarity` looks for pairs."""
STEPS: Final = (3, 6, 11, 99)
"""Most steps between the two synsets of a pair, for each quarter of the pairs."""
MOST_USES: Final = 4
"""Most pairs that a synset is in."""
EVALUATED: Final = "3"
"""Definitions whose digests start with a digit up to this one, a quarter, are for evaluation."""


class Synset(NamedTuple):
    """A sense that some nouns share."""

    file: int
    """Number of its lexicographer file."""
    lemmas: tuple[str, ...]
    above: tuple[str, ...]
    """Ids of what it is a kind, or an instance, of."""
    is_instance: bool
    """Whether it is one thing, such as Jerusalem, instead of a kind of things."""
    definition: str


Synsets = Mapping[str, Synset]
"""By id, which is the offset in the file."""


def read_synsets(text: str) -> dict[str, Synset]:
    """Read WordNet's `data.noun`, see wndb(5WN). Lines of its licence start with a space.

    Raises:
        ValueError: when a line is no synset.
    """
    synsets = {}
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        try:
            fields, gloss = line.split(" | ", 1)
            name, file, _, count, *rest = fields.split()
            lemmas, rest = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) + 1 :]
            pointers = list(zip(rest[::4], rest[1::4], strict=True))
        except ValueError as error:
            raise ValueError(f"a line must be a synset as in WordNet's {SYNSETS_FILE}, got {line[:60]!r}") from error
        above = tuple(target for symbol, target in pointers if symbol in ("@", "@i"))
        is_instance = any(symbol == "@i" for symbol, _ in pointers)
        synsets[name] = Synset(int(file), tuple(lemmas), above, is_instance, gloss.split('; "')[0].strip())
    return synsets


def licence(text: str) -> str:
    """The licence at the beginning of WordNet's `data.noun`, without the numbers of its lines."""
    lines = (re.match(r" +\d+ (.*)", line) for line in text.splitlines()[:100])
    return "".join(f"{line[1].rstrip()}\n" for line in lines if line)


def read_first_senses(text: str) -> dict[str, str]:
    """Read WordNet's `index.noun`: for each lemma the id of its most frequent sense."""
    rows = (line.split() for line in text.splitlines() if not line.startswith(" "))
    return {row[0]: row[-int(row[2])] for row in rows}


def all_above(synsets: Synsets, name: str) -> dict[str, int]:
    """A synset and all that it is a kind or an instance of, each with the fewest steps up to it."""
    steps = {name: 0}
    reached = [name]
    for below in reached:
        for target in synsets[below].above:
            if target not in steps:
                steps[target] = steps[below] + 1
                reached.append(target)
    return steps


def steps_between(one: Mapping[str, int], other: Mapping[str, int]) -> int:
    """Fewest steps between two synsets, up and down again, from what is above each; all nouns meet at `entity`."""
    return min(one[name] + other[name] for name in one.keys() & other.keys())


# ---------------------------------------------------------------------- what is learned


class Definitions(NamedTuple):
    """Definitions that a small model of an old text can read: short, in words that mostly are in that text.

    Synsets without instances, each with a definition that no other one has, in the order of `ordered`.
    """

    synsets: Synsets
    train: list[str]
    eval: list[str]

    @classmethod
    def of(
        cls,
        synsets: Synsets,
        vocabulary: Collection[str],
        shortest: int = 15,
        longest: int = 60,
        known: float = 0.7,
    ) -> Definitions:
        """Choose from all synsets.

        Args:
            synsets: of all nouns.
            vocabulary: words in small letters.
            shortest, longest: characters of a definition.
            known: least share of its words that are in the vocabulary.
        """
        uses = Counter(synset.definition for synset in synsets.values())

        def fits(synset: Synset) -> bool:
            text = synset.definition
            words = re.findall("[a-z]+", text.lower())
            return (
                not synset.is_instance
                and uses[text] == 1
                and shortest <= len(text) <= longest
                and text[0].isalpha()
                and sum(word in vocabulary for word in words) >= known * len(words)
            )

        names = [name for name in synsets if fits(synsets[name])]
        names = ordered(names, lambda name: synsets[name].definition)
        held_out = [name for name in names if digest(synsets[name].definition)[0] <= EVALUATED]
        return cls(synsets, [name for name in names if name not in set(held_out)], held_out)


def fields(definitions: Definitions, train: int, evaluation: int) -> Parts:
    """A definition, and which of `FIELDS` it is from; as many of each."""
    synsets = definitions.synsets

    def part(names: Sequence[str], count: int) -> list[dict[str, Any]]:
        groups = {
            field: [
                {"text": synsets[name].definition, "label": field} for name in names if synsets[name].file == number
            ]
            for field, number in FIELDS.items()
        }
        return balanced(groups, count)

    return Parts(part(definitions.train, train), part(definitions.eval, evaluation))


def kinds(definitions: Definitions, first_senses: Mapping[str, str], train: int, evaluation: int) -> Parts:
    """A definition, and four of `KINDS`, of which one is above its synset; as many of each."""
    synsets = definitions.synsets

    def part(names: Sequence[str], count: int) -> list[dict[str, Any]]:
        groups: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for name in names:
            above = all_above(synsets, name)
            fitting = [kind for kind in KINDS if first_senses[kind] in above and first_senses[kind] != name]
            if len(fitting) == 1:
                groups[fitting[0]].append(_choice(synsets[name].definition, fitting[0]))
        return balanced(groups, count)

    return Parts(part(definitions.train, train), part(definitions.eval, evaluation))


def _choice(definition: str, kind: str) -> dict[str, Any]:
    """A question of multiple choice."""
    others = ordered((other for other in KINDS if other != kind), lambda other: f"{definition}: {other}")
    choices = ordered([kind, *others[:3]], lambda choice: f"{definition}; {choice}")
    return {
        "prompt": definition,
        "choices": [choice.replace("_", " ") for choice in choices],
        "label": choices.index(kind),
    }


def similarity(definitions: Definitions, train: int, evaluation: int, pool: int = 1200) -> Parts:
    """Two definitions, and the path similarity of their synsets: 1 / (1 + steps between them), four digits.

    Pairs are drawn from the first `pool` synsets of `RELATED_FIELDS` of a part, as many for each of `STEPS`; no synset
    is in more than `MOST_USES`.

    Raises:
        ValueError: when there are too few pairs.
    """
    synsets = definitions.synsets
    numbers = {FIELDS[field] for field in RELATED_FIELDS}

    def part(names: Sequence[str], count: int) -> list[dict[str, Any]]:
        chosen = [name for name in names if synsets[name].file in numbers][:pool]
        groups: dict[str, list[dict[str, Any]]] = {str(steps): [] for steps in STEPS}
        uses: Counter[str] = Counter()
        for one, other, steps in _pairs(synsets, chosen):
            group = groups[str(next(most for most in STEPS if steps <= most))]
            if len(group) < -(-count // len(groups)) and max(uses[one], uses[other]) < MOST_USES:
                uses.update((one, other))
                texts = {"text": synsets[one].definition, "text_pair": synsets[other].definition}
                group.append({**texts, "label": round(1 / (1 + steps), 4)})
        return balanced(groups, count)

    return Parts(part(definitions.train, train), part(definitions.eval, evaluation))


def _pairs(synsets: Synsets, names: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """All pairs, and the steps between them: those of the first of `STEPS` first, because they are few, and so on."""
    above = {name: all_above(synsets, name) for name in names}
    groups: dict[int, list[tuple[str, str, int]]] = {most: [] for most in STEPS}
    for one, other in itertools.combinations(names, 2):
        steps = steps_between(above[one], above[other])
        groups[next(most for most in STEPS if steps <= most)].append((one, other, steps))
    for group in groups.values():
        yield from ordered(group, lambda pair: f"{pair[0]} {pair[1]}")
