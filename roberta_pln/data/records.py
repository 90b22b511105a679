"""Examples as a list of dicts: read from files, and checked against the columns of a task.

| suffix | a record is | needs |
|---|---|---|
| `.jsonl`, `.ndjson`, `.json` | the JSON object of a line; blank lines are skipped | nothing |
| `.txt` | a line, as `{"text": line}` | nothing |
| `.csv` | a line below that of the names; columns of numbers, and of True and False, become these | `datasets` |
| `.parquet` | a row | `datasets` |
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from roberta_pln.checks import InputError

Record = Mapping[str, Any]
"""Values by the name of their column."""

READERS: Final = {".csv": "from_csv", ".parquet": "from_parquet"}
"""Suffixes that the `datasets` library reads, each with the method of its `Dataset`."""
JSON_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {".csv": {"keep_default_na": False}}  # "NA" is a text like others


class Column(NamedTuple):
    """What a column must hold."""

    kind: str
    holds: Callable[[Any], bool]
    optional: bool = False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # JSON can write half a character


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _are_strings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _are_answers(value: Any) -> bool:
    if not isinstance(value, Mapping) or not _are_strings(value.get("text")):
        return False
    starts = value.get("answer_start")
    return isinstance(starts, list | tuple) and all(map(_is_integer, starts)) and len(starts) == len(value["text"])


TEXT: Final = Column("a string of Unicode characters", _is_text)
STRINGS: Final = Column("a list of strings", _are_strings)
OPTIONAL_TEXT: Final = TEXT._replace(optional=True)
NAME: Final = Column("a string or an integer", lambda value: isinstance(value, str) or _is_integer(value))

COLUMNS: Final[Mapping[str, Mapping[str, Column]]] = {
    "classification": {
        "text": TEXT,
        "text_pair": OPTIONAL_TEXT,
        "label": NAME,
    },
    "regression": {"text": TEXT, "text_pair": OPTIONAL_TEXT, "label": Column("a finite number", _is_number)},
    "token-classification": {"words": STRINGS, "labels": STRINGS},
    "question-answering": {
        "question": TEXT,
        "context": TEXT,
        "answers": Column('{"text": [strings], "answer_start": [as many integers]}', _are_answers),
        "id": NAME._replace(optional=True),
    },
    "multiple-choice": {
        "prompt": OPTIONAL_TEXT,
        "choices": STRINGS,
        "label": Column("an integer (the index of the right choice)", _is_integer),
    },
    "masked-lm": {"text": TEXT},
    "causal-lm": {"text": TEXT},
}
"""The columns that each task reads; others may be there. `None` in an optional column says that it is not there."""


def read(path: str | os.PathLike[str], task: str | None = None) -> list[dict[str, Any]]:
    """Read the records of a file; its suffix says how, see the table above.

    Args:
        path: UTF-8 text, or Parquet.
        task: a key of `COLUMNS`; its columns are checked.

    Returns:
        At least one record.

    Raises:
        FileNotFoundError: when there is no such file.
        ImportError: when the suffix needs the `datasets` library and it is not installed.
        InputError: when the suffix is another one, the file is empty or cannot be read as what its suffix says, or a
            record does not fit the task.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of the examples")
    known = (*JSON_SUFFIXES, ".txt", *READERS)
    if path.suffix not in known:
        raise InputError(f"the suffix of a file of examples must be one of {', '.join(known)}, got {path.name!r}")
    if path.suffix in READERS:
        records = _from_table(path)
    else:
        lines = _lines(path)
        records = [{"text": line} for line in lines] if path.suffix == ".txt" else _from_json(path, lines)
    if not records:
        raise InputError(f"{path} must hold at least one example, got none")
    if task is not None:
        check(records, task, str(path))
    return records


def check(records: Sequence[Record], task: str, source: str = "the records") -> None:
    """See that every record has the columns of a task, and values of the right kind in them.

    Args:
        records: any records; columns that the task does not know are ignored.
        task: a key of `COLUMNS`.
        source: where they come from, for messages.

    Raises:
        InputError: when one does not, or there is no record or no such task. Records are counted from 1.
    """
    if task not in COLUMNS:
        raise InputError(f"task must be one of {', '.join(COLUMNS)}, got {task!r}")
    if not records:
        raise InputError(f"{task} needs at least one record, got none from {source}")
    columns = COLUMNS[task]
    for number, record in enumerate(records, 1):
        missing = [name for name, column in columns.items() if not column.optional and name not in record]
        if missing:
            raise InputError(
                f"a record for {task} must have the columns {', '.join(columns)}; record {number} of {source} has "
                f"{', '.join(map(str, record)) or 'none'} but not {', '.join(missing)}: rename or add columns"
            )
        for name, column in columns.items():
            value = record.get(name)
            if not column.holds(value) and not (column.optional and value is None):
                raise InputError(
                    f"{name} must be {column.kind}, got {_short(value)} ({type(value).__name__}) in record {number} of "
                    f"{source}: correct the value"
                )


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text, got other bytes ({error}): convert it") from error
    return text.removesuffix("\n").split("\n") if text else []


def _from_json(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"every line of {path} must be a JSON object, got {_short(line)} in line {number} ({error}): write one "
                f"example per line, without line breaks inside"
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"every line of {path} must be a JSON object, got {_short(record)} ({type(record).__name__}) in line "
                f'{number}: write it as {{"column": value, ...}}'
            )
        records.append(record)
    return records


def _from_table(path: Path) -> list[dict[str, Any]]:
    library = _library()
    quiet = library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            read_table = getattr(library.Dataset, READERS[path.suffix])
            table = read_table(str(path), cache_dir=cache, keep_in_memory=True, **_OPTIONS.get(path.suffix, {}))
            return list(table.to_list())
    except Exception as error:  # the library passes on what its readers raise, of many types
        reason = error.__cause__ or error
        raise InputError(
            f"{path} must hold a table of at least one example, as its suffix says, but it cannot be read "
            f"({type(reason).__name__}: {reason}): write it again, or as JSON lines"
        ) from error
    finally:
        if not quiet:
            library.enable_progress_bars()


def _library() -> Any:
    """The `datasets` library, imported on first use so that the package works without it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading CSV or Parquet needs the datasets library: pip install 'roberta_pln[data]'"
        ) from error
    return datasets


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
