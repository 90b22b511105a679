"""Questions about verses of the King James Bible, made by rules, with answers that stand in the verses.

A rule is a pattern of a sentence. Its groups are put into a question, and one of them is the answer. The question is
asked of some verses that follow one another, if the words it is about stand only once in them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from roberta_pln.data.labelled import Bible, Parts, Verse, digest, ordered
from roberta_pln.data.labelled_names import PERSON, Names

MOVES: Final[Mapping[str, str]] = {
    **{"went": "go", "came": "come", "departed": "depart", "fled": "flee", "returned": "return", "removed": "remove"},
    **{"journeyed": "journey", "passed": "pass", "escaped": "escape", "ran": "run", "turned": "turn"},
}
STAYS: Final[Mapping[str, str]] = {
    **{"dwelt": "dwell", "abode": "abide", "pitched": "pitch", "encamped": "encamp", "died": "die", "lay": "lie"},
    **{"reigned": "reign", "stood": "stand", "sat": "sit", "tarried": "tarry"},
}
MAKES: Final[Mapping[str, str]] = {
    **{"built": "build", "builded": "build", "made": "make", "found": "find", "set": "set", "laid": "lay"},
    **{"put": "put", "offered": "offer", "cast": "cast", "brake": "break", "burned": "burn", "bought": "buy"},
    **{"kept": "keep", "left": "leave", "wrote": "write", "gathered": "gather", "measured": "measure"},
}
DOES: Final[Mapping[str, str]] = {
    **{"took": "take", "brought": "bring", "sent": "send", "gave": "give", "smote": "smite", "slew": "slay"},
    **{"saw": "see", "heard": "hear", "called": "call", "blessed": "bless", "loved": "love", "told": "tell"},
    **{"commanded": "command", "hated": "hate", "drew": "draw", "feared": "fear", "pursued": "pursue"},
}
"""What somebody did, and its infinitive: going, being somewhere, doing something to a thing, or to somebody."""
INFINITIVES: Final = {**MOVES, **STAYS, **MAKES, **DOES, "begat": "beget"}


def _past(*verbs: Mapping[str, str]) -> str:
    return f"(?P<past>{'|'.join(verb for table in verbs for verb in table)})"


_JOIN: Final = "And|Then|So|But|Now|For|Therefore|and|then|so|but|now|for|therefore"
_START: Final = rf"(?:(?:^|(?<=[.:;?!] ))(?:(?:{_JOIN}) )?|(?<![A-Za-z])[a-z]+, (?:and|for|but) )(?:[Ww]hen )?"
_NAME: Final = r"(?:[A-Z][a-z]+|LORD|GOD)"
_ONE: Final = rf"(?:the [a-z]+ of (?:the )?{_NAME}|the {_NAME}|{_NAME}|the [a-z]+)"
_ALONE: Final = rf"(?<!of )(?P<who>{_NAME})"
_WHO: Final = rf"(?P<who>{_ONE}(?: and {_ONE})?)"
_PLACE: Final = r"(?P<place>(?:the [a-z]+ of )?(?:the |mount )?[A-Z][a-z]+)"
_DIGIT: Final = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|threescore|fourscore|hundred|thousand"
)
_NUMBER: Final = rf"(?P<number>(?:an? )?(?:{_DIGIT})(?:(?: and)? (?:{_DIGIT}))*)"
_MORE: Final = r"(?:(?:up|down|out|over|again|away|forth|thence|there|also|all) )*"
_END: Final = r"(?=[.,;:?!])"


class Rule(NamedTuple):
    """How a sentence becomes a question.

    `{did}` in a question stands for the infinitive of the group `past`.
    """

    pattern: re.Pattern[str]
    answer: str
    """Name of the group that is the answer."""
    question: str
    once: str
    """Words that may stand only once in what the question is asked of."""


def _rule(pattern: str, answer: str, question: str, once: str) -> Rule:
    return Rule(re.compile(pattern), answer, question, once)


RULES: Final[Mapping[str, Rule]] = {
    "who": _rule(
        rf"{_START}{_WHO} (?P<past>{'|'.join(INFINITIVES)}|said|spake|answered) (?P<what>[A-Za-z' ]{{8,50}}?){_END}",
        "who",
        "Who {past} {what}?",
        "{past} {what}",
    ),
    "who-said": _rule(
        rf"{_START}(?P<past>said|answered|spake|came|went|stood) {_WHO} (?P<what>(?:to|unto|into|with) [A-Za-z ]+?)"
        rf"{_END}",
        "who",
        "Who {past} {what}?",
        "{past} {who}",
    ),
    "to-whom": _rule(
        rf"{_START}{_WHO} (?P<past>said|spake) (?:un)?to (?P<whom>{_ONE})(?=[ ,])",
        "whom",
        "To whom did {who} speak?",
        "{who} {past}",
    ),
    "whom": _rule(
        rf"{_START}{_WHO} {_past(DOES)} (?P<whom>{_NAME})(?=[ .,;:])", "whom", "Whom did {who} {did}?", "{who} {past}"
    ),
    "what": _rule(
        rf"{_START}{_WHO} {_past(MAKES)} (?:up |down )?(?P<what>(?:an?|the|his|her|their) [a-z ]{{3,30}}?)"
        rf"(?: (?:and|in|for|unto|to|upon|with|from|before|that|which|by|on|at|into|according)\b|{_END})",
        "what",
        "What did {who} {did}?",
        "{who} {past}",
    ),
    "where": _rule(
        rf"{_START}{_WHO} {_past(STAYS)} {_MORE}(?:in|at|by|over) {_PLACE}\b",
        "place",
        "Where did {who} {did}?",
        "{who} {past}",
    ),
    "whither": _rule(
        rf"{_START}{_WHO} {_past(MOVES)} {_MORE}(?:to|unto|into|toward) {_PLACE}\b",
        "place",
        "Whither did {who} {did}?",
        "{who} {past}",
    ),
    "whence": _rule(
        rf"{_START}{_WHO} {_past(MOVES)} {_MORE}(?:from|out of) {_PLACE}\b",
        "place",
        "Whence did {who} {did}?",
        "{who} {past}",
    ),
    "father": _rule(rf"{_ALONE} begat (?P<child>{_NAME})", "who", "Who begat {child}?", "begat {child}"),
    "child": _rule(rf"{_ALONE} begat (?P<child>{_NAME})", "child", "Whom did {who} beget?", "{who} begat"),
    "son": _rule(
        rf"(?P<child>{_NAME}),? the (?P<kin>son|daughter) of (?P<who>{_NAME})",
        "who",
        "Whose {kin} was {child}?",
        "{child} the {kin} of",
    ),
    "king": _rule(
        rf"{_ALONE} (?:the )?king of (?P<land>{_NAME})", "who", "Who was the king of {land}?", "king of {land}"
    ),
    "name": _rule(
        r"name of (?P<what>(?:the|his|her|that|this)(?: (?!was\b|is\b|of\b)[a-z]+){1,2}(?: of (?:the|his) [a-z]+)?)"
        r"(?: was called| was| is)? (?P<name>[A-Z][a-z]+)",
        "name",
        "What was the name of {what}?",
        "name of {what}",
    ),
    "how-long": _rule(
        rf"{_ALONE} (?P<past>reigned) [A-Za-z ]{{0,30}}?{_NUMBER} years",
        "number",
        "How many years did {who} {did}?",
        "{who} {past}",
    ),
    "before": _rule(
        rf"{_ALONE} lived {_NUMBER} years, and begat (?P<child>{_NAME})",
        "number",
        "How many years old was {who} when he begat {child}?",
        "{who} lived {number}",
    ),
    "after": _rule(
        rf"{_ALONE} lived after he begat (?P<child>{_NAME}) {_NUMBER} years",
        "number",
        "How many years did {who} live after he begat {child}?",
        "after he begat {child}",
    ),
    "how-old": _rule(
        rf"{_ALONE} was {_NUMBER} years old(?! and)", "number", "How many years old was {who}?", "{who} was"
    ),
    "how-many": _rule(
        rf"\b{_NUMBER} (?P<things>(?!years|months|days|cubits|times|was|is|his|as)[a-z]+s)\b",
        "number",
        "How many {things} were there?",
        " {things}",
    ),
}


GOD: Final = frozenset({"LORD", "GOD", "God"})
MOST: Final = 3
"""Most questions about a verse."""


def questions(
    bible: Bible,
    names: Names,
    train: int,
    evaluation: int,
    shortest: int = 100,
    longest: tuple[int, int] = (240, 300),
) -> Parts:
    """Verses that follow one another, a question about one of them, and its answer, as SQuAD has them.

    Args:
        bible: the text.
        names: the names in it. No other word with a capital, but of God, is in an answer or what is asked about.
        train, evaluation: how many; fewer where there are not as many.
        shortest, longest: characters of the verses together, at most so many in training, and in evaluation.
    """
    train_length, evaluation_length = ((shortest, most) for most in longest)
    return Parts(
        _part(bible.training, names, train, train_length), _part(bible.held_out, names, evaluation, evaluation_length)
    )


def _part(verses: Sequence[Verse], names: Names, count: int, length: tuple[int, int]) -> list[dict[str, Any]]:
    """Questions, as many of each rule; of rules that find more, as many as are missing of the others."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in RULES}
    for index in ordered(range(len(verses)), lambda index: verses[index].text):
        asked = ordered(_ask(verses, index, names, length), lambda record: record["id"])
        for record in asked[:MOST]:
            found[record["id"].split()[1]].setdefault(record["question"] + record["context"], record)
    groups = [list(records.values()) for records in found.values()]
    most = next((most for most in range(count) if sum(min(most, len(group)) for group in groups) >= count), count)
    chosen = [record for group in groups for record in group[:most]]
    return _told_apart(ordered(chosen, lambda record: record["id"])[:count])


def _told_apart(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With an id of its own for each: the second question of a rule about a verse gets a 2, and so on."""
    seen: Counter[str] = Counter()
    found = []
    for question in questions:
        number = seen[question["id"]] = seen[question["id"]] + 1
        found.append(question if number == 1 else {**question, "id": f"{question['id']} {number}"})
    return found


def _ask(verses: Sequence[Verse], index: int, names: Names, length: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """All questions about a verse."""
    verse, around = verses[index], _around(verses, index, length)
    context = " ".join(verse.text for verse in around)
    before = sum(len(verse.text) + 1 for verse in around[: around.index(verse)]) if around else 0
    for name, rule in RULES.items() if around else ():
        for match in rule.pattern.finditer(verse.text):
            groups = match.groupdict()
            groups["did"] = INFINITIVES.get(groups.get("past", ""), "")
            if _is_sound(groups, names) and context.count(rule.once.format(**groups)) == 1:
                yield {
                    "id": f"{verse.chapter}:{verse.number} {name}",
                    "question": rule.question.format(**groups),
                    "context": context,
                    "answers": {"text": [match[rule.answer]], "answer_start": [before + match.start(rule.answer)]},
                }


def _is_sound(groups: Mapping[str, str], names: Names) -> bool:
    """Whether all words with a capital are names, and a place is no person."""
    words = [word for group, value in groups.items() if group != "what" for word in re.findall(r"[A-Z]\w*", value)]
    place = groups.get("place", "").split()
    return names.proper | GOD >= set(words) and PERSON not in map(names.kinds.get, place)


def _around(verses: Sequence[Verse], index: int, length: tuple[int, int]) -> list[Verse]:
    """Some verses of the same chapter, two or more, among them this one; which of those that fit, a digest says.

    None if this is not possible.
    """
    shortest, longest = length
    fitting = []
    for first in range(max(0, index - 5), index + 1):
        for end in range(max(index + 1, first + 2), index + 6):
            some = list(verses[first:end])
            size = sum(len(verse.text) + 1 for verse in some) - 1
            if shortest <= size <= longest and _follow(some):
                fitting.append(some)
    largest = [some for some in fitting if not any(set(some) < set(other) for other in fitting)]
    return min(largest, key=lambda some: digest(some[0].text + some[-1].text), default=[])


def _follow(verses: Sequence[Verse]) -> bool:
    """Whether they stand one after the other in a chapter; between verses of the held-out part some are left out."""
    first = verses[0]
    return all(verse[:2] == (first.chapter, first.number + index) for index, verse in enumerate(verses))
