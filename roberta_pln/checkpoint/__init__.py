"""Checkpoints on disk: every format opens as the same lazy mapping, and is written from it."""

from typing import Final

from roberta_pln.checkpoint.convert import convert
from roberta_pln.checkpoint.formats import FORMATS as _FORMATS
from roberta_pln.checkpoint.reading import Checkpoint, open
from roberta_pln.checkpoint.stored import CheckpointError
from roberta_pln.checkpoint.summary import Summary, inspect
from roberta_pln.checkpoint.writing import save

__all__ = [
    "FILES",
    "FOLDERS",
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "Summary",
    "convert",
    "inspect",
    "open",
    "save",
]

FORMATS: Final = tuple(_FORMATS)
"""The formats, in the order in which a directory is searched."""
FILES: Final = {name: row.file for name, row in _FORMATS.items()}
"""Format to file name."""
FOLDERS: Final = tuple(name for name, row in _FORMATS.items() if row.marker)
"""The formats whose file is a folder."""
