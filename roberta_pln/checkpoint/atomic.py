"""Files that change whole or not at all, one or several together.

New files are written under temporary names and flushed to disk. One file then takes its place by a rename. Several
change together by a journal: it lists every rename and removal, appears by one rename itself, and is removed when all
is done. Whoever finds a journal, because the process that wrote it was stopped half-way, finishes what it lists.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from roberta_pln.checkpoint.stored import CheckpointError

JOURNAL: Final = ".roberta_pln.journal"
"""In the folder whose files change."""

_ABANDONED: Final = 24 * 3600.0
"""Seconds after which a temporary file is taken to be left over."""
_TEMPORARY: Final = re.compile(r"\.(?P<name>[^/\\\0]+)\.[0-9a-f]{16}\.tmp")


class JournalError(CheckpointError):
    """A journal that cannot be carried out."""


class Transaction:
    """Files of one folder that change together; see `changing`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._renames: dict[str, str] = {}
        self._removals: list[str] = []

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path; the file, or folder, that is made there takes the place of `name` with the rest."""
        temporary = self.folder / f".{name}.{secrets.token_hex(8)}.tmp"
        self._renames[temporary.name] = name
        yield temporary
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _sync(path)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a binary file to write, which takes the place of `name` with the rest."""
        with self.replacing(name) as temporary, temporary.open("xb") as file:
            yield file

    def remove(self, names: Iterable[str]) -> None:
        """Remove files with the rest, unless they are written anew."""
        self._removals += names

    def commit(self) -> None:
        """Make the changes."""
        removals = [name for name in self._removals if name not in self._renames.values()]
        single = [self.folder / name for name in self._renames.values()]
        if len(single) == 1 and not removals and not single[0].is_dir():  # a folder is removed before another takes it
            _apply(self.folder, self._renames, [])
        elif self._renames or removals:
            text = json.dumps({"rename": self._renames, "remove": removals})
            with writing(self.folder / JOURNAL) as file:
                file.write(text.encode())
            finish(self.folder)

    def discard(self) -> None:
        """Remove what was written."""
        for temporary in self._renames:
            _remove(self.folder / temporary)


def anything(name: str) -> bool:
    """Every name."""
    return True


@contextmanager
def changing(folder: str | os.PathLike[str], ours: Callable[[str], bool] = anything) -> Iterator[Transaction]:
    """Yield a transaction; its changes are made when the block ends, and not at all when it fails.

    Args:
        folder: the one whose files change.
        ours: see `finish`.
    """
    finish(folder, ours)
    _remove_abandoned(Path(folder))
    transaction = Transaction(Path(folder))
    try:
        yield transaction
        transaction.commit()
    except BaseException:
        if not (transaction.folder / JOURNAL).exists():  # after that it is carried out, by whoever comes next
            transaction.discard()
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success its file takes the place of `path`.

    On any failure the temporary file is removed, and what was at `path` stays as it was.
    """
    transaction = Transaction(Path(path).parent)
    try:
        with transaction.replacing(Path(path).name) as temporary:
            yield temporary
        _apply(transaction.folder, {temporary.name: Path(path).name}, [])
    except BaseException:
        transaction.discard()
        raise


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file to write; on success it takes the place of `path`, see `replacing`."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        yield file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def finish(folder: str | os.PathLike[str], ours: Callable[[str], bool] = anything) -> None:
    """Carry out the journal of a folder, if there is one.

    Args:
        folder: the folder.
        ours: the names of what the journal may replace or remove, since it may come from a stranger with the folder.

    Raises:
        JournalError: when it is damaged, or the folder cannot be written to.
    """
    folder = Path(folder)
    journal = folder / JOURNAL
    if not os.path.lexists(journal):
        return
    if journal.is_symlink() or not journal.is_file():  # what else has that name may have no end
        raise JournalError(
            f"{journal} is no journal of an interrupted save, but a link, a folder or a device; remove it"
        )
    try:
        listed = json.loads(journal.read_text(encoding="utf-8"))
    except FileNotFoundError:  # another process has finished it
        return
    except (OSError, ValueError, RecursionError) as error:
        raise JournalError(f"{journal}, left by a save that was interrupted, cannot be read: {error}") from error
    renames, removals = _checked(journal, listed, ours)
    try:
        _apply(folder, renames, removals)
        journal.unlink(missing_ok=True)
        _sync(folder)
    except OSError as error:
        raise JournalError(
            f"{folder} holds a save that was interrupted after all was written; to finish it the folder must be "
            f"writable: {error}"
        ) from error


def _checked(journal: Path, listed: object, ours: Callable[[str], bool]) -> tuple[dict[str, str], list[str]]:
    """The content of a journal, if it names files of its own folder only, and of those only ours."""
    match listed:
        case {"rename": dict(renames), "remove": list(removals)}:
            plain = all(_is_plain(name) and ours(name) for name in (*renames.values(), *removals))
            if plain and all(isinstance(name, str) and _TEMPORARY.fullmatch(name) for name in renames):
                return renames, removals
    raise JournalError(f"{journal} is no journal of an interrupted save; remove it to use the files as they are")


def _is_plain(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and Path(name).name == name
        and not set(name) & {"\\", "\0"}
    )


def _apply(folder: Path, renames: dict[str, str], removals: Iterable[str]) -> None:
    """Rename and remove; what is done already is passed over."""
    for temporary, name in renames.items():
        if (folder / temporary).is_dir() and (folder / name).exists():  # a rename replaces files only
            _remove(folder / name)
        try:
            (folder / temporary).replace(folder / name)
        except FileNotFoundError:
            if not (folder / name).exists():
                raise
    for name in removals:
        _remove(folder / name)
    _sync(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, last through a power cut."""
    if path.is_dir() and os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove what a save that was killed has left, once it is so old that nobody can be writing it still."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _ABANDONED:
            _remove(path)
