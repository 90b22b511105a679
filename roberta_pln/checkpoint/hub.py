"""Where a checkpoint is: a path on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from roberta_pln.config import CONFIG_FILE
from roberta_pln.generation import GENERATION_CONFIG_FILE

OPTIONS: Final = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
"""The keywords that say where and how to look; the meaning of each is huggingface_hub's."""

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""Fetched with a checkpoint where the repository has them, so that the folder is whole."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS: Final = (".json", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".keras", ".msgpack", ".npz")


class HubError(OSError):
    """A repository that cannot be reached, or does not hold what is needed."""


def find_config(path: str | os.PathLike[str], **options: Any) -> Path:
    """The `config.json` of a directory, of a weight file, or of a hub repository; a JSON file is returned as it is.

    Raises:
        FileNotFoundError: when there is no such path.
        HubError: when the repository cannot be reached or has none.
    """
    local = _local(path, options)
    if local is None:
        return _required(str(path), (CONFIG_FILE,), options)
    found = local / CONFIG_FILE if local.is_dir() else local
    if found.suffix != ".json":
        found = found.with_name(CONFIG_FILE)
    if not found.is_file():
        raise FileNotFoundError(f"there is no {CONFIG_FILE} in {found.parent}")
    return found


def find_checkpoint(path: str | os.PathLike[str], **options: Any) -> Path:
    """A local directory or file as it is; from the hub, the weight file, with its config and tokenizer beside it.

    Only the first format of `checkpoint.FORMATS` that the repository has is downloaded.

    Raises:
        FileNotFoundError: when there is no such path.
        HubError: when the repository cannot be reached or has no weight file.
    """
    from roberta_pln.checkpoint import FILES, FOLDERS

    local = _local(path, options)
    if local is not None:
        return local
    repository = str(path)
    _required(repository, (CONFIG_FILE,), options)
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG_FILE):
        _fetch(repository, name, options)
    return _required(repository, tuple(file for name, file in FILES.items() if name not in FOLDERS), options)


def _local(path: str | os.PathLike[str], options: dict[str, Any]) -> Path | None:
    """The path, when it is there; None when it may be a hub id."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no option of the hub; they are {', '.join(OPTIONS)}")
    local = Path(path)
    if local.is_dir() and options.get("subfolder"):
        local = local / options["subfolder"]
    if local.exists():
        return local
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path) or path.endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"there is no file or directory {local}, and that is no hub id (name or owner/name)")
    return None


def _required(repository: str, names: tuple[str, ...], options: dict[str, Any]) -> Path:
    """The first of some files that the repository has."""
    for name in names:
        found = _fetch(repository, name, options)
        if found is not None:
            return found
    from huggingface_hub import constants

    offline = options.get("local_files_only") or constants.HF_HUB_OFFLINE
    remedy = "it is not in the cache, and looking it up is switched off" if offline else "check the name and connection"
    raise HubError(f"{repository!r} is no local path, and no hub repository with {' or '.join(names)}: {remedy}")


def _fetch(repository: str, name: str, options: dict[str, Any]) -> Path | None:
    """One file of a repository, from the cache where it is up to date; None when it cannot be had."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{repository!r} is no local path, and looking it up on the hub needs huggingface_hub: "
            "pip install 'roberta_pln[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, **options))
    except EntryNotFoundError:  # not in the repository; or offline, not in the cache
        return None
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        raise HubError(f"{repository!r} is no local path, and the hub refuses it: {error}") from error
