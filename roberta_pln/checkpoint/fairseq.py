"""fairseq's checkpoints: a PyTorch pickle of a model's tensors, its settings, and the state of its training.

The settings are in `args`, a Namespace (files before 2021), or in `cfg`, a dict of dicts, of which `model` is a
Namespace where `fairseq-train` wrote the file. Only they and the model are read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from roberta_pln import names, schema
from roberta_pln.checkpoint import fairseq_dictionary, fairseq_settings, torch_pickle
from roberta_pln.checkpoint.fairseq_settings import PAD, Settings
from roberta_pln.checkpoint.stored import CheckpointError, Contents, Stored
from roberta_pln.checkpoint.torch_pickle import Entry, Tensor
from roberta_pln.config import CONFIG_FILE, RobertaPreLayerNormConfig, read_json

TYPES: Final = f"{schema.PREFIX}.embeddings.token_type_embeddings.weight"
"""The table that fairseq does not have."""

_WORDS: Final = "encoder.sentence_encoder.embed_tokens.weight"
_POSITIONS: Final = "encoder.sentence_encoder.embed_positions.weight"
_DECODER: Final = "encoder.lm_head.weight"
_VERSION: Final = "encoder.sentence_encoder.version"
_CLASSIFIERS: Final = "classification_heads."
_LM_HEAD: Final = "encoder.lm_head."
_MADE_UP: Final = "roberta_pln_zeros"
"""Key in `extra_state` of the modules that were written as zeros, only because every model of fairseq has them."""
_NO_UPDATES: Final[dict[str, Any]] = {
    "criterion_name": None,
    "optimizer_name": None,
    "lr_scheduler_state": {},
    "num_updates": 0,
}
_BEGINNING: Final = {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True, "version": 2}


# ------------------------------------------------------------------ reading


def is_layout(path: Path) -> bool:
    """Whether a file is fairseq's, and no state dict alone."""
    try:
        state, _ = torch_pickle.load(path)
    except CheckpointError:
        return False  # reading says why
    return _is_layout(state)


def _is_layout(state: object) -> bool:
    return isinstance(state, dict) and "model" in state and ("args" in state or "cfg" in state)


def read(path: Path, classification_head: str | None = None) -> Contents:
    """Open a file.

    The config is made from the settings, unless one of this architecture lies beside the file, which says more.

    Args:
        path: the file.
        classification_head: which of the classification heads to read, where there are several.

    Raises:
        CheckpointError: also when the settings are of another model, or there are several heads to choose from.
    """
    state, places = torch_pickle.load(path)
    if not _is_layout(state):
        raise CheckpointError(
            f"{path} is not fairseq's, which hold 'model' and its settings, 'args' or 'cfg'; a state dict alone is of "
            "format 'torch'"
        )
    given = torch_pickle.state_dict(path, state.get("model"))
    with _naming(path):
        model = _today(given)
        unwanted = _other_classifiers(model, classification_head)
        settings = fairseq_settings.complete(_given(state))
        if _has_no_lm_head(state, model, settings):
            unwanted += (_LM_HEAD,)
        used = {name: tensor for name, tensor in model.items() if not name.startswith(unwanted)}
        head = _head(used)
        fairseq_settings.check(settings, head)
    tensors = torch_pickle.stored(path, used, places)
    with _naming(path):
        config = None if _has_config(path) else _config(path, settings, tensors, head)
    left_out = [name for name in model if name not in used]
    left_out += ["last_optimizer_state"] * (state.get("last_optimizer_state") is not None)
    return Contents("fairseq", tensors, config=config, left_out=tuple(left_out), zeros=(TYPES,))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _given(state: dict[str, Any]) -> dict[str, Any]:
    """What a file says of the model, its task and its loss; `args` wins, as in fairseq."""
    args, cfg = state.get("args"), state.get("cfg")
    topics = [args]
    if args is None and isinstance(cfg, dict):
        topics = [cfg.get(topic) for topic in ("criterion", "task", "model")]
    return {setting: value for topic in topics if isinstance(topic, dict) for setting, value in topic.items()}


def _today(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that fairseq has today; query, key and value are parts of one that held all three."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.items():
        parts = names.fairseq_today(name)
        for part, piece in zip(parts, tensor.split(len(parts)) if len(parts) > 1 else [tensor], strict=True):
            if part in found:
                raise CheckpointError(f"it holds {part} twice, once as {name!r}")
            found[part] = piece
    return found


def _other_classifiers(model: Iterable[str], wanted: str | None) -> tuple[str, ...]:
    """How the names of the classification heads start that are not to be read."""
    heads = list(dict.fromkeys(name.split(".")[1] for name in model if name.startswith(_CLASSIFIERS)))
    if wanted is None and len(heads) > 1:
        raise CheckpointError(
            f"it holds several classification heads, {', '.join(heads)}: choose one, as "
            f"checkpoint.open(path, classification_head={heads[0]!r}) does, from which any model can be loaded"
        )
    if wanted is not None and wanted not in heads:
        raise CheckpointError(f"it holds no classification head {wanted!r}, but {', '.join(heads) or 'none'}")
    return tuple(f"{_CLASSIFIERS}{head}." for head in heads if wanted not in (None, head))


def _has_no_lm_head(state: dict[str, Any], model: Iterable[str], settings: Settings) -> bool:
    """Whether the language-model head is made up, or another than ours and, beside a classifier, not needed."""
    extra = state.get("extra_state")
    made_up = extra.get(_MADE_UP) if isinstance(extra, dict) else None
    classifies = any(name.startswith(_CLASSIFIERS) for name in model)
    return made_up == [_LM_HEAD] or (classifies and settings["activation_fn"] != "gelu")


def _head(model: Iterable[str]) -> str:
    """What the model was trained for last; the language-model head stays in a file when a classifier is trained."""
    if any(name.startswith(_CLASSIFIERS) for name in model):
        return "ForSequenceClassification"
    return "ForMaskedLM" if any(name.startswith(_LM_HEAD) for name in model) else "Model"


def _has_config(path: Path) -> bool:
    """Whether a config of this architecture is beside the file."""
    beside = path.with_name(CONFIG_FILE)
    return beside.is_file() and read_json(beside).get("model_type") == RobertaPreLayerNormConfig.model_type


def _config(path: Path, settings: Settings, tensors: Mapping[str, Stored], head: str) -> RobertaPreLayerNormConfig:
    """The config that the settings make, with the sizes of the tables and the classes of the classifier."""
    words, positions = _rows(tensors, _WORDS), _rows(tensors, _POSITIONS)
    longest = positions - PAD - 1
    if settings.get("max_positions", longest) != longest:
        raise CheckpointError(
            f"its table of positions has {positions} rows, which makes max_positions {longest}, but its settings have "
            + fairseq_settings.shown(settings["max_positions"])
        )
    sizes: dict[str, Any] = {"vocab_size": words, "max_position_embeddings": positions}
    if head == "ForSequenceClassification":
        classifier = next(name for name in tensors if name.startswith(_CLASSIFIERS)).split(".")[1]
        count = _rows(tensors, f"{_CLASSIFIERS}{classifier}.out_proj.weight")
        labels = None if settings.get("regression_target") is True else fairseq_dictionary.labels(path.parent, count)
        sizes |= {"num_labels": count} if labels is None else {"id2label": dict(enumerate(labels))}
    return fairseq_settings.config(settings, head, dtype=tensors[_WORDS].dtype.name, **sizes)


def _rows(tensors: Mapping[str, Stored], name: str) -> int:
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"it lacks {name}, or that is no matrix")
    return tensors[name].shape[0]


# ------------------------------------------------------------------ writing


def write(
    path: Path,
    tensors: Mapping[str, Stored],
    ties: Mapping[str, str],
    head: str,
    shard: bool = False,
    settings: Settings | None = None,
) -> None:
    """Write what fairseq's `load_model_ensemble_and_task` takes: as after training, but without an optimizer's state.

    A language-model head, which every model of fairseq has, is written as zeros where there is none.

    Args:
        path: the file.
        tensors: canonical names to tensors.
        ties: second names to canonical names of tied tensors.
        head: one of `schema.HEADS`.
        shard: not used, fairseq's files are whole.
        settings: from `fairseq_settings.settings`.

    Raises:
        CheckpointError: when the model has token types that make a difference.
    """
    if np.any(tensors[TYPES].read()):
        raise CheckpointError(
            f"fairseq cannot hold this model:\n  {TYPES} is not zero, and it has no token types. If there is one type, "
            "adding its row to every row of the table of positions, and setting it to zero, makes the same sums"
        )
    held = {names.stored("fairseq", name, head).name: tensor for name, tensor in tensors.items() if name != TYPES}
    made_up = {} if head in schema.LM_HEADS else _zero_lm_head(held[_WORDS])
    held |= made_up | {_VERSION: _filled((1,), held[_WORDS].dtype, 3.0)}
    entries = OrderedDict((name, Entry(str(index), tensor)) for index, (name, tensor) in enumerate(held.items()))
    entries.setdefault(_DECODER, entries[_WORDS])
    state = {
        "args": None,
        "cfg": settings,
        "model": entries,
        "criterion": None,
        "optimizer_history": [_NO_UPDATES],
        "task_state": {},
        "extra_state": {"train_iterator": _BEGINNING, "val_loss": None, _MADE_UP: [_LM_HEAD] * bool(made_up)},
        "last_optimizer_state": None,
    }
    torch_pickle.write_object(path, state)


def _zero_lm_head(words: Stored) -> dict[str, Stored]:
    vocabulary, width = words.shape
    shapes = {
        "dense.weight": (width, width),
        "dense.bias": (width,),
        "layer_norm.weight": (width,),
        "layer_norm.bias": (width,),
        "bias": (vocabulary,),
    }
    return {_LM_HEAD + name: _filled(shape, words.dtype, 0.0) for name, shape in shapes.items()}


def _filled(shape: tuple[int, ...], dtype: np.dtype[Any], value: float) -> Stored:
    return Stored(shape, dtype, partial(np.full, shape, value, dtype))


def index_keys(tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> dict[str, str]:
    """Files are whole, so that no index names them."""
    return {}
