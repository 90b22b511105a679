"""From a weight file to canonical names: which stored tensor is which parameter, and of which model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from roberta_pln import names, schema
from roberta_pln.checkpoint import atomic, fairseq, formats, shards
from roberta_pln.checkpoint.memory import Array
from roberta_pln.checkpoint.stored import DTYPES, CheckpointError, Contents, Stored
from roberta_pln.config import CONFIG_FILE, RobertaPreLayerNormConfig, read_json


class _Source(NamedTuple):
    """One stored tensor that holds a canonical one."""

    stored_name: str
    tensor: Stored


class Checkpoint(Mapping[str, Array]):
    """Canonical names to tensors in canonical (PyTorch's) orientation, C-contiguous, one read at each access.

    Attributes:
        path: the weight file.
        format: one of `FORMATS`.
        config: from `config.json` beside the file, or as given; None when there is none.
        head: one of `schema.HEADS`: from the config's `architectures`, else from the modules that are there.
        dropped: stored names that are left out: second names of tied tensors, buffers, repeated copies, the state of
            training.
        foreign: stored names that no rule knows.
        classification_head: the one that was asked for, in a file of fairseq.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        config: RobertaPreLayerNormConfig | None,
        sources: Mapping[str, list[_Source]],
        dropped: tuple[str, ...],
        foreign: tuple[str, ...],
        classification_head: str | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.config = config
        self.dropped = dropped
        self.foreign = foreign
        self.classification_head = classification_head
        self._sources = sources
        self.head = (schema.head_of(config.architectures) if config else None) or _infer_head(sources, config)

    def __getitem__(self, name: str) -> Array:
        """Read one tensor into memory of its own.

        Warns when the file holds the tensor under two names with different values.
        """
        return self._checked(name, self._sources[name][0].tensor.read())

    def mapped(self, name: str) -> Array:
        """One tensor as a part of the file that is mapped into memory where the format allows that, read otherwise.

        Writing to the array changes memory only. A file that is cut short while its parts are in use stops the
        process; `save` never does that, since it puts new files in the place of old ones.
        """
        tensor = self._sources[name][0].tensor
        return self._checked(name, tensor.read() if tensor.map is None else tensor.map())

    def _checked(self, name: str, array: Array) -> Array:
        first, *others = self._sources[name]
        for other in others:
            if first.tensor.identity is None or first.tensor.identity != other.tensor.identity:
                self._compare(name, array, first, other)
        return array

    def _compare(self, name: str, array: Array, first: _Source, other: _Source) -> None:
        if not np.array_equal(_bits(array), _bits(other.tensor.read())):
            warnings.warn(
                f"{self.path} holds {name} twice with different values, as {first.stored_name!r} and "
                f"{other.stored_name!r}; the first is used. If the decoder was trained apart from the word table, "
                "set tie_word_embeddings=False in the config",
                stacklevel=3,
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.format}, {self.head}, {len(self)} tensors>"

    def shape(self, name: str) -> tuple[int, ...]:
        """Canonical shape, without reading the tensor."""
        return self._sources[name][0].tensor.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type on disk, without reading the tensor; `ml_dtypes.bfloat16` for bfloat16."""
        return self._sources[name][0].tensor.dtype

    def needed_config(self) -> RobertaPreLayerNormConfig:
        """The config.

        Raises:
            CheckpointError: when there is none; it says what the shapes tell of it, and what they do not.
        """
        if self.config is not None:
            return self.config
        told = ", ".join(f"{name}={value}" for name, value in _told_by_shapes(self).items())
        raise CheckpointError(
            f"there is no config.json beside {self.path}: put it there, or give config=. The tensors tell {told}; "
            f"they do not tell num_attention_heads, layer_norm_eps, pad_token_id and hidden_act, of which a wrong one "
            f"gives wrong numbers"
        )

    def stored(self, name: str) -> Stored:
        """The tensor's shape, type and reader in one, as writers take them."""
        return Stored(self.shape(name), self.dtype(name), partial(self.__getitem__, name))

    def with_config(self, config: RobertaPreLayerNormConfig) -> Checkpoint:
        """The same file with another config, on which depends whether the decoder is tied."""
        return open(self.path, config, self.format, self.classification_head)


def open(
    path: str | os.PathLike[str],
    config: RobertaPreLayerNormConfig | None = None,
    format: str | None = None,
    classification_head: str | None = None,
) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    A save into the directory that was interrupted after all was written is finished first.

    Args:
        path: a directory, searched for the files of `FORMATS` in this order, one weight file, or an index of shards.
        config: used instead of the `config.json` beside the weights.
        format: the one to read where a directory holds several, or the ending of a file does not tell.
        classification_head: which one to read from a file of fairseq, which may hold several, each with a name.

    Raises:
        FileNotFoundError: when there is no such path, or no weight file in the directory.
        CheckpointError: when the file is cut short, no checkpoint, or one of another architecture.
        ConfigError: when the `config.json` describes no model of this architecture.
    """
    path = Path(path)
    if path.is_dir():
        atomic.finish(path, formats.saved)
    format, file = formats.find(path, format)
    read = formats.FORMATS[format].codec.read
    if classification_head is not None:
        if format != "fairseq":
            raise CheckpointError(f"classification_head is for files of fairseq, and {file} is of format {format!r}")
        read = partial(fairseq.read, classification_head=classification_head)
    contents = shards.read(file, read) if file.name.endswith(formats.INDEX_ENDING) else read(file)
    sources, dropped, foreign = _canonical(file, contents)
    _check_architecture(file, contents, sources, foreign)
    config = config or contents.config
    if config is None:
        config = _config_beside(file, sources, any(name.startswith(names.ROBERTA) for name in contents.tensors))
    if config is not None and config.num_hidden_layers > len(sources):
        raise CheckpointError(
            f"{file} holds {len(sources)} parameters, too few for the {config.num_hidden_layers} layers of its config"
        )
    dropped += _resolve_ties(sources, config)
    _add_zeros(file, sources, contents, config)
    return Checkpoint(file, format, config, sources, tuple(dropped), tuple(foreign), classification_head)


def _canonical(file: Path, contents: Contents) -> tuple[dict[str, list[_Source]], list[str], list[str]]:
    """Sort the stored names into canonical ones, known leftovers, and unknown ones."""
    sources: dict[str, list[_Source]] = {}
    dropped: list[str] = [*contents.copies, *contents.left_out]
    foreign: list[str] = []
    for stored_name, tensor in contents.tensors.items():
        target = names.canonical(contents.family, contents.copies.get(stored_name, stored_name))
        if target is None:
            (dropped if names.dropped(contents.family, stored_name) else foreign).append(stored_name)
            continue
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{file}: {stored_name!r} has type {tensor.dtype}; parameters are of {', '.join(DTYPES)}"
            )
        same = sources.setdefault(target.name, [])
        if same and stored_name not in contents.copies:
            raise CheckpointError(f"{file} names {target.name} twice: {same[0].stored_name!r} and {stored_name!r}")
        same.append(_Source(stored_name, tensor.transposed() if target.transposed else tensor))
    return sources, dropped, foreign


def _check_architecture(
    file: Path, contents: Contents, sources: Mapping[str, list[_Source]], foreign: list[str]
) -> None:
    """Refuse files of other models, above all RoBERTa itself, whose parameters have nearly the same names."""
    pre_norm = any(".attention.LayerNorm." in name for name in sources)
    pre_norm = pre_norm and any(".intermediate.LayerNorm." in name for name in sources)
    post_norm = any(re.search(r"[./]output[./]LayerNorm[./]", name) for name in foreign)
    renamed = any(source.stored_name.startswith(names.ROBERTA) for same in sources.values() for source in same)
    if (post_norm and not pre_norm) or (renamed and not (pre_norm and f"{schema.PREFIX}.LayerNorm.weight" in sources)):
        raise CheckpointError(
            f"{file} is of a post-LN model such as RoBERTa (it normalises after each block: no attention.LayerNorm, "
            "intermediate.LayerNorm and final LayerNorm); its weights mean nothing to a pre-LN model"
        )
    if not any(name.startswith(f"{schema.PREFIX}.") for name in sources):
        some = ", ".join(repr(name) for name in list(contents.tensors)[:3]) or "nothing"
        raise CheckpointError(f"{file} is of another architecture: no tensor of the base model is in it, only {some}")


def _config_beside(file: Path, sources: Mapping[str, list[_Source]], renamed: bool) -> RobertaPreLayerNormConfig | None:
    path = file.with_name(CONFIG_FILE)
    if not path.is_file():
        return None
    if not renamed:
        return RobertaPreLayerNormConfig.from_json_file(path)
    values = read_json(path)
    if values.get("model_type") == "roberta":  # the efficient-MLM authors' configs say so of pre-LN weights
        del values["model_type"]
        values["architectures"] = [schema.architecture(_infer_head(sources, None))]
    return RobertaPreLayerNormConfig.from_json_values(path, values)


def _resolve_ties(sources: dict[str, list[_Source]], config: RobertaPreLayerNormConfig | None) -> list[str]:
    """Join the second names of shared tensors to their canonical ones; returns the stored names not used first."""
    losers = []
    for alias, name in schema.TIES.items():
        if alias not in sources or (alias.endswith(".weight") and not _tied(sources, config, alias, name)):
            continue
        own = sources.pop(alias)
        kept = sources.get(name, [])
        # The decoder's bias is the one that transformers computes with; the word table wins over the decoder's weight.
        sources[name] = own + kept if alias.endswith(".bias") else kept + own
        losers += [source.stored_name for source in (kept if alias.endswith(".bias") else own)]
    return losers


def _add_zeros(
    file: Path, sources: dict[str, list[_Source]], contents: Contents, config: RobertaPreLayerNormConfig | None
) -> None:
    """Add the parameters that the format leaves out because they are zero, of the type of the first that is there."""
    if config is None:
        return
    for name in contents.zeros:
        dtype = next(iter(sources.values()))[0].tensor.dtype
        axes = next(module.axes for module in schema.MODULES if module.name == name.rpartition(".")[0])
        shape = tuple(getattr(config, axis) for axis in axes)
        zeros = Stored(shape, dtype, partial(np.zeros, shape, dtype))
        if zeros.nbytes > max(same[0].tensor.nbytes for same in sources.values()):
            raise CheckpointError(
                f"{file}: by its config, {name} of shape {shape} would be larger than all other tensors"
            )
        sources[name] = [_Source("(zeros)", zeros)]


def _tied(
    sources: Mapping[str, list[_Source]], config: RobertaPreLayerNormConfig | None, alias: str, name: str
) -> bool:
    if config is not None:
        return config.tie_word_embeddings
    identity = sources[alias][0].tensor.identity
    return identity is not None and name in sources and identity == sources[name][0].tensor.identity


def _told_by_shapes(opened: Checkpoint) -> dict[str, int | bool | str]:
    """The fields of a config that are certain from names and shapes."""
    tables = {"vocab_size": "word", "max_position_embeddings": "position", "type_vocab_size": "token_type"}
    shapes = {name: opened.shape(name) for name in opened}
    told: dict[str, int | bool | str] = {}
    for field, table in tables.items():
        shape = shapes.get(f"{schema.PREFIX}.embeddings.{table}_embeddings.weight")
        if shape is not None and len(shape) == 2:
            told |= {field: shape[0], "hidden_size": shape[1]}
    layers = {int(match[1]) for name in shapes if (match := re.search(r"\.encoder\.layer\.(\d+)\.", name))}
    told["num_hidden_layers"] = len(layers)
    dense = shapes.get(f"{schema.PREFIX}.encoder.layer.0.intermediate.dense.bias")
    if dense:
        told["intermediate_size"] = dense[0]
    if any(".crossattention." in name for name in shapes):
        told |= {"is_decoder": True, "add_cross_attention": True}
    return told


def _infer_head(sources: Mapping[str, object], config: RobertaPreLayerNormConfig | None) -> str:
    """The head whose modules are there. A single dense classifier with a pooler is multiple choice."""
    if any(name.startswith("lm_head.") for name in sources):
        return "ForCausalLM" if config is not None and config.is_decoder else "ForMaskedLM"
    if "qa_outputs.weight" in sources:
        return "ForQuestionAnswering"
    if "classifier.out_proj.weight" in sources:
        return "ForSequenceClassification"
    if "classifier.weight" in sources:
        pooled = f"{schema.PREFIX}.pooler.dense.weight" in sources
        return "ForMultipleChoice" if pooled else "ForTokenClassification"
    return "Model"


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
