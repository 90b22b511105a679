"""What the measuring scripts compute: a model of base size, its inputs, texts of many lengths, and what it costs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IGNORED, PADDING = -100, 1
VOCABULARY = 50265
LAYERS, HIDDEN = 12, 768
"""Base size; heads have 64 components, and the feed-forward block is four times as wide."""

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arranged:
    """Some texts as batches.

    Attributes:
        batches: arguments of calls.
        restore: from the states of each batch to those of each text, (tokens, D), in the order of the texts.
    """

    batches: list[Batch]
    restore: Callable[[list[np.ndarray]], list[np.ndarray]]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options for models of another size."""
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"another depth of the models (default {LAYERS})")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"another width, of whole 64 (default {HIDDEN})")


def is_base(options: argparse.Namespace) -> bool:
    """Whether the models have base size."""
    return (options.layers, options.hidden) == (LAYERS, HIDDEN)


def save_model(folder: Path, head: str, layers: int = LAYERS, hidden: int = HIDDEN) -> str:
    """Random weights, for every side to load; kept in the folder for the next time."""
    from roberta_pln import pt

    path = folder / head
    if not path.is_dir():
        config = pt.RobertaPreLayerNormConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            max_position_embeddings=514,  # positions begin behind that of padding
        )
        getattr(pt, f"RobertaPreLayerNorm{head}")(config).save_pretrained(path)
    return str(path)


def inputs(head: str, batch: int, length: int, rate: float = 0.0) -> Batch:
    """Full rows of ids with their mask, and labels for a head that has them, on a share `rate` of the tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, VOCABULARY, (batch, length))
    found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if head == "ForMaskedLM":
        labelled = rng.permuted(np.arange(ids.size) < round(rate * ids.size)).reshape(ids.shape)
        found["labels"] = np.where(labelled, ids, IGNORED)
    elif head == "ForSequenceClassification":
        found["labels"] = rng.integers(0, 2, batch)
    return found


def texts(count: int, longest: int) -> list[np.ndarray]:
    """Texts whose lengths are log-normal with mean 40, and bounded."""
    rng = np.random.default_rng(0)
    spread = 0.8
    lengths = rng.lognormal(np.log(40) - spread**2 / 2, spread, count)
    return [rng.integers(4, VOCABULARY, length) for length in np.clip(lengths, 4, longest).astype(int)]


# ------------------------------------------------------------------ texts as batches


def whole(inputs: Batch) -> Arranged:
    """One batch of full rows."""
    return Arranged([inputs], lambda states: list(states[0]))


def packed(texts: Sequence[np.ndarray], length: int, most_rows: int) -> Arranged:
    """Several texts in each row, as this library's models take them; batches of one size with few empty rows."""
    from roberta_pln.data import packing

    (_, total, _) = packing.pack_sequences(texts, length=length, pad_token_id=PADDING).shape
    rows = math.ceil(total / math.ceil(total / most_rows))
    found = packing.pack_sequences(texts, length=length, pad_token_id=PADDING, rows=rows)
    return Arranged([batch._asdict() for batch in found.batches], found.unpack)


def padded(texts: Sequence[np.ndarray], rows: int, multiple: int = 1, by_length: bool = False) -> Arranged:
    """A text in each row.

    Args:
        texts: arrays of ids.
        rows: of a batch.
        multiple: a batch is as long as its longest text, rounded up to a multiple of this.
        by_length: texts of about the same length share a batch, instead of those that follow one another.
    """
    lengths = np.array([len(text) for text in texts])
    order = np.argsort(lengths, kind="stable") if by_length else np.arange(len(texts))
    batches = []
    for start in range(0, len(texts), rows):
        chosen = order[start : start + rows]
        width = -(-lengths[chosen].max() // multiple) * multiple
        mask = (np.arange(width) < lengths[chosen][:, None]).astype(np.int64)
        ids = np.full(mask.shape, PADDING)
        ids[mask > 0] = np.concatenate([texts[index] for index in chosen])
        batches.append({"input_ids": ids, "attention_mask": mask})

    def restore(states: list[np.ndarray]) -> list[np.ndarray]:
        sorted_states = [row for batch in states for row in batch]
        return [sorted_states[place][: lengths[index]] for index, place in enumerate(np.argsort(order))]

    return Arranged(batches, restore)


# ------------------------------------------------------------------ what it costs, and whether it is the same


def operations(
    lengths: Sequence[int],
    read: Sequence[float],
    decoded: bool = False,
    train: bool = False,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
) -> float:
    """Floating-point operations of the matrix products that are needed: none for padding, or for what nobody reads.

    Args:
        lengths: tokens of each text.
        read: of how many of them the states are read in the end.
        decoded: whether by the head of a language model.
        train: also the backward pass, which has two products for each of the forward pass.
        layers, hidden: of the model.
    """
    forward = (layers - 1) * of_layer(lengths, lengths, hidden) + of_layer(read, lengths, hidden)
    forward += 2 * sum(read) * (hidden**2 + hidden * VOCABULARY) if decoded else 0
    return float(3 * forward if train else forward)


def of_layer(queries: Sequence[float], keys: Sequence[int], hidden: int) -> float:
    """Operations of a layer that computes some tokens of each text from all: two products for all, ten for those."""
    pairs = sum(some * every for some, every in zip(queries, keys, strict=True))
    return 2 * (2 * sum(keys) + 10 * sum(queries)) * hidden**2 + 4 * pairs * hidden


def sample(states: Sequence[np.ndarray]) -> np.ndarray:
    """What is compared of the states of all texts: every 17th number, so that every component is met."""
    return np.concatenate([np.asarray(one).reshape(-1)[::17].astype(np.float32) for one in states])


def difference(result: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, relative to the largest number; infinite where the shapes differ."""
    if result.shape != other.shape:
        return float("inf")
    return float(np.abs(result - other).max() / np.abs(other).max())


def check_same(what: str, results: dict[str, Path], tolerance: float) -> dict[str, float]:
    """Differences of the results of all sides from those of the first.

    Args:
        what: is compared, for the message.
        results: the file in which each side has put its result.
        tolerance: the largest difference that is rounding.

    Raises:
        SystemExit: when a side has computed something else; its time then means nothing.
    """
    arrays = {side: np.load(path) for side, path in results.items()}
    first, reference = next(iter(arrays.items()))
    found = {side: difference(array, reference) for side, array in arrays.items()}
    for side, apart in found.items():
        if not apart <= tolerance:  # NaN too is refused
            raise SystemExit(f"{what}: {side} computes something else than {first}: {apart:.1e} apart")
    return found
