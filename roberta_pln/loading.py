"""From a checkpoint to the parameters of one head: the rules of strict loading, the same for every backend."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import Checkpoint, CheckpointError, hub
from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.stored import DTYPES
from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.generation import GENERATION_CONFIG_FILE, GenerationConfig
from roberta_pln.schema import Parameter

POOLER: Final = f"{schema.PREFIX}.pooler"
FAMILIES: Final = (
    POOLER,
    *dict.fromkeys(row.name.split(".")[0] for row in schema.MODULES if not row.name.startswith(schema.PREFIX)),
)
"""Module paths that a checkpoint may lack as a whole, or have for another head: the pooler, `lm_head`, ..."""

_OVERRIDABLE: Final = {field.name for field in fields(RobertaPreLayerNormConfig)} - {"extra", "dtype"} | {"num_labels"}


class LoadError(CheckpointError):
    """A checkpoint whose tensors are not those of the model."""


@dataclass(frozen=True)
class LoadingInfo:
    """What a checkpoint and a model do not share.

    Attributes:
        missing_keys: parameters that the checkpoint lacks, newly initialised.
        unexpected_keys: tensors of the checkpoint that the model has no use for.
        mismatched_keys: (name, shape found, shape expected) of parameters newly initialised for their shape.
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    def to_dict(self) -> dict[str, list[Any]]:
        """The three fields as lists, as transformers' `output_loading_info` gives them."""
        return {
            "missing_keys": list(self.missing_keys),
            "unexpected_keys": list(self.unexpected_keys),
            "mismatched_keys": list(self.mismatched_keys),
        }


@dataclass(frozen=True)
class Loading:
    """A checkpoint that was found good for a head; nothing but headers has been read yet.

    Attributes:
        config: the model's config, with every override; its `dtype` is the one of the parameters.
        checkpoint: where the tensors come from.
        head: one of `schema.HEADS`.
        parameters: what the model has, from `schema.expand`.
        info: which of them are newly initialised, and which tensors are left over.
        dtype: the type of the parameters, one of `config.DTYPES`.
    """

    config: RobertaPreLayerNormConfig
    checkpoint: Checkpoint
    head: str
    parameters: Mapping[str, Parameter]
    info: LoadingInfo
    dtype: str

    @property
    def constructor(self) -> dict[str, Any]:
        """Keywords that the model's class needs beside the config."""
        pooled = any(name.startswith(POOLER) for name in self.parameters)
        return {"add_pooling_layer": pooled} if self.head == "Model" else {}

    @property
    def generation_config(self) -> GenerationConfig | None:
        """From `generation_config.json` beside the weights, else from the config; None for a head without `generate`.

        Raises:
            ConfigError: when the file breaks a rule.
        """
        if self.head != "ForCausalLM":
            return None
        if (file := self.checkpoint.path.with_name(GENERATION_CONFIG_FILE)).is_file():
            return GenerationConfig.from_pretrained(file)
        return GenerationConfig.from_model_config(self.config)

    def fresh(self) -> list[Parameter]:
        """The parameters that are newly initialised."""
        new = {*self.info.missing_keys, *(name for name, _, _ in self.info.mismatched_keys)}
        return [parameter for name, parameter in self.parameters.items() if name in new]

    def tensors(self, mapped: bool = False) -> Iterator[tuple[Parameter, Array]]:
        """Every parameter that the checkpoint has, one at a time, cast to `dtype`.

        Args:
            mapped: whether tensors may be parts of the file that is mapped into memory; see `Checkpoint.mapped`.
        """
        fresh = {parameter.name for parameter in self.fresh()}
        read = self.checkpoint.mapped if mapped else self.checkpoint.__getitem__
        for name, parameter in self.parameters.items():
            if name not in fresh:
                yield parameter, read(name).astype(DTYPES[self.dtype], copy=False)


def prepare(
    path: str | os.PathLike[str] | Checkpoint,
    head: str,
    *,
    config: RobertaPreLayerNormConfig | str | os.PathLike[str] | None = None,
    dtype: Any = None,
    format: str | None = None,
    add_pooling_layer: bool = True,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    **options: Any,
) -> Loading:
    """Find a checkpoint and check all of it against one head, before anything is read or built.

    Args:
        path: a directory, a weight file, a hub id, or an opened checkpoint.
        head: one of `schema.HEADS`.
        config: used instead of the one beside the weights; or where that is, see its `from_pretrained`.
        dtype: the type of the parameters: a name from `config.DTYPES` or a framework's object for it; None means
            float32, "auto" the type of the checkpoint.
        format: the one to read where a directory holds several.
        add_pooling_layer: `False` leaves the base model's pooler out; other heads have no such choice.
        ignore_mismatched_sizes: parameters of another shape are newly initialised.
        strict: `False` newly initialises whatever is missing or mis-shaped, and leaves out whatever is unexpected;
            the warning names all of it.
        **options: the hub's keywords (`hub.OPTIONS`), and config fields to override.

    Raises:
        LoadError: naming every tensor that is missing, unexpected or mis-shaped. Heads (and the pooler) are the
            exception: one that the checkpoint lacks as a whole is newly initialised with a warning, and one that
            only the checkpoint has is left out. When nothing of the base model matches, whatever is allowed.
        TypeError: when a keyword is neither a hub option nor a config field, nor one of transformers that changes
            nothing here (see `keywords`).
        ValueError: when `dtype` is none of `config.DTYPES`.
    """
    schema.check_head(head)
    if head != "Model" and not add_pooling_layer:
        raise TypeError(f"add_pooling_layer is for the base model; {schema.architecture(head)} has what it needs")
    wanted = None if dtype is None or dtype == "auto" else dtype_name(dtype)
    hub_options = {name: options.pop(name) for name in hub.OPTIONS if name in options}
    unknown = sorted(set(options) - _OVERRIDABLE)
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: neither an option of the hub nor a field of the config")
    if config is not None and not isinstance(config, RobertaPreLayerNormConfig):
        config = RobertaPreLayerNormConfig.from_pretrained(config, **hub_options)
    if isinstance(path, Checkpoint):
        opened = path
    else:
        opened = checkpoint.open(hub.find_checkpoint(path, **hub_options), config, format)
    config = _config(opened, config, options)
    if config != opened.config:  # whether the decoder is tied depends on it
        opened = opened.with_config(config)

    parameters = schema.expand(config, head, add_pooling_layer)
    info = _compare(opened, parameters)
    problems = _problems(info, parameters, ignore_mismatched_sizes, strict)
    if not any(name.startswith(f"{schema.PREFIX}.") for name in _matching(parameters, info)):
        problems.insert(0, "no tensor of the base model matches")
    if problems:
        raise LoadError(_message(opened, head, problems))
    _warn(opened, head, info)
    if wanted is None:
        wanted = "float32" if dtype is None else _own_dtype(opened, config)
    return Loading(config.replace(dtype=wanted), opened, head, parameters, info, wanted)


def dtype_name(dtype: Any) -> str:
    """The name in `config.DTYPES` of a string, a NumPy, PyTorch, TensorFlow or JAX type.

    Raises:
        ValueError: when it is none of them.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", str(dtype))
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return name


def _own_dtype(opened: Checkpoint, config: RobertaPreLayerNormConfig) -> str:
    return dtype_name(config.dtype or opened.dtype(next(iter(opened))).name)


def _config(
    opened: Checkpoint, config: RobertaPreLayerNormConfig | None, overrides: Mapping[str, Any]
) -> RobertaPreLayerNormConfig:
    config = config or opened.needed_config()
    return config.replace(**overrides) if overrides else config


def _compare(opened: Checkpoint, parameters: Mapping[str, Parameter]) -> LoadingInfo:
    shapes = {name: opened.shape(name) for name in opened}
    return LoadingInfo(
        missing_keys=tuple(name for name in parameters if name not in shapes),
        unexpected_keys=(*(name for name in shapes if name not in parameters), *opened.foreign),
        mismatched_keys=tuple(
            (name, shapes[name], parameter.shape)
            for name, parameter in parameters.items()
            if name in shapes and shapes[name] != parameter.shape
        ),
    )


def _matching(parameters: Mapping[str, Parameter], info: LoadingInfo) -> set[str]:
    return set(parameters) - set(info.missing_keys) - {name for name, _, _ in info.mismatched_keys}


def _problems(
    info: LoadingInfo, parameters: Mapping[str, Parameter], ignore_mismatched_sizes: bool, strict: bool
) -> list[str]:
    """What the rules of strict loading do not allow, one line each."""
    problems = []
    if strict:
        partial = {_family(name) for name in parameters if name not in info.missing_keys}
        problems += [f"missing: {name}" for name in info.missing_keys if _family(name) in {None, *partial}]
        problems += [f"unexpected: {name}" for name in info.unexpected_keys if _family(name) is None]
    if strict and not ignore_mismatched_sizes:
        problems += [
            f"shape of {name}: {found} in the checkpoint, {expected} in the config"
            for name, found, expected in info.mismatched_keys
        ]
    return problems


def _family(name: str) -> str | None:
    """The entry of `FAMILIES` that a canonical name belongs to; None for the base model and for foreign names."""
    return next((family for family in FAMILIES if name.startswith(f"{family}.")), None)


def _message(opened: Checkpoint, head: str, problems: list[str]) -> str:
    return (
        f"the config and the weights of {opened.path} disagree about {schema.architecture(head)}:\n  "
        + "\n  ".join(problems)
        + "\nCorrect the config (sizes, num_hidden_layers, num_labels, tie_word_embeddings, ...) or the file. "
        "ignore_mismatched_sizes=True newly initialises parameters of another shape; strict=False also missing ones, "
        "and leaves unexpected tensors out"
    )


def _warn(opened: Checkpoint, head: str, info: LoadingInfo) -> None:
    """Name everything that is random, and every tensor left out that no head of ours explains."""
    new = [*info.missing_keys, *(f"{name} ({found} -> {expected})" for name, found, expected in info.mismatched_keys)]
    unused = [name for name in info.unexpected_keys if _family(name) is None]
    texts = []
    if new:
        texts.append(f"newly initialised: {', '.join(new)}; train the model before using it")
    if unused:
        texts.append(f"not used: {', '.join(unused)}")
    if texts:
        warnings.warn(
            f"{schema.architecture(head)} from {opened.path}: {'. '.join(texts)}", stacklevel=4
        )  # whoever called from_pretrained
