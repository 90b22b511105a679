"""Checkpoints on disk: every format opens as the same lazy mapping, and is written from it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from roberta_pln import names, schema
from roberta_pln.checkpoint import flax_msgpack, safetensors_file, tf_h5, torch_pickle
from roberta_pln.checkpoint.stored import DTYPES, Array, CheckpointError, Contents, Stored
from roberta_pln.config import CONFIG_FILE, RobertaPreLayerNormConfig, read_json

__all__ = ["FILES", "FORMATS", "Checkpoint", "CheckpointError", "open", "save"]


class _Codec(Protocol):
    """What the module of each format offers."""

    def read(self, path: Path) -> Contents: ...

    def write(self, path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> None: ...


@dataclass(frozen=True)
class _Format:
    file: str
    endings: tuple[str, ...]
    writes: names.Family
    codec: _Codec


_FORMATS: Final = {
    "safetensors": _Format("model.safetensors", (".safetensors",), "torch", safetensors_file),
    "torch": _Format("pytorch_model.bin", (".bin", ".pt", ".pth"), "torch", torch_pickle),
    "h5": _Format("tf_model.h5", (".h5",), "tf", tf_h5),
    "msgpack": _Format("flax_model.msgpack", (".msgpack",), "flax", flax_msgpack),
}
FORMATS: Final = tuple(_FORMATS)
"""The formats, in the order in which a directory is searched."""
FILES: Final = {name: row.file for name, row in _FORMATS.items()}
"""Format to file name."""


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
        dropped: stored names that are left out: second names of tied tensors, buffers, repeated copies.
        foreign: stored names that no rule knows.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        config: RobertaPreLayerNormConfig | None,
        sources: Mapping[str, list[_Source]],
        dropped: tuple[str, ...],
        foreign: tuple[str, ...],
    ) -> None:
        self.path = path
        self.format = format
        self.config = config
        self.dropped = dropped
        self.foreign = foreign
        self._sources = sources
        self.head = (schema.head_of(config.architectures) if config else None) or _infer_head(sources, config)

    def __getitem__(self, name: str) -> Array:
        """Read one tensor; it may be read-only, since formats map files into memory where they can.

        Warns when the file holds the tensor under two names with different values.
        """
        first, *others = self._sources[name]
        array = first.tensor.read()
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

    def stored(self, name: str) -> Stored:
        """The tensor's shape, type and reader in one, as writers take them."""
        return Stored(self.shape(name), self.dtype(name), partial(self.__getitem__, name))


def open(path: str | os.PathLike[str], config: RobertaPreLayerNormConfig | None = None) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    Args:
        path: a directory, searched for the files of `FORMATS` in this order, or one weight file.
        config: used instead of the `config.json` beside the weights.

    Raises:
        FileNotFoundError: when there is no such path, or no weight file in the directory.
        CheckpointError: when the file is cut short, no checkpoint, or one of another architecture.
        ConfigError: when the `config.json` describes no model of this architecture.
    """
    file = _weight_file(Path(path))
    format = _format_of(file)
    contents = _FORMATS[format].codec.read(file)
    sources, dropped, foreign = _canonical(file, contents)
    _check_architecture(file, contents, sources, foreign)
    if config is None:
        config = _config_beside(file, sources, any(name.startswith(names.ROBERTA) for name in contents.tensors))
    dropped += _resolve_ties(sources, config)
    return Checkpoint(file, format, config, sources, tuple(dropped), tuple(foreign))


def save(
    tensors: Mapping[str, Array],
    directory: str | os.PathLike[str],
    config: RobertaPreLayerNormConfig,
    head: str,
    format: str = "safetensors",
) -> Path:
    """Write a checkpoint under the names that transformers gives this head in this format, and its `config.json`.

    The new file takes its place whole or not at all. Weight files of other formats are removed after that, since an
    older one may win when the directory is loaded.

    Args:
        tensors: canonical names to arrays, such as a `Checkpoint`; exactly those of `schema.expand`, with or
            without the pooler.
        directory: made if it is not there.
        config: written with `dtype` and `architectures` set from what is saved.
        head: one of `schema.HEADS`.
        format: one of `FORMATS`.

    Returns:
        The path of the weight file.

    Raises:
        CheckpointError: when tensors are missing, unexpected, mis-shaped, or of a type the format cannot hold.
    """
    if format not in _FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    outgoing = _outgoing(tensors, config, head)
    row = _FORMATS[format]
    renamed = {}
    for name, tensor in outgoing.items():
        target = names.stored(row.writes, name, head)
        renamed[target.name] = tensor.transposed() if target.transposed else tensor
    ties = {
        names.stored(row.writes, alias, head).name: names.stored(row.writes, name, head).name
        for alias, name in schema.ties(config, head).items()
        if row.writes == "torch"  # the other two have one name for each
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    row.codec.write(folder / row.file, renamed, ties, head)
    dtype = next(iter(outgoing.values())).dtype.name
    config.replace(dtype=dtype, architectures=[schema.architecture(head)]).save_pretrained(folder)
    _remove_stale(folder, row.file)
    return folder / row.file


# ------------------------------------------------------------------ opening


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}")
    for file in FILES.values():
        if (path / file).is_file():
            return path / file
    sharded = [file.name for file in sorted(path.glob("*.index.json"))]
    raise FileNotFoundError(
        f"no weight file in {path}: looked for {', '.join(FILES.values())}"
        + (f"; {', '.join(sharded)} is of a sharded checkpoint, which must be merged into one file" if sharded else "")
    )


def _format_of(file: Path) -> str:
    for name, row in _FORMATS.items():
        if file.suffix in row.endings:
            return name
    known = ", ".join(ending for row in _FORMATS.values() for ending in row.endings)
    raise CheckpointError(f"the ending of a weight file must be one of {known}, got {file.name!r}")


def _canonical(file: Path, contents: Contents) -> tuple[dict[str, list[_Source]], list[str], list[str]]:
    """Sort the stored names into canonical ones, known leftovers, and unknown ones."""
    sources: dict[str, list[_Source]] = {}
    dropped: list[str] = list(contents.copies)
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
    return RobertaPreLayerNormConfig.from_dict(values)


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


def _tied(
    sources: Mapping[str, list[_Source]], config: RobertaPreLayerNormConfig | None, alias: str, name: str
) -> bool:
    if config is not None:
        return config.tie_word_embeddings
    identity = sources[alias][0].tensor.identity
    return identity is not None and name in sources and identity == sources[name][0].tensor.identity


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


# ------------------------------------------------------------------ saving


def _outgoing(tensors: Mapping[str, Array], config: RobertaPreLayerNormConfig, head: str) -> dict[str, Stored]:
    """Check what is to be saved against the schema, without reading more than shapes and types."""
    expected = schema.expand(config, head)
    pooler = {name for name in expected if ".pooler." in name}
    if not pooler & tensors.keys():
        expected = {name: parameter for name, parameter in expected.items() if name not in pooler}
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    outgoing = {name: _as_stored(tensors, name) for name in expected if name in tensors}
    for name, tensor in outgoing.items():
        if tensor.shape != expected[name].shape:
            problems.append(f"shape of {name}: {tensor.shape} given, {expected[name].shape} in the config")
        if tensor.dtype not in DTYPES.values():
            problems.append(f"type of {name}: {tensor.dtype} given, one of {', '.join(DTYPES)} can be saved")
    if problems:
        raise CheckpointError(f"these tensors are no {head} of this config:\n  " + "\n  ".join(problems))
    return outgoing


def _as_stored(tensors: Mapping[str, Array], name: str) -> Stored:
    if isinstance(tensors, Checkpoint):
        return tensors.stored(name)
    array = tensors[name]
    if not isinstance(array, np.ndarray):
        raise TypeError(f"tensors to save are NumPy arrays, got {type(array).__name__} for {name}")
    return Stored(array.shape, array.dtype.newbyteorder("<"), partial(tensors.__getitem__, name))


def _remove_stale(folder: Path, kept: str) -> None:
    """Remove weight files of this model in other formats, sharded ones too; tokenizers and all else stay."""
    for row in _FORMATS.values():
        stem, ending = row.file.split(".")
        pattern = rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{ending}(\.index\.json)?"
        for path in folder.iterdir():
            if path.name != kept and re.fullmatch(pattern, path.name):
                path.unlink()
