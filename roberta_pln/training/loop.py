"""One run, from its settings to its result: the same order of things in every backend.

What a run leaves in its output directory:

| name | what |
|---|---|
| `model.safetensors`, `config.json`, the tokenizer's files | the result: the best model measured, or the last |
| `results.json` | what was measured of it |
| `log.jsonl`, `tensorboard/`, `curves.png` | how it went |
| `settings.json` | what was asked for, and what the data were |
| `state/` | what a run that was stopped goes on with, in any backend |
| `best/` | the best model so far |
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, Final

from roberta_pln import backends, checkpoint, schema
from roberta_pln.checkpoint import atomic, hub
from roberta_pln.checks import InputError
from roberta_pln.config import CONFIG_FILE, RobertaPreLayerNormConfig
from roberta_pln.data.batches import START, Position
from roberta_pln.training import log, state
from roberta_pln.training.examples import Examples
from roberta_pln.training.log import Log, Silence
from roberta_pln.training.settings import Settings
from roberta_pln.training.state import Snapshot
from roberta_pln.training.tasks import LOWER_IS_BETTER, TASKS, Metrics

SETTINGS_FILE: Final = "settings.json"
RESULTS_FILE: Final = "results.json"
STATE: Final = "state"
BEST: Final = "best"
_OWN: Final = (
    *(SETTINGS_FILE, RESULTS_FILE, STATE, BEST, log.LOG_FILE, log.PLOT_FILE, log.EVENTS_FOLDER),
    *(CONFIG_FILE, checkpoint.FILES["safetensors"]),
)


class TrainingError(RuntimeError):
    """A run cannot go on; the last state that was good is kept."""


class Run:
    """One run.

    Args:
        settings: what is asked for.
        overwrite: whether to remove what another run has left in the output directory, instead of going on with it.
        show: whether to draw a progress bar.

    Raises:
        InputError: when the examples do not fit the task; when the output directory holds something else, or the run of
            other settings or data.
    """

    def __init__(self, settings: Settings, overwrite: bool = False, show: bool = False) -> None:
        self.settings, self.overwrite, self.show = settings, overwrite, show
        self.task, self.folder = TASKS[settings.task], Path(settings.output)
        self.metric = settings.metric or self.task.metrics[0]
        self.started = time.monotonic()
        if self.folder.is_dir():
            atomic.finish(self.folder)
        self.goes_on = not overwrite and (self.folder / STATE).is_dir()
        source = self.folder / STATE if self.goes_on else hub.find_checkpoint(settings.model)
        self.examples = Examples(settings, source, self.folder if self.goes_on else source, self.goes_on)
        if self.goes_on:
            self._check_settings()
        trainer = trainer_class(settings.backend)
        self.batches = self.examples.batches(trainer.fixed_shapes)
        self.measured = self.examples.measured_batches(trainer.fixed_shapes) if settings.eval else None
        self.steps = settings.steps or settings.epochs * len(self.batches)

        self.losses: list[Any] = []  # of the steps since the last line of the log; the latest are still in the device
        self.progress: dict[str, Any] = {"position": START, "losses": [], "seconds": 0.0, "best": None, "waited": 0}
        snapshot, self.config = self._resumed(source) if self.goes_on else self._begun(source)
        self.step = snapshot.step
        self.trainer = trainer.build(self.config, self.task.head, settings.recipe, settings.parallel)
        if self.trainer.is_main and not self.goes_on:
            self._claim()
        self.trainer.wait()
        self.trainer.restore(snapshot)

    def train(self) -> Metrics | None:
        """Take the remaining steps, and write the result.

        Returns:
            What was measured of the result; None before the end (`until`), or without examples to measure on.

        Raises:
            TrainingError: when a loss is not finite.
        """
        last = min(self.steps, self.settings.until or self.steps)
        told = Log(self.folder, self.step, self.steps, self.show) if self.trainer.is_main else Silence()
        with told:
            while self.step < last and not self.has_ended:
                self._take_step()
                told.advance()
                if self._is_due(self.settings.log_every):
                    self._tell(told)
                if self.measured is not None and self._is_due(self.settings.eval_every or len(self.batches)):
                    self._measure(told)
                if self._is_due(self.settings.save_every) or self.step == last or self.has_ended:
                    self._save()
        return self._finish() if self.step == self.steps or self.has_ended else None

    # ------------------------------------------------------------- where it starts

    def _begun(self, source: Path) -> tuple[Snapshot, RobertaPreLayerNormConfig]:
        """The state before the first step, and the model's config."""
        asked, recipe = self.settings, self.settings.recipe
        changes = self.task.config(self.examples.features["train"])
        if asked.dropout is not None:
            changes |= {"hidden_dropout_prob": asked.dropout, "attention_probs_dropout_prob": asked.dropout}
        if not asked.fresh:
            config, weights = state.pretrained(source, self.task.head, recipe.parameter_dtype, recipe.seed, **changes)
            return state.start(weights), config
        config = self.examples.config.replace(**changes)
        parameters = schema.expand(config, self.task.head).values()
        return state.start(state.fresh(config, parameters, recipe.parameter_dtype, recipe.seed)), config

    def _resumed(self, source: Path) -> tuple[Snapshot, RobertaPreLayerNormConfig]:
        """The state that the run was stopped in."""
        snapshot, self.progress = state.load(source, self.task.head, self.settings.recipe.parameter_dtype)
        self.losses = list(self.progress["losses"])
        return snapshot, self.examples.config

    def _check_settings(self) -> None:
        """A directory is gone on in with the settings and the data that it was begun with."""
        begun = json.loads((self.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        asked, digests = self.settings.to_dict(), self.examples.digests
        problems = [
            f"{name} was {begun['settings'].get(name)!r} and is {asked[name]!r}"
            for name in self.settings.changed(begun["settings"])
        ]
        problems += [
            f"the file of {name} has other content than before"
            for name in {**begun["digests"], **digests}
            if begun["digests"].get(name) != digests.get(name)
        ]
        if problems:
            raise InputError(
                f"{self.folder} holds a run that was begun otherwise: {'; '.join(problems)}. To go on, give what it "
                f"was begun with; else give another output, or overwrite"
            )

    def _claim(self) -> None:
        """Make the output directory this run's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in self.folder.iterdir())
        if there and not self.overwrite and SETTINGS_FILE not in there:  # with them, no state was reached before a kill
            raise InputError(
                f"output must be a new directory, or that of a run to go on with, got {self.folder}, which holds "
                f"{there[0]}: give another, or overwrite"
            )
        for name in _OWN:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        atomic.write_json(
            self.folder / SETTINGS_FILE, {"settings": self.settings.to_dict(), "digests": self.examples.digests}
        )
        self.examples.tokenizer.save_pretrained(self.folder)

    # ------------------------------------------------------------- what is done, and when

    @property
    def has_ended(self) -> bool:
        """Whether there is no hope for a better model."""
        patience = self.settings.patience
        return patience is not None and self.progress["waited"] >= patience

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def _take_step(self) -> None:
        position = Position(*self.progress["position"])
        batch = self.batches.batch(position)
        self.losses.append(self.trainer.step(batch, self.settings.recipe.rate(self.step, self.steps)))
        self.step += 1
        self.progress["position"] = self.batches.behind(position)

    def _read_losses(self) -> list[float]:
        """The losses since the last line of the log, as numbers."""
        for index, loss in enumerate(self.losses):
            self.losses[index] = float(loss)
            if not math.isfinite(self.losses[index]):
                there = (self.folder / STATE).is_dir()
                kept = f"an earlier state is kept in {self.folder / STATE}" if there else "no state was written yet"
                raise TrainingError(
                    f"the loss must be a finite number, got {self.losses[index]} in step "
                    f"{self.step - len(self.losses) + index + 1}; {kept}: begin anew with a lower learning_rate, a "
                    f"longer warmup, or clip"
                )
        return self.losses

    @property
    def seconds(self) -> float:
        """What the run has taken, over all its parts."""
        return float(self.progress["seconds"]) + time.monotonic() - self.started

    def _tell(self, told: Log | Silence) -> None:
        losses = self._read_losses()
        rate = self.settings.recipe.rate(self.step - 1, self.steps)
        epoch, seconds = self.step / len(self.batches), round(self.seconds, 3)
        told.write(self.step, loss=sum(losses) / len(losses), rate=rate, epoch=epoch, seconds=seconds)
        self.losses = []

    def _measure(self, told: Log | Silence) -> None:
        """Measure the model, and keep it if it is the best."""
        self._read_losses()
        found = self.measure()
        told.write(self.step, eval=found)
        told.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        sign, best = (-1 if self.metric in LOWER_IS_BETTER else 1), self.progress["best"]
        if best is not None and sign * found[self.metric] <= sign * best["metrics"][self.metric]:
            self.progress["waited"] += 1
            return
        snapshot = self.trainer.snapshot()
        if self.trainer.is_main:
            checkpoint.save(snapshot.weights, self.folder / BEST, self.config, self.task.head)
        self.progress |= {"best": {"step": self.step, "metrics": found}, "waited": 0}

    def measure(self) -> Metrics:
        """What the task measures, of the model as it is."""
        assert self.measured is not None
        outputs: dict[str, list[Any]] = {}
        for number in range(len(self.measured)):
            position = Position(0, number)
            batch = self.measured.batch(position)
            said = self.trainer.predict(batch)
            if "losses" in said:
                said["labels"] = batch["labels"]
            for name, array in said.items():
                kept = outputs.setdefault(name, [None] * len(self.measured.rows))
                for index, row in zip(self.measured.indices(position), array, strict=True):
                    kept[index] = row
        return self.task.measure(self.examples.records["eval"], self.examples.features["eval"], outputs, self.settings)

    # ------------------------------------------------------------- what is written

    def _save(self) -> None:
        """Write the state: a kill leaves the one before, or this one."""
        progress = {**self.progress, "losses": self._read_losses(), "seconds": self.seconds}
        snapshot = self.trainer.snapshot()
        if self.trainer.is_main:
            with atomic.changing(self.folder) as change, change.replacing(STATE) as temporary:
                state.save(snapshot, temporary, self.config, self.task.head, progress)
        self.trainer.wait()

    def _finish(self) -> Metrics | None:
        """Write the result."""
        best = self.progress["best"]
        if self.trainer.is_main:
            found = checkpoint.open(self.folder / (BEST if best else STATE))
            checkpoint.save(found, self.folder, self.config, self.task.head)
            atomic.write_json(self.folder / RESULTS_FILE, {"steps": self.step, "seconds": self.seconds, **(best or {})})
            log.plot(self.folder, self.metric)
        self.trainer.wait()
        return best["metrics"] if best else None


def trainer_class(backend: str | None) -> Any:
    """The `Trainer` of a backend, or of the first that is installed."""
    name = backends.choose([backend] if backend else None)[0]
    backends.BACKENDS[name].load()
    return importlib.import_module(f"roberta_pln.{name}.training").Trainer
