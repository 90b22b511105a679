"""What can be set for a run: on the command line, in a YAML or TOML file of the same keys, or in Python."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from roberta_pln.checks import InputError
from roberta_pln.data.masking import SCHEMES, Scheme
from roberta_pln.training.recipe import Recipe
from roberta_pln.training.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run: what is learned from what, for how long, and where the result goes.

    Raises:
        InputError: when a value is not as its description says.
    """

    task: str
    """One of `tasks.TASKS`."""
    model: str
    """The checkpoint to start from, with its tokenizer: a directory or a hub id."""
    train: str
    """The file of the training examples: .jsonl, .txt, .csv or .parquet; the guide of the task names its columns."""
    output: str
    """The directory of the result, and of what a run that was stopped goes on with."""
    eval: str | None = None
    """A file of examples to measure the model on."""
    backend: str | None = None
    """pt, tf or flax; the first that is installed by default. It may change when a run goes on."""
    parallel: str | None = None
    """How devices share the work: ddp or fsdp (pt), mirrored or multiworker (tf), data=2,fsdp=2,tensor=2 (flax)."""
    fresh: bool = False
    """Whether to start from new weights instead of those of the checkpoint."""
    max_length: int | None = None
    """Most tokens of a row; what the model can take by default."""
    epochs: int = 3
    """How often the examples are gone through."""
    steps: int | None = None
    """Number of optimizer steps, instead of `epochs`."""
    batch_size: int = 16
    """Rows of a step, over all devices."""
    tokens: int | None = None
    """Most tokens of a step, padding included, instead of `batch_size`."""
    pack: bool = False
    """Whether short texts share rows of `max_length`, apart from one another, of masked-lm and token-classification."""
    eval_batch_size: int = 32
    """Rows at a time when measuring."""
    eval_every: int | None = None
    """Steps from one measurement to the next; an epoch by default."""
    save_every: int = 200
    """Steps from one state to the next: what a kill can cost."""
    log_every: int = 10
    """Steps from one line of the log to the next."""
    until: int | None = None
    """The step to stop at for now; the same command without it goes on."""
    patience: int | None = None
    """How many measurements without a better one end the run early; None goes on to the end."""
    metric: str | None = None
    """What the best model is chosen by; the first of the task's by default."""
    dropout: float | None = None
    """Rate of dropout of hidden states and attention; that of the checkpoint by default."""
    mask_rate: float = 0.15
    """Share of the tokens that a masked language model predicts."""
    mask_scheme: Scheme = "80-10-10"
    """One of `masking.SCHEMES`: what stands in their place."""
    whole_words: bool = False
    """Whether all tokens of a word are predicted together."""
    join: bool = True
    """Whether texts of a masked language model that follow one another share rows."""
    stride: int | None = None
    """Tokens from one window over a long context to the next, of question answering; a quarter of a row by default."""
    no_answer: bool = False
    """Whether a question may have no answer in its context."""
    recipe: Recipe = field(default_factory=Recipe)
    """How weights follow gradients; its fields are keys like the others."""

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("mask_scheme", self.mask_scheme, SCHEMES)
        metrics = TASKS[self.task].metrics
        if self.metric is not None:
            _one_of(f"metric of {self.task}", self.metric, metrics)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("mask_rate", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} must be in [0, 1), got {value!r}")
        if self.patience is not None and self.eval is None:
            raise InputError("patience needs measurements to wait for, got no eval: give a file of examples")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings of flat keys, those of the recipe among them; `preset` names values to start from.

        Raises:
            InputError: when a key is unknown or missing, or a value not as it must be.
        """
        values = dict(values)
        preset = values.pop("preset", None)
        if preset is not None:
            _one_of("preset", preset, PRESETS)
            values = {**PRESETS[preset], **values}
        known = texts()
        if unknown := sorted(values.keys() - known):
            raise InputError(f"a setting must be one of {', '.join(known)}, got {', '.join(unknown)}")
        if missing := [name for name in REQUIRED if values.get(name) is None]:
            raise InputError(f"{', '.join(REQUIRED)} must be set, got no {' and no '.join(missing)}")
        recipe = {name: values.pop(name) for name in _names(Recipe) if name in values}
        if "freeze" in recipe:
            recipe["freeze"] = tuple(recipe["freeze"])
        return cls(**values, recipe=Recipe(**recipe))

    def to_dict(self) -> dict[str, Any]:
        """The flat keys, as JSON can hold them."""
        values = dataclasses.asdict(self)
        recipe = values.pop("recipe")
        return {**values, **recipe, "freeze": list(self.recipe.freeze)}

    def changed(self, others: Mapping[str, Any]) -> list[str]:
        """Names of settings that other settings, of flat keys, have other values of, and that matter to the result."""
        own = self.to_dict()
        return [name for name in own if name not in FREE and own[name] != others.get(name)]


REQUIRED: Final = ("task", "model", "train", "output")
FREE: Final = ("backend", "parallel", "output", "train", "eval", "model", "save_every", "log_every", "until")
"""What may differ when a run goes on: where things are, not what they hold, and when something is written."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "efficient-mlm": {
        "task": "masked-lm",
        "steps": 23000,
        "batch_size": 4096,
        "max_length": 128,
        "mask_rate": 0.4,
        "mask_scheme": "always",
        "learning_rate": 2e-3,
        "schedule": "polynomial",
        "power": 1.0,
        "warmup": 0.06,
        "beta_1": 0.9,
        "beta_2": 0.98,
        "epsilon": 1e-6,
        "weight_decay": 0.01,
        "decayed": "all",
        "clip": None,
        "dropout": 0.1,
    },
}
"""Values that papers found good. `efficient-mlm`: Wettig et al. 2023, "Should You Mask 15% in Masked Language
Modeling?", as the script `run_efficient_mlm_recipe.sh` of their repository princeton-nlp/DinkyTrain has them."""

_COUNTS: Final = (
    "max_length", "epochs", "steps", "batch_size", "tokens", "eval_batch_size", "eval_every", "save_every", "log_every",
    "until", "patience", "stride",
)  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The flat keys of a YAML or TOML file.

    Raises:
        InputError: when it has another suffix, is not such a file, or no table of keys.
        ImportError: when YAML is asked for and PyYAML is not installed.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path} must be TOML: {error}") from error
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"settings must be a .yaml, .yml or .toml file, got {path}")
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "YAML needs PyYAML: pip install 'roberta_pln[train]', or write the settings as TOML"
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} must be YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values


@functools.cache
def texts() -> dict[str, str]:
    """What each key means, by its name: the texts below the fields of `Settings` and of `Recipe`."""
    return {name: text for cls in (Settings, Recipe) for name, text in _field_texts(cls).items() if name != "recipe"}


def defaults() -> dict[str, Any]:
    """The default of each key that has one."""
    fields = [item for cls in (Settings, Recipe) for item in dataclasses.fields(cls)]
    return {item.name: item.default for item in fields if item.default is not dataclasses.MISSING}


def kind(name: str) -> str:
    """The type of a key as it is annotated, without `None`."""
    annotations = {**inspect.get_annotations(Recipe), **inspect.get_annotations(Settings)}
    return str(annotations[name]).removesuffix(" | None")


def _field_texts(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[item.target.id] = " ".join(str(text).split())
    return found


def _names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
