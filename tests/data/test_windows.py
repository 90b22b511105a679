"""Words and answers: from a long example to rows, and back."""

import itertools

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import roberta_pln
from roberta_pln.checks import InputError
from roberta_pln.data.windows import question_answering, token_classification
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

ASSET = f"{roberta_pln.__path__[0]}/assets/kjv"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ASSET)


# ---------------------------------------------------------------------- a label for each word

SENTENCE = "In the beginning God created 漢字 , naïvely , Nebuchadnezzar's zyxwvutsrq <mask> 's earth ."
WORDS = SENTENCE.split()
TAGS = ["A", "B", "C"]


def tagged(*counts, seed=0):
    rng = np.random.default_rng(seed)
    return [{"words": list(rng.choice(WORDS, n)), "labels": list(rng.choice(TAGS, n))} for n in counts]


@pytest.mark.parametrize("length", [8, 12, 20, 128])
def test_every_word_is_labelled_once(tokenizer, length):
    records = tagged(1, 0, 40, 17, 3)
    found = token_classification(records, tokenizer, length, TAGS)
    assert found.left_out == 1
    assert max(len(row["input_ids"]) for row in found.rows) <= length
    labelled = [[] for _ in records]
    for owner, row in zip(found.owners, found.rows, strict=True):
        assert len(row["labels"]) == len(row["input_ids"])
        assert row["labels"][0] == row["labels"][-1] == IGNORE_INDEX
        assert max(row["labels"]) >= 0
        labelled[owner] += [TAGS[label] for label in row["labels"] if label != IGNORE_INDEX]
    assert labelled == [record["labels"] for record in records]
    longest = [max((len(tokenizer.encode(word)) for word in record["words"]), default=0) for record in records]
    if found.cut == 0:
        assert (
            "".join(tokenizer.decode(row["input_ids"], False) for row in found.rows)
            .replace(" ", "")
            .replace("</s><s>", "")
            == "<s>" + "".join(word for record in records for word in record["words"]) + "</s>"
        )
    assert found.cut == sum(size > length for size in longest)
    assert (found.cut > 0) == (length == 8)  # both cases are met


def test_labels_are_at_the_first_tokens(tokenizer):
    record = {"words": WORDS, "labels": ["A"] * len(WORDS)}
    (row,) = token_classification([record], tokenizer, 128, TAGS).rows
    assert row["input_ids"] == tokenizer.encode(SENTENCE)
    places = np.flatnonzero(np.array(row["labels"]) != IGNORE_INDEX)
    starts = [len(tokenizer.encode(" ".join(WORDS[:index]))) - 1 for index in range(len(WORDS))]
    assert places.tolist() == starts


@pytest.mark.parametrize("length", [8, 20, 128])
def test_predictions_come_back_to_the_words(tokenizer, length):
    records = tagged(5, 0, 40)
    found = token_classification(records, tokenizer, length)
    assert found.label_names == tuple(TAGS)
    wrong = len(TAGS) - 1
    predictions = [  # padded, and another class wherever no word is
        [wrong if label == IGNORE_INDEX else label for label in row["labels"]] + [wrong] * 3 for row in found.rows
    ]
    assert found.word_labels(predictions) == [record["labels"] for record in records]
    with pytest.raises(InputError, match=rf"those of all {len(found.rows)} rows, in order, got 1"):
        found.word_labels(predictions[:1])
    with pytest.raises(InputError, match=r"predictions of a row must be at least \(\d+,\), got \(2,\)"):
        found.word_labels([row[:2] for row in predictions])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["A"]}, "got 2 words and 1 labels in record 2"),
        ({"words": ["a", ""]}, "got an empty word in record 2"),
        ({"labels": ["A", "D"]}, r"known ones \(A, B, C\), got 'D'"),
    ],
)
def test_words_that_cannot_be_learnt_from(tokenizer, change, message):
    good = {"words": ["a", "b"], "labels": ["A", "B"]}
    with pytest.raises(InputError, match=message):
        token_classification([good, {**good, **change}], tokenizer, 16, TAGS)
    with pytest.raises(InputError, match="something to learn, got 1 that have nothing"):
        token_classification([{"words": [], "labels": []}], tokenizer, 16, TAGS)


# ---------------------------------------------------------------------- an answer in a text

CONTEXT = (
    "In the  beginning God\ncreated 漢字 and naïvely, 👩‍👩‍👧 the heaven and the earth. And the earth was without form "
)
QUESTION = "Who created what?"


def asked(text=None, start=0, context=CONTEXT, **more):
    answers = {"text": [], "answer_start": []} if text is None else {"text": [text], "answer_start": [start]}
    return {"question": QUESTION, "context": context, "answers": answers, **more}


def every_answer(most):
    for start, end in itertools.combinations(range(len(CONTEXT) + 1), 2):
        if CONTEXT[start:end].strip() and end - start <= most:
            yield asked(CONTEXT[start:end], start)


def test_one_window_is_a_pair(tokenizer):
    (row,) = question_answering([asked("God", CONTEXT.index("God"))], tokenizer, 128).rows
    assert row["input_ids"] == tokenizer.encode(QUESTION, CONTEXT)
    assert tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]) == " God"


@pytest.mark.parametrize(("length", "stride"), [(40, 6), (26, 1), (128, None)])
def test_windows_cover_the_context(tokenizer, length, stride):
    found = question_answering([asked(), asked(context=""), asked(context=" ")], tokenizer, length, stride)
    ids, spans = tokenizer.encode_with_spans(CONTEXT)
    stride = stride or length // 4
    at = 0
    windows = [pair for pair in zip(found.windows, found.rows, strict=True) if pair[0].example == 0]
    for window, row in windows:
        inside = row["input_ids"][window.first : -1]
        assert inside == ids[at : at + len(inside)]
        assert window.spans == spans[at : at + len(inside)]
        assert len(row["input_ids"]) == length or len(windows) == 1 or window is windows[-1][0]
        at += stride
    assert at - stride + len(inside) == len(ids)
    assert [window.example for window in found.windows[len(windows) :]] == [1, 2]
    assert all(row["start_positions"] == row["end_positions"] == 0 for row in found.rows)
    assert (found.cut, found.ids) == (0, (0, 1, 2))


def test_every_answer_is_in_a_window_with_its_place(tokenizer):
    records = list(every_answer(9))
    length, stride = 40, 5
    room = length - len(tokenizer.encode(QUESTION, "")) - stride
    found = question_answering(records, tokenizer, length, stride)
    whole = set()
    for window, row in zip(found.windows, found.rows, strict=True):
        first, last = row["start_positions"] - window.first, row["end_positions"] - window.first
        if row["start_positions"] == 0:
            assert row["end_positions"] == 0
            continue
        (text,), (start,) = records[window.example]["answers"].values()
        left, right = window.spans[first][0], window.spans[last][1]
        assert left <= start + len(text) - len(text.lstrip(" ")) and start + len(text.rstrip(" ")) <= right  # noqa: PT018
        # no smaller range of tokens will do
        assert window.spans[first][1] > start
        assert window.spans[last][0] < start + len(text)
        whole.add(window.example)
    tokens = [len(tokenizer.encode(record["answers"]["text"][0])) - 2 for record in records]
    assert {index for index, count in enumerate(tokens) if count + 2 <= room} <= whole
    assert found.cut == len(records) - len(whole)


def test_answers_that_fit_no_window_and_long_questions_are_counted(tokenizer):
    records = [asked(CONTEXT[:60]), asked("In"), asked(), {**asked("In"), "question": QUESTION * 9}]
    found = question_answering(records, tokenizer, 32, 4)
    assert found.cut == 2
    assert max(len(row["input_ids"]) for row in found.rows) == 32
    assert {row["start_positions"] for row, at in zip(found.rows, found.windows, strict=True) if at.example == 0} == {0}


def logits(found, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=len(row["input_ids"]) + 2) for row in found.rows] for _ in range(2)]


@pytest.mark.parametrize("longest", [1, 4, 200])
def test_the_best_answers_are_those_of_a_search(tokenizer, longest):
    found = question_answering([asked(), asked(context="Amen. Amen"), asked(context="")], tokenizer, 32, 5)
    starts, ends = logits(found)
    scores, nothing = [{} for _ in range(3)], [np.inf] * 3
    for window, start, end in zip(found.windows, starts, ends, strict=True):
        nothing[window.example] = min(nothing[window.example], start[0] + end[0])
        for (i, a), (j, b) in itertools.product(enumerate(window.spans), repeat=2):
            if i <= j < i + longest and a[0] < a[1] and b[0] < b[1]:
                score, seen = start[window.first + i] + end[window.first + j], scores[window.example]
                seen[a[0], b[1]] = max(seen.get((a[0], b[1]), -np.inf), score)
    plain = found.answers(starts, ends, 15, longest)
    empty = found.answers(starts, ends, 15, longest, no_answer=True)
    for example, (context, ours) in enumerate(zip((CONTEXT, "Amen. Amen", ""), plain, strict=True)):
        theirs = sorted(scores[example].items(), key=lambda item: -item[1])[:15]
        assert [(answer.start, answer.end) for answer in ours] == [span for span, _ in theirs]
        assert [answer.score for answer in ours] == [score for _, score in theirs]
        assert all(answer.text == context[answer.start : answer.end] for answer in ours)
        (none,) = (answer for answer in empty[example] if not answer.text)
        assert (none.score, none.start, none.end) == (nothing[example], 0, 0)
        assert [answer for answer in empty[example] if answer.text] == ours
        assert [answer.score for answer in empty[example]] == sorted((a.score for a in empty[example]), reverse=True)


def test_logits_of_the_labels_give_the_answer(tokenizer):
    records = [record for record in every_answer(12) if record["answers"]["answer_start"][0] % 7 == 0]
    found = question_answering(records, tokenizer, 64, 8)
    starts = [10.0 * np.eye(64)[row["start_positions"]] for row in found.rows]
    ends = [10.0 * np.eye(64)[row["end_positions"]] for row in found.rows]
    ranked = found.answers(starts, ends)
    assert found.cut == 0
    for window, row in zip(found.windows, found.rows, strict=True):
        if row["start_positions"]:
            first, last = (window.spans[row[f"{end}_positions"] - window.first] for end in ("start", "end"))
            best = ranked[window.example][0]
            assert (best.start, best.end, best.score) == (first[0], last[1], 20)
            assert records[window.example]["answers"]["text"][0].strip(" ") in best.text


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (
            asked("God", 3),
            {},
            r"stand in its context at answer_start.* got 'God' at 3, where 'the' stands, in record 2",
        ),
        (asked("God", -1), {}, "got 'God' at -1"),
        (asked("God", 999), {}, "got 'God' at 999, where '' stands"),
        (asked("  ", 6), {}, "got '  ' at 6"),
        (asked("God", "3"), {}, "answers must be"),
        (asked(), {"stride": 0}, "stride must be from 1 to 18, half of max_length, got 0"),
        (asked(), {"stride": 19}, "got 19"),
        (asked(), {"max_length": 7}, "max_length must be at least 8"),
    ],
)
def test_questions_that_cannot_be_learnt_from(tokenizer, record, options, message):
    with pytest.raises(InputError, match=message):
        question_answering([asked(), record], tokenizer, **{"max_length": 40, **options})


def test_logits_of_other_rows_are_refused(tokenizer):
    found = question_answering([asked(id="x")], tokenizer, 40, 5)
    assert found.ids == ("x",)
    starts, ends = logits(found)
    for arguments, message in (
        ((starts, ends[1:]), rf"end_logits must be those of all {len(starts)} rows, in order, got {len(starts) - 1}"),
        ((starts, [end[:5] for end in ends]), r"end_logits of a row must be at least \(\d+,\), got \(5,\)"),
        ((starts, ends, 0), "best and longest must be at least 1, got best=0 and longest=30"),
    ):
        with pytest.raises(InputError, match=message):
            found.answers(*arguments)
