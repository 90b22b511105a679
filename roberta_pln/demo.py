"""The main job, shown on the checkpoint that ships with the package."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from roberta_pln import checkpoint, parity, predict
from roberta_pln.backends import BACKENDS, Arrays, Request, choose, run
from roberta_pln.checkpoint import Checkpoint
from roberta_pln.numerics import IGNORE_INDEX
from roberta_pln.tokenizer import Tokenizer

ASSET: Final = Path(__file__).parent / "assets" / "kjv"
"""The small pretrained checkpoint, with its tokenizer, card and example sentences."""

HEAD: Final = "ForMaskedLM"
DTYPES: Final = ("float32", "float64")
TOP: Final = 5

Show = Callable[[str], None]


@dataclass(frozen=True)
class RoundTrip:
    """What came back when a checkpoint went into a backend's own format and back.

    Attributes:
        file: name of the file in the backend's own format.
        tensors: tensors of the checkpoint.
        same_native: how many are the same bit for bit in that file.
        same_back: how many are the same bit for bit in the safetensors file made from it.
    """

    file: str
    tensors: int
    same_native: int
    same_back: int

    @property
    def passed(self) -> bool:
        """Whether every tensor came back."""
        return self.tensors == self.same_native == self.same_back


def main(show: Show = print) -> bool:
    """Run the demonstration.

    Args:
        show: called with each line.

    Returns:
        Whether every backend gave the same numbers and every tensor came back.
    """
    source = checkpoint.open(ASSET)
    describe(source, show)
    names = choose(None)
    for backend in BACKENDS.values():
        if backend.name not in names:
            show(backend.advice())

    examples = json.loads((ASSET / "examples.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_pretrained(ASSET)
    inputs = labelled(tokenizer, examples)
    answers, trips = {}, {}
    for name in names:
        answers[name], trips[name] = work(name, source, inputs)

    show("\nThe most probable tokens for <mask>, and their probabilities")
    for index, example in enumerate(examples):
        fill(tokenizer, example, index, inputs["input_ids"][index], answers, show)

    show("\nInto each framework's own format and back, tensors that are the same bit for bit")
    for name, trip in trips.items():
        show(
            f"  {BACKENDS[name].title:12}{trip.file:20}{trip.same_native} of {trip.tensors}, "
            f"and back in safetensors {trip.same_back} of {trip.tensors}"
        )

    passed = all(trip.passed for trip in trips.values())
    show("\nLargest difference between two backends (gradients: relative to each gradient's largest entry)")
    if len(names) < 2:
        show("  needs two backends")
    for report in parity.reports(ASSET, HEAD, DTYPES, answers) if len(names) > 1 else ():
        show("\n".join("  " + line for line in report.table().splitlines()))
        passed = passed and report.passed
    show("\nEverything holds." if passed else "\nSomething differs: see the lines marked with ! above.")
    return passed


def describe(source: Checkpoint, show: Show) -> None:
    """Say what the checkpoint is."""
    card = json.loads((ASSET / "card.json").read_text(encoding="utf-8"))
    config = source.config
    assert config is not None
    count = sum(int(np.prod(source.shape(name))) for name in source)
    show(f"{source.path.parent.name}: RoBERTa-PreLayerNorm, {config.num_hidden_layers} layers of {config.hidden_size}")
    show(f"  {count:,} parameters, vocabulary {config.vocab_size:,}, trained on {card['trained_on']}")
    for rate, scores in card["held_out"].items():
        show(
            f"  held-out masked-token accuracy {scores['accuracy']:.1%} with {float(rate):.0%} of the tokens masked "
            f"(guessing from neighbours: {scores['bigram_accuracy']:.1%})"
        )


def labelled(tokenizer: Tokenizer, examples: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """The example sentences as inputs, with the word that was masked as the label."""
    inputs = predict.encode(tokenizer, [example["text"] for example in examples])
    answers = [tokenizer.encode(" " + example["answer"])[1] for example in examples]  # behind <s>
    masked = inputs["input_ids"] == tokenizer.mask_token_id
    return {**inputs, "labels": np.where(masked, np.array(answers)[:, None], IGNORE_INDEX)}


def work(name: str, source: Checkpoint, inputs: Arrays) -> tuple[list[dict[str, np.ndarray]], RoundTrip]:
    """Everything that one backend computes, in its own process, with a line of progress."""
    started = time.monotonic()
    steps = [*(f"computing in {dtype}" for dtype in DTYPES), "converting", "done"]

    def progress(done: int) -> None:
        end = "\n" if done == len(steps) - 1 else ""
        text = f"\r{BACKENDS[name].title:12}{steps[done]:24}{time.monotonic() - started:5.1f} s"
        print(text, end=end, file=sys.stderr, flush=True)

    progress(0)
    path = str(source.path.parent)
    with tempfile.TemporaryDirectory(prefix="roberta_pln-") as folder:
        requests = [Request(path, HEAD, dtype, inputs, gradients=True) for dtype in DTYPES]
        requests.append(Request(path, HEAD, "float32", round_trip=folder))
        *answers, _ = run(name, requests, progress)
        native, back = (checkpoint.open(Path(folder, part)) for part in ("native", "back"))
        trip = RoundTrip(native.path.name, len(source), same_bits(source, native), same_bits(source, back))
        return answers, trip


def same_bits(source: Checkpoint, other: Checkpoint) -> int:
    """How many of a checkpoint's tensors another holds bit for bit, in the source's type."""
    return sum(
        name in other and other[name].astype(source.dtype(name)).tobytes() == source[name].tobytes() for name in source
    )


def fill(
    tokenizer: Tokenizer,
    example: Mapping[str, str],
    index: int,
    ids: np.ndarray,
    answers: Mapping[str, list[dict[str, np.ndarray]]],
    show: Show,
) -> None:
    """Print one sentence and what each backend puts in."""
    show(f"\n  {example['text']}   [the text has: {example['answer']}]")
    position = int(np.flatnonzero(ids == tokenizer.mask_token_id)[0])
    columns = [
        [(tokenizer.decode([token]), p) for token, p in predict.most_probable(found[0]["logits"][index, position], TOP)]
        for found in answers.values()
    ]
    show("    " + "".join(f"{BACKENDS[name].title:24}" for name in answers).rstrip())
    for row in zip(*columns, strict=True):
        show("    " + "".join(f"{token.strip():14}{p:.6f}  " for token, p in row).rstrip())
