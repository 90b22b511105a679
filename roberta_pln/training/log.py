"""What a run tells while it goes on: a progress bar, lines of JSON, events for TensorBoard, and a plot at the end."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from roberta_pln.checkpoint import atomic

LOG_FILE: Final = "log.jsonl"
PLOT_FILE: Final = "curves.png"
EVENTS_FOLDER: Final = "tensorboard"


class Log:
    """Where a run's numbers go.

    A line of `log.jsonl` has `step`, the number of steps done, and `loss`, the mean over the steps since the line
    before, `rate`, `epoch` and `seconds`; or `eval`, what was measured, by name.

    Args:
        folder: the run's.
        step: steps done already; what was told of later ones, before the run was killed, is taken back.
        steps: of the whole run.
        show: whether to draw a progress bar on the standard error stream.
    """

    def __init__(self, folder: Path, step: int, steps: int, show: bool) -> None:
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        self.file = folder / LOG_FILE
        self._take_back(step)
        self._events = SummaryWriter(str(folder / EVENTS_FOLDER), purge_step=step + 1)
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not show, dynamic_ncols=True)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.close()
        self._events.close()

    def advance(self) -> None:
        """One step more is done."""
        self._bar.update()

    def write(self, step: int, **values: Any) -> None:
        """Tell numbers, or numbers by name, of a step."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            for part, number in value.items() if isinstance(value, dict) else (("", value),):
                self._events.add_scalar(f"{name}/{part}".rstrip("/"), number, step)
        if "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", rate=f"{values['rate']:.2e}")

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if not self._bar.disable:
            self._bar.write(text, file=self._bar.fp)

    def _take_back(self, step: int) -> None:
        kept = [line for line in read(self.file) if line["step"] <= step] if self.file.exists() else []
        atomic.write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))


class Silence:
    """The log of a process that is not the one that tells."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def advance(self) -> None:
        """Tell nothing."""

    def write(self, step: int, **values: Any) -> None:
        """Tell nothing."""

    def say(self, text: str) -> None:
        """Tell nothing."""


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut short by a kill is left out."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def plot(folder: Path, metric: str | None) -> None:
    """Draw loss and rate, and what the best model is chosen by, over the steps, into `curves.png`."""
    from matplotlib.figure import Figure

    lines = read(folder / LOG_FILE)
    losses = [line for line in lines if "loss" in line]
    measured = [line for line in lines if metric and metric in line.get("eval", {})]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    axes[0].plot([line["step"] for line in losses], [line["loss"] for line in losses], color="tab:blue")
    axes[0].set(xlabel="step", ylabel="training loss")
    rates = axes[0].twinx()
    rates.plot([line["step"] for line in losses], [line["rate"] for line in losses], color="tab:gray", linestyle=":")
    rates.set_ylabel("learning rate (dotted)")
    if measured:
        steps, values = [line["step"] for line in measured], [line["eval"][metric] for line in measured]
        axes[1].plot(steps, values, marker="o", color="tab:orange")
        axes[1].set(xlabel="step", ylabel=f"{metric}, measured")
    with atomic.writing(folder / PLOT_FILE) as file:
        figure.savefig(file, format="png", dpi=110)
