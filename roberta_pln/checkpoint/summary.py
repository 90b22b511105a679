"""What is in a checkpoint, in words and numbers; and whether two hold the same."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from roberta_pln import schema
from roberta_pln.checkpoint.reading import Checkpoint, open
from roberta_pln.config import RobertaPreLayerNormConfig


@dataclass(frozen=True)
class Summary:
    """One checkpoint.

    Attributes:
        path: the weight file, or the index of several.
        format: one of `FORMATS`.
        head: one of `schema.HEADS`.
        tensors, parameters, bytes: how many there are, shared ones counted once.
        dtypes: number of tensors of each type.
        ties: second names that tensors of this head have.
        config: the content of `config.json`; None without one.
        missing: parameters of the head that are not there.
        unexpected: tensors that the head has no use for, and stored names that no rule knows.
        dropped: stored names that are left out for good reason, such as second copies.
        digest: SHA-256 over names, types, shapes and values, the same in every format; None if not asked for.
    """

    path: str
    format: str
    head: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    ties: dict[str, str]
    config: dict[str, Any] | None
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    dropped: tuple[str, ...]
    digest: str | None

    @property
    def whole(self) -> bool:
        """Whether the head and its config fit the tensors."""
        return self.config is not None and not self.missing and not self.unexpected

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        types = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"path        {self.path}",
            f"format      {self.format}",
            f"head        {schema.architecture(self.head)}",
            f"tensors     {self.tensors}: {types}",
            f"parameters  {self.parameters:,} in {self.bytes:,} bytes",
            *(f"tied        {alias} is {name}" for alias, name in self.ties.items()),
            f"config      {_short(self.config)}",
            *(f"missing     {name}" for name in self.missing),
            *(f"unexpected  {name}" for name in self.unexpected),
            *(f"left out    {name}" for name in self.dropped),
            *([f"digest      sha256 {self.digest}"] if self.digest else []),
        ]
        return "\n".join(lines)


def inspect(
    path: str | os.PathLike[str] | Checkpoint,
    config: RobertaPreLayerNormConfig | None = None,
    format: str | None = None,
    digest: bool = True,
) -> Summary:
    """Describe a checkpoint; without the digest only headers are read.

    Args:
        path, config, format: see `checkpoint.open`.
        digest: whether to read every tensor, one at a time, for the digest.

    Raises:
        CheckpointError, FileNotFoundError, ConfigError: as `checkpoint.open`.
    """
    opened = path if isinstance(path, Checkpoint) else open(path, config, format)
    config = opened.config
    pooled = any(".pooler." in name for name in opened)
    expected = {} if config is None else schema.expand(config, opened.head, add_pooling_layer=pooled)
    sizes = [opened.stored(name).nbytes for name in opened]
    extra = [name for name in opened if name not in expected] if config is not None else []
    return Summary(
        path=str(opened.path),
        format=opened.format,
        head=opened.head,
        tensors=len(opened),
        parameters=sum(int(np.prod(opened.shape(name), dtype=np.int64)) for name in opened),
        bytes=sum(sizes),
        dtypes=dict(Counter(opened.dtype(name).name for name in opened)),
        ties={} if config is None else schema.ties(config, opened.head),
        config=None if config is None else config.to_dict(),
        missing=tuple(
            f"{name} of shape {parameter.shape}"
            for name, parameter in expected.items()
            if name not in opened or opened.shape(name) != parameter.shape
        ),
        unexpected=(*extra, *opened.foreign),
        dropped=opened.dropped,
        digest=digest_of(opened) if digest else None,
    )


def digest_of(opened: Checkpoint) -> str:
    """SHA-256 over names, types, shapes and values in the order of the names."""
    hashed = hashlib.sha256()
    for name in sorted(opened):
        stored = opened.stored(name)
        hashed.update(f"{name} {stored.dtype.name} {stored.shape}\n".encode())
        hashed.update(stored.bytes().data)
    return hashed.hexdigest()


def differences(
    left: Checkpoint, right: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Every tensor that two checkpoints do not share bit for bit, in words; types may differ if the values do not."""
    found = [f"{name} is only in {left.path}" for name in left if name not in right]
    found += [f"{name} is only in {right.path}" for name in right if name not in left]
    common = [name for name in left if name in right]
    for done, name in enumerate(common, start=1):
        found += _difference(name, left[name], right[name])
        progress(done, len(common))
    return found


def _difference(name: str, left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> list[str]:
    if left.shape != right.shape:
        return [f"{name} has shape {left.shape} and {right.shape}"]
    if left.dtype == right.dtype:
        same = np.array_equal(left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8))
        return [] if same else [f"{name} differs by at most {_largest(left, right):.1e}"]
    return [f"{name} is {left.dtype.name} and {right.dtype.name}, and differs by at most {_largest(left, right):.1e}"]


def _largest(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    return float(np.max(np.abs(left.astype(np.float64) - right.astype(np.float64)), initial=0.0))


def _short(config: dict[str, Any] | None) -> str:
    if config is None:
        return "none: no config.json beside the weights"
    shown = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    return ", ".join(f"{name} {config[name]}" for name in (*shown, "max_position_embeddings", "layer_norm_eps"))
