"""Under construction."""

from collections.abc import Mapping
from pathlib import Path
from roberta_pln.checkpoint.stored import Contents, Stored


def read(path: Path) -> Contents:
    raise NotImplementedError


def write(path: Path, tensors: Mapping[str, Stored], ties: Mapping[str, str], head: str) -> None:
    raise NotImplementedError
