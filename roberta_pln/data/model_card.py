"""The model card of a small language model, for people."""

from __future__ import annotations

from typing import Any

from roberta_pln.data import corpus, evaluation

_TEMPLATE = """# A small RoBERTa-PreLayerNorm{noun}

A {kind} with {parameters:,} parameters, stored as {stored_as}, made to try this package and to test it.
It knows the language of its training text and little else. It was trained by {trained_by};
`scripts/pretrain --evaluate FOLDER` measures the table below again.

## Text

{trained_on}: {training_lines:,} lines for training, {held_out_lines:,} held out.

Held out are whole documents (chapters): number {first}, and every {every}th after it, counted from 0. Neither the
model nor the tokenizer saw them in training. What the text itself repeats elsewhere, such as parallel passages, was
not removed from the training part.

Licence: {licence}

## Quality on the held-out part

{quality}

## Training

{steps:,} of {planned_steps:,} planned steps, {passes} passes over the text, {minutes} minutes.

{recipe}
"""

_MASKED = """\
Rows of up to {length} tokens; masked tokens are always replaced by `<mask>`; fixed seeds; measured on the files in this
folder, with arithmetic in float32.

| masked | accuracy | perplexity | bigram baseline | unigram baseline | tokens predicted |
|---|---|---|---|---|---|
{scores}

The baselines are accuracies, from counts of the training part. Unigram: always the most frequent token. Bigram: the
most frequent successor of the left neighbour; if that is masked, the most frequent predecessor of the right one; else
the most frequent token.

`held_out.txt` holds the first two lines of every held-out document, and `card.json` the scores on them, under `sample`.

`examples.json` holds {examples} held-out sentences with one word masked, chosen by a rule: of held-out documents at
equal distances, the first line of {fewest} to {most} words; masked is, of its words of four or more small letters that
are one token, the one nearest to the middle. (A first rule masked the last such word, which is the hardest place: few
guesses were right there.) The model's first guess is right in {right} of the {examples}, and the answer is among its
first five guesses in {in_five}. The same rule gives {all_examples} sentences over all held-out documents: right in
{all_right}, among the first five in {all_in_five}."""
_MASKED_ROW = (
    "| {rate:.0%} | {accuracy:.1%} | {perplexity:.1f} | {bigram_accuracy:.1%} | {unigram_accuracy:.1%} | {tokens:,} |"
)

_CAUSAL = """\
Rows of up to {length} tokens that start with `<s>`; every other token is predicted from those before it, the `</s>` at
the end of a row included; measured on the files in this folder, with arithmetic in float32.

| | perplexity | accuracy | tokens predicted |
|---|---|---|---|
{scores}

The baselines are counts of the training part. Unigram: how often each token was there, plus one. Bigram: how often each
token stood behind the one before it, with interpolated Kneser-Ney smoothing and a discount of {discount}.

`held_out.txt` holds the first two lines of every held-out document, and `card.json` the scores on them, under `sample`.

`examples.json` holds the starts of {examples} held-out sentences and the word that follows each, chosen by a rule: of
held-out documents at equal distances, the first line of {fewest} to {most} words; it is cut before, of its words of
four or more small letters that are one token, the one nearest to the middle. The model's first guess is right in
{right} of the {examples}, and the answer is among its first five guesses in {in_five}. The same rule gives
{all_examples} starts over all held-out documents: right in {all_right}, among the first five in {all_in_five}."""
_CAUSAL_ROW = "| {name} | {perplexity:.1f} | {accuracy:.1%} | {tokens:,} |"

_OBJECTIVES = {
    "masked": ("", "masked language model", _MASKED),
    "causal": (" decoder", "causal language model", _CAUSAL),
}


def readme(card: dict[str, Any]) -> str:
    """The text of `README.md`.

    Args:
        card: the content of `card.json`, as `scripts/pretrain` writes it.
    """
    noun, kind, quality = _OBJECTIVES[card["objective"]]
    return _TEMPLATE.format(
        **{name: value for name, value in card.items() if name not in ("recipe", "examples", "all_examples")},
        noun=noun,
        kind=kind,
        first=corpus.HELD_OUT_FIRST,
        every=corpus.HELD_OUT_EVERY,
        quality=quality.format(**_found(card), scores="\n".join(_scores(card))),
        minutes=round(card["seconds"] / 60),
        recipe="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in card["recipe"].items()),
    )


def _scores(card: dict[str, Any]) -> list[str]:
    """The rows of the table."""
    if card["objective"] == "masked":
        return [_MASKED_ROW.format(rate=float(rate), **scores) for rate, scores in card["held_out"].items()]
    return [_CAUSAL_ROW.format(name=name, **scores) for name, scores in card["held_out"].items()]


def _found(card: dict[str, Any]) -> dict[str, Any]:
    """What the text around the table tells."""
    return {
        "length": card["recipe"]["length"],
        "discount": evaluation.DISCOUNT,
        "examples": card["examples"]["count"],
        "right": card["examples"]["first"],
        "in_five": card["examples"]["in_five"],
        "all_examples": card["all_examples"]["count"],
        "all_right": card["all_examples"]["first"],
        "all_in_five": card["all_examples"]["in_five"],
        "fewest": evaluation.EXAMPLE_WORDS.start,
        "most": evaluation.EXAMPLE_WORDS.stop - 1,
    }
