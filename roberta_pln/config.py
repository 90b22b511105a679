"""The configuration that all three backends share, and its `config.json`."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from roberta_pln import numerics

CONFIG_FILE = "config.json"
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
DTYPES = ("float64", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A configuration that describes no model, or a `config.json` that cannot be read."""


@dataclass(init=False, eq=True)
class RobertaPreLayerNormConfig:
    """Sizes and switches of one RoBERTa-PreLayerNorm model.

    The first eighteen fields may be given by position. Every other keyword becomes a field if it is named here, and
    is kept in `extra` otherwise: it can be read as an attribute and is written back to `config.json` unchanged.

    Raises:
        ConfigError: when the values describe no model. A config may be edited after construction; the model's
            constructor checks it again.
    """

    model_type = "roberta-prelayernorm"

    vocab_size: int = 50265
    """Rows of the word embedding table."""
    hidden_size: int = 768
    """Width of the residual stream; a multiple of `num_attention_heads`."""
    num_hidden_layers: int = 12
    """Number of pre-norm layers; zero is allowed."""
    num_attention_heads: int = 12
    """Heads of every attention."""
    intermediate_size: int = 3072
    """Width of the feed-forward block."""
    hidden_act: str | Callable[[Any], Any] = "gelu"
    """Activation of the feed-forward block: a name from `numerics.ACTIVATIONS` (`gelu` is the exact, erf form), or a
    function of one tensor of the backend in use that keeps the shape. A config with a function cannot be saved."""
    hidden_dropout_prob: float = 0.1
    """Dropout rate on the embeddings and on every residual branch, in [0, 1]."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout rate on the attention probabilities, in [0, 1]."""
    max_position_embeddings: int = 512
    """Rows of the position table. Positions count from `pad_token_id + 1`, so the longest sequence is
    `max_position_embeddings - pad_token_id - 1` tokens."""
    type_vocab_size: int = 2
    """Rows of the token type table."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""
    layer_norm_eps: float = 1e-12
    """Added to the variance inside every LayerNorm. Checkpoints trained with fairseq need 1e-5."""
    pad_token_id: int = 1
    """Id of the padding token; positions are counted over all other tokens."""
    bos_token_id: int | None = 0
    """Id that starts a sequence."""
    eos_token_id: int | list[int] | None = 2
    """Id (or ids) that end a sequence."""
    position_embedding_type: str = "absolute"
    """One of `absolute`, `relative_key`, `relative_key_query`."""
    use_cache: bool = True
    """Whether a decoder returns its keys and values."""
    classifier_dropout: float | None = None
    """Dropout rate of the classification heads, in [0, 1]; `None` means `hidden_dropout_prob`."""

    is_decoder: bool = False
    """Causal attention, with a cache."""
    add_cross_attention: bool = False
    """Layers also attend to an encoder's states; needs `is_decoder`."""
    tie_word_embeddings: bool = True
    """The language-model head's decoder shares the word embedding table."""
    chunk_size_feed_forward: int = 0
    """Tokens per slice of the feed-forward block; 0 runs it whole."""
    pruned_heads: dict[int, list[int]] = field(default_factory=dict)
    """Attention heads removed, by layer, in the original numbering."""
    output_attentions: bool = False
    """Return attention probabilities unless the call says otherwise."""
    output_hidden_states: bool = False
    """Return every hidden state unless the call says otherwise."""
    return_dict: bool = True
    """Return a record; `False` returns a plain tuple."""
    problem_type: str | None = None
    """`regression`, `single_label_classification`, `multi_label_classification`, or `None` to infer it from labels."""
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    """Class names of the classification heads."""
    label2id: dict[str, int] = field(default_factory=lambda: {"LABEL_0": 0, "LABEL_1": 1})
    """The inverse of `id2label`."""
    dtype: str | None = None
    """Floating-point type of the saved weights, such as `float32`."""
    architectures: list[str] | None = None
    """Class names that the checkpoint was saved from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys that this library does not read, kept for the round trip."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(_POSITIONAL):
            raise TypeError(f"at most {len(_POSITIONAL)} positional arguments are taken, {len(args)} were given")
        for name, value in zip(_POSITIONAL, args, strict=False):
            if name in kwargs:
                raise TypeError(f"argument {name!r} was given twice")
            kwargs[name] = value
        kwargs.pop("model_type", None)
        _check_containers(kwargs)
        if "torch_dtype" in kwargs:  # the name that this key had before transformers 4.56
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        num_labels = kwargs.pop("num_labels", None)
        names = kwargs.get("id2label")
        if num_labels is not None and names is not None and len(names) != num_labels:
            raise ConfigError(f"num_labels is {num_labels}, but id2label has {len(names)} names: give one of the two")
        extra = dict(kwargs.pop("extra", {}))
        for item in fields(self):
            if item.name != "extra":
                setattr(self, item.name, kwargs.pop(item.name) if item.name in kwargs else _default(item))
        self.extra = {**extra, **kwargs}

        self.id2label = {int(key): label for key, label in self.id2label.items()}
        self.pruned_heads = {int(key): sorted(set(heads)) for key, heads in self.pruned_heads.items()}
        if num_labels is not None and num_labels != len(self.id2label):
            self.num_labels = num_labels
        elif self.label2id == {"LABEL_0": 0, "LABEL_1": 1}:
            self.label2id = {label: key for key, label in self.id2label.items()}
        if self.dtype is not None:
            self.dtype = str(self.dtype).removeprefix("torch.")
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """What is no field becomes a further key of the `config.json`."""
        known = name in self.__dataclass_fields__ or isinstance(getattr(type(self), name, None), property)
        if known or "extra" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            self.extra[name] = value

    def __getattr__(self, name: str) -> Any:
        """Unknown keys of a `config.json` read like fields."""
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    @property
    def num_labels(self) -> int:
        """Number of classes of the classification heads, which is the length of `id2label`."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {index: f"LABEL_{index}" for index in range(count)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def activated_size(self) -> int:
        """Width of the feed-forward block behind its activation, half of it for `glu`."""
        return self.intermediate_size // 2 if self.hidden_act == "glu" else self.intermediate_size

    def kept_heads(self, layer: int) -> list[int]:
        """The heads that a layer's self-attention has, in the original numbering; pruning leaves gaps."""
        pruned = self.pruned_heads.get(layer, [])
        return [head for head in range(self.num_attention_heads) if head not in pruned]

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence that the position table can number."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def use_return_dict(self) -> bool:
        """`return_dict`, by the name that transformers' models read."""
        return self.return_dict

    def update(self, changes: Mapping[str, Any]) -> None:
        """Set several fields, and check the whole; nothing is set when it fails."""
        vars(self).update(vars(self.replace(**changes)))

    def validate(self) -> None:
        """Check that the values describe a model.

        Raises:
            ConfigError: naming every rule that is broken, the values seen and the remedy.
        """
        problems = [text for text in _problems(self) if text]
        if problems:
            raise ConfigError("invalid config: " + "; ".join(problems))

    def replace(self, **changes: Any) -> RobertaPreLayerNormConfig:
        """A copy with some fields changed, checked again."""
        return type(self).from_dict(self._values(), **changes)

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: the eighteen positional keys, and every other key that is not the default.

        Raises:
            ConfigError: when `hidden_act` is a function, which no file can hold.
        """
        if callable(self.hidden_act):
            raise ConfigError(
                f"hidden_act must be a name for the config to be written, got {self.hidden_act!r}: set it to the one "
                f"of {', '.join(numerics.ACTIVATIONS)} that computes the same, or give the function again after loading"
            )
        default = type(self)()
        values = {
            name: value
            for name, value in self._values().items()
            if name in _POSITIONAL or name in self.extra or value != getattr(default, name)
        }
        return {**copy.deepcopy(values), "model_type": self.model_type}

    def to_json_string(self) -> str:
        """`config.json` as text: sorted keys, two spaces of indent, a final newline."""
        return json.dumps(_with_string_keys(self.to_dict()), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> RobertaPreLayerNormConfig:
        """Build a config from the content of a `config.json`, `overrides` winning.

        Raises:
            ConfigError: when the values describe no model, or a model of another architecture.
        """
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ConfigError(
                f"model_type must be {cls.model_type!r}, got {model_type!r}: this config describes another "
                f"architecture. If the weights are RoBERTa-PreLayerNorm, set model_type to {cls.model_type!r}"
            )
        kept = dict(values)
        if "id2label" in overrides:
            kept.pop("label2id", None)  # the inverse of other names
        elif "num_labels" in overrides and overrides["num_labels"] != len(kept.get("id2label", ())):
            kept = {name: value for name, value in kept.items() if name not in ("id2label", "label2id")}
        return cls(**{**kept, **overrides})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> RobertaPreLayerNormConfig:
        """Read one `config.json`.

        Raises:
            FileNotFoundError: when there is no such file.
            ConfigError: when it is no JSON object or describes no model.
        """
        return cls.from_json_values(path, read_json(path), **overrides)

    @classmethod
    def from_json_values(
        cls, path: str | os.PathLike[str], values: Mapping[str, Any], **overrides: Any
    ) -> RobertaPreLayerNormConfig:
        """`from_dict`, with errors that name the file that the values are from."""
        try:
            return cls.from_dict(values, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> RobertaPreLayerNormConfig:
        """Read the config of a checkpoint: a directory, a `config.json`, or a hub id.

        The hub's keywords (`revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, `subfolder`) are
        used for the lookup; every other keyword overrides a field.
        """
        from roberta_pln.checkpoint import hub

        options = {name: kwargs.pop(name) for name in hub.OPTIONS if name in kwargs}
        return cls.from_json_file(hub.find_config(path, **options), **kwargs)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into a directory, made if it is not there."""
        from roberta_pln.checkpoint import atomic

        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic.writing(Path(directory) / CONFIG_FILE) as file:
            file.write(self.to_json_string().encode("utf-8"))

    def _values(self) -> dict[str, Any]:
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        return {**own, **self.extra}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: when it holds something else.
    """
    with Path(path).open("rb") as file:
        return parse_json(path, file.read(_MOST_JSON + 1))


def parse_json(source: object, data: bytes) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        ConfigError: when they are something else; it names their source.
    """
    if len(data) > _MOST_JSON:
        raise ConfigError(f"{source} has more than {_MOST_JSON:,} bytes, which no config or index needs")
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # also what is no text, or nested too deeply
        raise ConfigError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold a JSON object, got {type(values).__name__}")
    return values


def refuse_activation(value: Any) -> NoReturn:
    """Refuse a layer as `hidden_act`.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "hidden_act must be a function without weights of its own, since no checkpoint would hold them, got "
        f"{value!r}; the activations that learn are 'prelu' and 'xielu', by name"
    )


def _check_containers(values: Mapping[str, Any]) -> None:
    """Refuse what the constructor could not go through."""
    names, ids, pruned = (values.get(name, {}) for name in ("id2label", "label2id", "pruned_heads"))
    problems = []
    if not isinstance(names, Mapping) or not all(_is_index(key) and isinstance(names[key], str) for key in names):
        problems.append(f"id2label must map whole numbers to names, got {names!r}")
    if not isinstance(ids, Mapping):
        problems.append(f"label2id must map names to whole numbers, got {ids!r}")
    if not isinstance(pruned, Mapping) or not all(_is_index(key) and _are_heads(pruned[key]) for key in pruned):
        problems.append(f"pruned_heads must map numbers of layers to lists of numbers of heads, got {pruned!r}")
    if not isinstance(values.get("extra", {}), Mapping):
        problems.append(f"extra must map keys to values, got {values['extra']!r}")
    classes = values.get("architectures") or []
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        problems.append(f"architectures must be a list of names, got {classes!r}")
    count = values.get("num_labels")
    if count is not None and not (type(count) is int and 0 <= count <= _MOST_LABELS):
        problems.append(f"num_labels must be an integer from 0 to {_MOST_LABELS}, got {count!r}")
    if problems:
        raise ConfigError("invalid config: " + "; ".join(problems))


def _is_index(key: object) -> bool:
    """Whether a key is a whole number; JSON has only text."""
    return isinstance(key, int) or (isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) is not None)


def _are_heads(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset | range) and all(isinstance(head, int) for head in value)


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _with_string_keys(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has string keys only; sorting needs them before `json.dumps` makes them."""
    return {
        key: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _problems(config: RobertaPreLayerNormConfig) -> list[str]:
    return [
        *(_size(config, name, 1) for name in _POSITIVE),
        *(_size(config, name, 0) for name in _NON_NEGATIVE),
        *(_rate(config, name) for name in _RATES),
        *(_choice(config, name, allowed) for name, allowed in _CHOICES.items()),
        *(_number(config, name) for name in _NUMBERS),
        *(_flag(config, name) for name in _FLAGS),
        _activation(config),
        _heads(config),
        _positions(config),
        _cross_attention(config),
        _pruned(config),
    ]


def _size(config: RobertaPreLayerNormConfig, name: str, least: int) -> str:
    value = getattr(config, name)
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return "" if good else f"{name} must be an integer of at least {least}, got {value!r}"


def _rate(config: RobertaPreLayerNormConfig, name: str) -> str:
    value = getattr(config, name)
    if name == "classifier_dropout" and value is None:
        return ""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return "" if good else f"{name} must be a number in [0, 1], got {value!r}"


def _number(config: RobertaPreLayerNormConfig, name: str) -> str:
    value = getattr(config, name)
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return "" if good else f"{name} must be a number of at least 0, got {value!r}"


def _flag(config: RobertaPreLayerNormConfig, name: str) -> str:
    value = getattr(config, name)
    return "" if isinstance(value, bool) else f"{name} must be true or false, got {value!r}"


def _choice(config: RobertaPreLayerNormConfig, name: str, allowed: tuple[str | None, ...]) -> str:
    value = getattr(config, name)
    if value in allowed:
        return ""
    return f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}"


def _activation(config: RobertaPreLayerNormConfig) -> str:
    value = config.hidden_act
    known = isinstance(value, str) and value in numerics.ACTIVATIONS
    if isinstance(value, type) or not (known or callable(value)):
        names = ", ".join(numerics.ACTIVATIONS)
        return f"hidden_act must be one of {names}, or a function of one tensor, got {value!r}"
    if value == "glu" and not _size(config, "intermediate_size", 1) and config.intermediate_size % 2:
        return f"intermediate_size must be even for hidden_act 'glu', which halves it, got {config.intermediate_size}"
    return ""


def _heads(config: RobertaPreLayerNormConfig) -> str:
    if _size(config, "hidden_size", 1) or _size(config, "num_attention_heads", 1):
        return ""  # already reported
    if config.hidden_size % config.num_attention_heads == 0:
        return ""
    return (
        f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention heads "
        f"({config.num_attention_heads})"
    )


def _positions(config: RobertaPreLayerNormConfig) -> str:
    if any(_size(config, name, 0) for name in ("pad_token_id", "max_position_embeddings", "vocab_size")):
        return ""  # already reported
    if config.pad_token_id >= config.vocab_size:
        return f"pad_token_id must be below vocab_size ({config.vocab_size}), got {config.pad_token_id}"
    if config.max_sequence_length < 1:
        return (
            f"max_position_embeddings must be at least pad_token_id + 2 ({config.pad_token_id + 2}), since positions "
            f"count from pad_token_id + 1, got {config.max_position_embeddings}"
        )
    return ""


def _cross_attention(config: RobertaPreLayerNormConfig) -> str:
    if config.add_cross_attention and not config.is_decoder:
        return "the model should be used as a decoder model if cross attention is added: set is_decoder=True as well"
    return ""


def _pruned(config: RobertaPreLayerNormConfig) -> str:
    for layer, heads in config.pruned_heads.items():
        if layer not in range(config.num_hidden_layers):
            return f"pruned_heads names layer {layer}, but layers are 0 to {config.num_hidden_layers - 1}"
        if not all(head in range(config.num_attention_heads) for head in heads):
            return f"pruned_heads[{layer}] must hold heads from 0 to {config.num_attention_heads - 1}, got {heads}"
        if len(heads) == config.num_attention_heads:
            return f"pruned_heads[{layer}] removes all {len(heads)} heads; at least one must stay"
    return ""


_POSITIONAL = tuple(item.name for item in fields(RobertaPreLayerNormConfig))[:18]
_POSITIVE = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "type_vocab_size")
_NON_NEGATIVE = ("num_hidden_layers", "max_position_embeddings", "pad_token_id", "chunk_size_feed_forward")
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_NUMBERS = ("initializer_range", "layer_norm_eps")
_FLAGS = ("is_decoder", "add_cross_attention", "tie_word_embeddings")
_MOST_JSON = 2**24
_MOST_LABELS = 2**20
"""More would take a gigabyte for their names alone, which one number in a file can ask for; id2label may be longer."""
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "position_embedding_type": POSITION_EMBEDDING_TYPES,
    "problem_type": PROBLEM_TYPES,
}

# What help() and editors show instead of (*args, **kwargs).
RobertaPreLayerNormConfig.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            item.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if item.name in _POSITIONAL else inspect.Parameter.KEYWORD_ONLY,
            default=_default(item),
            annotation=item.type,
        )
        for item in fields(RobertaPreLayerNormConfig)
        if item.name != "extra"
    ]
    + [inspect.Parameter("extra", inspect.Parameter.VAR_KEYWORD)]
)
