"""The labelled data that ship: they fit their tasks, nothing leaks, their rules do what they say."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import roberta_pln
from roberta_pln.data import labelled, labelled_names, labelled_questions, labelled_wordnet, records

ASSETS = Path(roberta_pln.__file__).parent / "assets" / "tasks"
README = (ASSETS / "README.md").read_text(encoding="utf-8")


def both(name):
    return [records.read(ASSETS / name / f"{part}.jsonl", labelled.TASKS[name]) for part in ("train", "eval")]


def test_all_are_there_with_their_licences():
    assert {path.name for path in ASSETS.iterdir() if path.is_dir()} == set(labelled.TASKS)
    assert "Princeton University" in (ASSETS / "WORDNET-LICENCE.txt").read_text()
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 900_000


@pytest.mark.parametrize("name", labelled.TASKS)
def test_the_numbers_that_are_told(name):
    train, held_out = both(name)
    assert f"| `{name}` | `{labelled.TASKS[name]}`" in README
    assert f" | {len(train)} | {len(held_out)} |" in README.partition(f"| `{name}` |")[2].partition("\n")[0]


def texts(record):
    """What must not be in both parts."""
    joined = " ".join(record.get("words", ()))
    return ({record.get(key) for key in ("text", "text_pair", "prompt", "context")} | {joined}) - {None, ""}


@pytest.mark.parametrize("name", labelled.TASKS)
def test_no_text_is_in_both_parts(name):
    train, held_out = ({text for record in part for text in texts(record)} for part in both(name))
    assert not train & held_out


@pytest.mark.parametrize("name", ["books", "fields"])
def test_classes_are_as_large_as_each_other(name):
    for part in both(name):
        assert len(set(Counter(record["label"] for record in part).values())) == 1


def test_no_run_of_words_of_a_held_out_verse_is_in_a_training_verse():
    parts = [
        {tuple(run) for record in part for run in labelled._runs(record["text"]) if len(run) == labelled.RUN}
        for part in both("books")
    ]
    assert parts[0]
    assert not parts[0] & parts[1]


def test_answers_stand_in_their_verses():
    for part in both("questions"):
        for record in part:
            (text,), (start,) = record["answers"]["text"], record["answers"]["answer_start"]
            assert record["context"][start : start + len(text)] == text
            assert record["question"].endswith("?")
        assert len({(record["question"], record["context"]) for record in part}) == len(part)


def test_labels_of_names_are_whole():
    kinds = Counter()
    for part in both("names"):
        for record in part:
            before = "O"
            for label in record["labels"]:
                assert label[:2] != "I-" or before[2:] == label[2:]
                kinds[label[2:]] += label[:2] == "B-"
                before = label
    assert all(kinds[kind] > 20 for kind in kinds if kind)
    assert len(kinds) == 4  # three, and none


def test_similarities_are_those_of_steps():
    values = {record["label"] for part in both("similarity") for record in part}
    assert all(np.isclose(1 / value, round(1 / value), atol=0.05) for value in values)
    assert max(values) <= 1


# ---------------------------------------------------------------------- rules, on texts made for them


def bible(training, held_out):
    return labelled.Bible.of({**{f"Ex{i}": training for i in range(10)}, "Le1": held_out})


def test_held_out_verses_that_repeat_are_left_out():
    line = "And the LORD spake unto Moses in the wilderness of Sinai, in the tabernacle"
    found = bible([line], [line, "Blessed are the meek"])
    assert [verse.text for verse in found.held_out] == ["Blessed are the meek"]
    assert found.held_out[0] == labelled.Verse("Le1", 2, "Blessed are the meek")
    assert found.held_out[0].book == "Le"


def test_names_by_what_stands_around_them():
    verses = ["the son of Nun went unto Nun"] * 3 + ["they dwelt in Gaza", "he went into Gaza", "and in Gaza"]
    found = labelled_names.find_names([*verses, "the men of Gaza, and Nun"], {})
    assert found.kinds["Gaza"] == labelled_names.PLACE
    assert found.labels(["he", "was", "in", "Gaza"]) == ["O", "O", "O", f"B-{labelled_names.PLACE}"]
    assert found.labels(["he", "was", "in", "Zion"]) is None, "a capital that nothing explains"


def test_steps_in_wordnet():
    synsets = {
        "a": labelled_wordnet.Synset(3, ("thing",), (), False, "a thing"),
        "b": labelled_wordnet.Synset(5, ("dog",), ("a",), False, "a dog"),
        "c": labelled_wordnet.Synset(5, ("cat",), ("a",), False, "a cat"),
    }
    above = [labelled_wordnet.all_above(synsets, name) for name in "bca"]
    assert labelled_wordnet.steps_between(above[0], above[1]) == 2
    assert labelled_wordnet.steps_between(above[0], above[2]) == 1
    assert labelled_wordnet.steps_between(above[0], above[0]) == 0


def test_questions_ask_for_what_the_verse_says():
    verses = ["And Joseph dwelt in Egypt, he, and his house.", "And it came to pass after these things."]
    person, place = labelled_names.PERSON, labelled_names.PLACE
    names = labelled_names.Names({"Joseph": person, "Egypt": place}, set(), {"Joseph", "Egypt"})
    made = labelled_questions.questions(bible(verses, verses), names, 3, 0, shortest=10).train
    answers = {record["question"]: record["answers"]["text"] for record in made}
    assert answers["Where did Joseph dwell?"] == ["Egypt"]
    assert answers["Who dwelt in Egypt?"] == ["Joseph"]


def test_every_question_has_an_id_of_its_own():
    for part in both("questions"):
        assert len({record["id"] for record in part}) == len(part)
