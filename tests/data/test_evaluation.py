"""Scores and baselines, against numbers counted by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from roberta_pln.data import evaluation
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

X, MASK = IGNORE_INDEX, 9
IDS = np.array([[0, 9, 9, 5, 9, 2]])
LABELS = np.array([[X, 4, 5, X, 7, X]])
MASKED = [(IDS, np.ones_like(IDS), LABELS)]


def test_scores_are_share_and_exp_of_mean_loss():
    probabilities = np.full((1, 6, 10), 0.05)
    probabilities[0, 1, 4] = 0.55  # right
    probabilities[0, 2, 6] = 0.55  # wrong: the answer has 0.05
    probabilities[0, 4, 7] = 0.55  # right
    logits = np.log(probabilities).astype(np.float32) + 100  # a constant changes nothing
    scores = evaluation.evaluate(lambda ids, mask: logits, MASKED)
    assert scores.accuracy == 2 / 3
    assert scores.tokens == 3
    # float32 logits near 100 are off by up to 4e-6 each
    assert scores.perplexity == pytest.approx(math.exp(-(2 * math.log(0.55) + math.log(0.05)) / 3), rel=2e-5)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="got none"):
        evaluation.evaluate(lambda ids, mask: ids, [])


def test_baselines_guess_what_was_counted():
    rows = [[0, 4, 5, 4, 5, 6, 2], [0, 4, 7, 2], [0, 5, 7, 2], [0, 4, 2], [0, 6, 7, 2]]
    counts = evaluation.Counts.of(rows, 10)
    assert counts.commonest == 4
    assert counts.after.tolist() == [4, -1, -1, -1, 5, 4, 7, -1, -1, -1]  # 7 only ever ends a row
    assert counts.before.tolist() == [-1, -1, 7, -1, 5, 4, 5, 4, -1, -1]  # nothing but <s> stands before a first word
    assert counts.unigram_accuracy(MASKED) == 1 / 3
    # 4 follows <s>: right. 4 precedes 5: wrong. 4 follows 5: wrong.
    assert counts.bigram_accuracy(MASKED, MASK) == 1 / 3
    # 7 follows 6, and is guessed although 5 precedes it.
    ids, labels = np.array([[0, 6, 9, 2]]), np.array([[X, X, 7, X]])
    assert counts.bigram_accuracy([(ids, np.ones_like(ids), labels)], MASK) == 1
    # Between two masks the most frequent token is guessed; before </s> stands 7.
    ids, labels = np.array([[0, 9, 9, 9, 2]]), np.array([[X, 5, 4, 7, X]])
    assert counts.bigram_accuracy([(ids, np.ones_like(ids), labels)], MASK) == 2 / 3


def test_next_token_baselines_are_probabilities_counted_by_hand():
    baselines = evaluation.next_token_baselines([[0, 3, 4, 2], [0, 3, 3, 2]], 6)
    # The pairs: 0 3 twice, and 3 4, 4 2, 3 3, 3 2 once. Different ones end in 2 (two), 3 (two), 4 (one).
    bigram = np.exp(baselines["bigram"](np.arange(6)[None], None)[0])
    lower = np.array([1, 1, 3, 3, 2, 1]) / 11
    d = evaluation.DISCOUNT
    np.testing.assert_allclose(bigram[0], (np.array([0, 0, 0, 2 - d, 0, 0]) + d * lower) / 2)
    np.testing.assert_allclose(bigram[3], (np.array([0, 0, 1 - d, 1 - d, 1 - d, 0]) + 3 * d * lower) / 3)
    np.testing.assert_allclose(bigram[5], lower)  # nothing was seen behind 5
    np.testing.assert_allclose(bigram.sum(-1), 1)
    unigram = np.exp(baselines["unigram"](np.arange(6)[None], None)[0])
    np.testing.assert_allclose(unigram, np.broadcast_to(np.array([1, 1, 3, 4, 2, 1]) / 12, (6, 6)))


DOCUMENT = ["In the beginning God created the heaven", "and the earth was without form"]


def test_continued_documents_predict_all_but_the_first_token_of_a_row():
    tokenizer = Tokenizer.train(DOCUMENT, 280)
    batches = evaluation.continued_documents([DOCUMENT, DOCUMENT[:1]], tokenizer, 32)
    hidden = evaluation.masked_documents([DOCUMENT, DOCUMENT[:1]], tokenizer, 32, 1.0)
    for (ids, mask, labels), (_, masks, masked_labels) in zip(batches, hidden, strict=True):
        np.testing.assert_array_equal(mask, masks)
        np.testing.assert_array_equal(mask == 0, ids == tokenizer.pad_token_id)
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        for row, kept, following, answers in zip(ids, mask, labels, masked_labels, strict=True):
            text = [*answers[answers != IGNORE_INDEX], tokenizer.eos_token_id]
            assert following.tolist() == text + [IGNORE_INDEX] * (len(row) - len(text))
            assert row[: kept.sum()].tolist() == [tokenizer.bos_token_id, *text]


def test_masked_documents_do_not_change():
    tokenizer = Tokenizer.train(DOCUMENT, 280)
    first, second = (evaluation.masked_documents([DOCUMENT] * 3, tokenizer, 32, 0.4) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        for array, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(array, other)
    ids, mask, labels = first[0]
    np.testing.assert_array_equal(ids == tokenizer.mask_token_id, labels != IGNORE_INDEX)
    np.testing.assert_array_equal(mask == 0, ids == tokenizer.pad_token_id)


def test_examples_follow_their_rule():
    documents = [
        ["Too short", "And God made the world and it was made LORD", "The other eight words are not for us"]
    ] * 20
    tokenizer = Tokenizer.train([" made made world world world"], 290)
    assert [len(tokenizer.encode(word)) == 3 for word in (" made", " world", " other")] == [True, True, False]
    expected = {"text": "And God made the <mask> and it was made LORD", "answer": "world"}
    assert evaluation.examples(documents, tokenizer) == [expected] * evaluation.EXAMPLES
    assert evaluation.examples(documents, tokenizer, 20) == [expected] * 20
    assert evaluation.examples([["Too short"]], tokenizer) == []
    start = {"text": "And God made the", "answer": "world"}
    assert evaluation.examples(documents, tokenizer, 1, cut=True) == [start]

    answer = tokenizer.encode(" world")[1]
    for better in range(3):
        logits = np.zeros(tokenizer.vocab_size)
        logits[answer] = 1
        logits[10 : 10 + better] = 2
        predict = lambda ids, mask, row=logits: np.broadcast_to(row, (*ids.shape, len(row)))  # noqa: E731
        assert evaluation.rank(predict, tokenizer, expected) == better


def test_the_rank_of_a_next_word_is_that_behind_the_text():
    tokenizer = Tokenizer.train([" made made world world world"], 290)
    example = {"text": "And God made the", "answer": "world"}
    ids = tokenizer.encode(example["text"])
    logits = np.zeros((1, len(ids), tokenizer.vocab_size))
    logits[0, -3, 10:20] = logits[0, -1, 10:20] = 1
    logits[0, -2, 10:14] = 1
    assert evaluation.rank(lambda ids, mask: logits, tokenizer, example) == 4
