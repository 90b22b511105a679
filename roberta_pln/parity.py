"""Do the backends compute the same? Runs the same inputs through each and compares every output and gradient."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from roberta_pln import backends as processes
from roberta_pln import checkpoint as checkpoints
from roberta_pln import schema
from roberta_pln.backends import BACKENDS, Arrays, Request
from roberta_pln.checkpoint import hub
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.data.masking import mask_tokens
from roberta_pln.tokenizer import Tokenizer

TOLERANCES: Final = {"float64": 1e-12, "float32": 2e-5, "float16": 0.05, "bfloat16": 0.4}
"""Largest difference of an output between two backends, for each unit of that output's largest entry (at least 1).

They are the accuracy of the arithmetic with room for the sum of many roundings: about 4500 times the spacing of
numbers near 1 in float64, 170 times in float32 and 50 times in the half precisions."""

GRADIENT_FACTOR: Final = 10.0
"""A gradient may differ by this many times the tolerance, for each unit of its own largest entry."""

NOISE: Final = {"float64": 2.0**-46, "float32": 2.0**-17, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""A gradient whose largest entry is less than this part of the model's largest gradient is rounding noise of a gradient
that is zero: 64 spacings of numbers near 1, and 4 in the half precisions."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of one array between two backends.

    Attributes:
        name: `logits`, `hidden_states.3`, `gradient.<canonical name>`, ...
        left, right: the backends.
        dtype: what they computed in.
        absolute: largest absolute difference; infinite where only one side is finite, or the shapes differ.
        relative: `absolute` over the array's largest entry.
        where: index of the largest difference.
        tolerance: the largest `absolute` that passes.
    """

    name: str
    left: str
    right: str
    dtype: str
    absolute: float
    relative: float
    where: tuple[int, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.absolute <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What `compare` found: one `Difference` for each array and pair of backends."""

    checkpoint: str
    head: str
    backends: tuple[str, ...]
    dtype: str
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether every difference is within its tolerance."""
        return all(difference.passed for difference in self.differences)

    def worst(self, group: str) -> dict[tuple[str, str], Difference]:
        """For each pair of backends, the difference of a group of arrays that is largest against its tolerance.

        Args:
            group: one of the keys of `GROUPS`.
        """
        found: dict[tuple[str, str], Difference] = {}
        for difference in self.differences:
            pair = (difference.left, difference.right)
            if GROUPS[group](difference.name) and (pair not in found or _excess(found[pair]) < _excess(difference)):
                found[pair] = difference
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**asdict(self), "passed": self.passed}

    def table(self) -> str:
        """The largest differences as text, a row for each group of arrays and a column for each pair of backends."""
        pairs = list(itertools.combinations(self.backends, 2))
        width = max(len(group) for group in GROUPS) + 2
        lines = [f"{self.dtype:{width}}" + "".join(f"{a + ' - ' + b:>16}" for a, b in pairs)]
        for group in GROUPS:
            worst = self.worst(group)
            if worst:
                lines.append(f"{group:{width}}" + "".join(_cell(worst[pair], group) for pair in pairs))
        return "\n".join(lines)


GROUPS: Final[dict[str, Callable[[str], bool]]] = {
    "hidden states": lambda name: name.startswith(("hidden_states", "last_hidden_state")),
    "logits": lambda name: name.endswith("logits"),
    "pooler output": lambda name: name == "pooler_output",
    "loss": lambda name: name == "loss",
    "gradients": lambda name: name.startswith("gradient."),
}
"""Groups of arrays that a report sums up. Gradients are shown relative to each gradient's largest entry."""


def _excess(difference: Difference) -> float:
    """How far a difference goes into its tolerance. An array of zeros has none, and passes only when it agrees."""
    if difference.tolerance == 0:
        return 0.0 if difference.absolute == 0 else np.inf
    return difference.absolute / difference.tolerance


def _cell(difference: Difference, group: str) -> str:
    value = difference.relative if group == "gradients" else difference.absolute
    return f"{value:>14.1e}" + ("  " if difference.passed else " !")


def compare(
    checkpoint: str | os.PathLike[str],
    backends: Sequence[str] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    dtype: str = "float32",
    gradients: bool = True,
    *,
    head: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run the same inputs through some backends, each in a process of its own, and compare everything they return.

    Args:
        checkpoint: a directory, a single file, or a hub id.
        backends: names of at least two backends; all that are installed if not given.
        inputs: arguments of the call, in NumPy; `random_inputs` if not given.
        dtype: what to compute in.
        gradients: also compare the gradient of every parameter.
        head: the head to run; the checkpoint's own if not given.
        progress: called with a line of text as work goes on.

    Raises:
        BackendError: when fewer than two backends are there, or one fails.
    """
    return compare_all(checkpoint, backends, inputs, (dtype,), gradients, head=head, progress=progress)[0]


def compare_all(
    checkpoint: str | os.PathLike[str],
    backends: Sequence[str] | None,
    inputs: Mapping[str, np.ndarray] | None,
    dtypes: Sequence[str],
    gradients: bool = True,
    *,
    head: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Report]:
    """`compare` for several dtypes, with one process a backend."""
    names = processes.choose(backends)
    if len(names) < 2:
        raise processes.BackendError(f"a comparison needs at least two backends, got {', '.join(names)}")
    path = hub.find_checkpoint(checkpoint)
    opened = checkpoints.open(path)
    head = head or opened.head or "Model"
    if inputs is None:
        inputs = random_inputs(opened.needed_config(), head)
    requests = [Request(str(path), head, dtype, inputs, gradients) for dtype in dtypes]
    answers = {}
    for name in names:
        progress(f"{BACKENDS[name].title}: {', '.join(dtypes)}")
        answers[name] = processes.run(name, requests)
    return reports(path, head, dtypes, answers)


def reports(
    path: str | os.PathLike[str], head: str, dtypes: Sequence[str], answers: Mapping[str, Sequence[Arrays]]
) -> list[Report]:
    """A report for each dtype.

    Args:
        path: the checkpoint.
        head: the head that ran.
        dtypes: what was computed in.
        answers: for each backend what it returned, an item for each dtype.
    """
    return [
        Report(
            str(path), head, tuple(answers), dtype, tuple(differences(dict(zip(answers, found, strict=True)), dtype))
        )
        for dtype, *found in zip(dtypes, *answers.values(), strict=True)
    ]


def differences(answers: Mapping[str, Arrays], dtype: str) -> Iterable[Difference]:
    """The difference of every array between every pair of backends; a missing array differs infinitely.

    Some gradients are zero, and what is computed is rounding noise: the softmax ignores what is added to every score
    of a row, so the bias of the keys has none, nor have the biases behind the scores of question answering and
    multiple choice. A gradient that is noise on both sides is measured against the model's largest gradient.
    """
    magnitudes = {
        side: {name: _largest(array) for name, array in found.items() if _is_gradient(name)}
        for side, found in answers.items()
    }
    largest = {side: max(found.values(), default=0.0) for side, found in magnitudes.items()}
    for left, right in itertools.combinations(answers, 2):
        for name in dict.fromkeys((*answers[left], *answers[right])):
            noise = all(magnitudes[side].get(name, np.inf) <= NOISE[dtype] * largest[side] for side in (left, right))
            least = max(largest[left], largest[right]) if noise else 0.0
            yield difference(name, left, right, dtype, answers[left].get(name), answers[right].get(name), least)


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient.")


def difference(
    name: str, left: str, right: str, dtype: str, ours: np.ndarray | None, theirs: np.ndarray | None, least: float = 0.0
) -> Difference:
    """The largest difference of one array. NaN equals NaN and infinity equals infinity of the same sign.

    Args:
        name: the array's name, which decides the tolerance.
        left, right: the backends.
        dtype: what they computed in.
        ours, theirs: the arrays, None where a backend returned none.
        least: the array counts as having an entry at least this large.
    """
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Difference(name, left, right, dtype, np.inf, np.inf, (), 0.0)
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf, posinf=np.inf))
    largest = max(_largest(a), _largest(b), least)
    if distance.size == 0:
        return Difference(name, left, right, dtype, 0.0, 0.0, (), 0.0)
    where = tuple(int(i) for i in np.unravel_index(int(distance.argmax()), distance.shape))
    absolute = float(distance.max())
    scale = GRADIENT_FACTOR * largest if _is_gradient(name) else max(1.0, largest)
    relative = absolute / largest if largest else (0.0 if absolute == 0 else np.inf)
    return Difference(name, left, right, dtype, absolute, relative, where, TOLERANCES[dtype] * scale)


def _largest(array: np.ndarray) -> float:
    """The largest finite magnitude, 0 if there is none."""
    magnitudes = np.abs(np.asarray(array, np.float64))
    return float(magnitudes.max(initial=0.0, where=np.isfinite(magnitudes)))


def random_inputs(
    config: RobertaPreLayerNormConfig, head: str = "ForMaskedLM", batch: int = 4, length: int = 24, seed: int = 0
) -> dict[str, np.ndarray]:
    """Ids, mask and labels for a comparison: a full row, and rows padded on the right, on the left and inside."""
    schema.check_head(head)
    rng = np.random.default_rng(seed)
    length = min(length, config.max_sequence_length)
    input_ids = rng.integers(0, config.vocab_size, (batch, length))
    input_ids[input_ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    padded = np.zeros((batch, length), dtype=bool)
    half = length // 2
    for row in range(1, batch):
        padded[row, [slice(half, None), slice(0, half), slice(half, half + half // 2)][(row - 1) % 3]] = True
    input_ids[padded] = config.pad_token_id
    inputs = {"input_ids": input_ids, "attention_mask": (~padded).astype(np.int64)}
    if head in schema.LM_HEADS:
        chosen = (rng.random((batch, length)) < 0.4) & ~padded
        chosen[0, 0] = True
        inputs["labels"] = np.where(chosen, rng.integers(0, config.vocab_size, (batch, length)), -100)
    return inputs


def text_inputs(path: str | os.PathLike[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Lines of text as one padded batch with 40 % of the tokens masked, always the same ones, and their labels.

    Args:
        path: a checkpoint with its tokenizer: a directory or a hub id.
        texts: at least one.

    Raises:
        FileNotFoundError: when there is no tokenizer.
        ValueError: when there is no text.
    """
    tokenizer = Tokenizer.from_pretrained(hub.find_checkpoint(path))
    batch = tokenizer(texts)
    input_ids, labels = mask_tokens(
        batch["input_ids"], np.random.default_rng(0), 0.4, tokenizer.mask_token_id, tokenizer.special_ids
    )
    return {"input_ids": input_ids, "attention_mask": batch["attention_mask"], "labels": labels}


def to_json(found: Sequence[Report], weights: Sequence[str] = ()) -> str:
    """Reports as JSON, with the differences of the weights of two checkpoints if there are any."""
    return json.dumps({"weights": list(weights), "reports": [report.to_dict() for report in found]}, indent=2) + "\n"


def save_plot(found: Sequence[Report], path: str | os.PathLike[str]) -> None:
    """Draw the largest differences by layer, a line for each pair of backends and dtype, on a logarithmic scale.

    Raises:
        BackendError: when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise processes.BackendError("a plot needs matplotlib: pip install 'roberta_pln[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for report, style in zip(found, itertools.cycle(("-", "--", ":")), strict=False):
        for colour, (left, right) in enumerate(itertools.combinations(report.backends, 2)):
            rows = [d for d in report.differences if (d.left, d.right) == (left, right)]
            points = [d for d in rows if not d.name.startswith("gradient.") and d.name not in ("loss", "pooler_output")]
            points.sort(
                key=lambda d: (not d.name.startswith("hidden_states"), d.name.endswith("logits"), _layer(d.name))
            )
            label = f"{BACKENDS[left].title} - {BACKENDS[right].title}, {report.dtype}"
            axes.semilogy(
                [_tick(d.name) for d in points],
                [max(d.absolute, np.finfo(np.float64).tiny) for d in points],
                style,
                marker="o",
                color=f"C{colour}",
                label=label,
            )
    axes.set_ylabel("largest absolute difference")
    axes.set_title("Differences between backends, layer by layer")
    axes.tick_params(axis="x", rotation=45)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _layer(name: str) -> int:
    return int(name.rpartition(".")[2]) if "." in name else 0


def _tick(name: str) -> str:
    if not name.startswith("hidden_states."):
        return name.replace("last_hidden_state", "final norm").replace("_", " ")
    return "embeddings" if _layer(name) == 0 else f"layer {_layer(name)}"
