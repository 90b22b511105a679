"""Where a checkpoint is: a path on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from roberta_pln.config import CONFIG_FILE

OPTIONS: Final = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def find_config(path: str | Path, **options: Any) -> Path:
    p = Path(path)
    return p / CONFIG_FILE if p.is_dir() else p


def find_checkpoint(path: str | Path, **options: Any) -> Path:
    return Path(path)
