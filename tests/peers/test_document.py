"""The table of differences stays true: every row of `docs/differences.md` names a test that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def rows() -> list[list[str]]:
    """The cells of every row, without headings."""
    lines = [line.strip("| \n").split(" | ") for line in DOCUMENT.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] != "transformers"]


def names(cell: str) -> list[str]:
    return re.findall(r"^`(test_\w+)`$", cell)


def exists(test: str) -> bool:
    return f"\ndef {test}(" in TESTS


def test_every_row_names_a_test():
    for cells in rows():
        assert len(cells) == 5, cells
        assert len(names(cells[-1])) == 1, cells
        assert exists(names(cells[-1])[0]), cells
    assert len(rows()) >= 40
    assert not exists("test_that_is_not_there")  # the control


def test_every_divergence_is_told():
    """What `test_divergences.py` and `test_storage.py` show as different is in the table."""
    files = ("test_divergences.py", "test_storage.py")
    source = "".join((Path(__file__).parent / file).read_text(encoding="utf-8") for file in files)
    agreed = {  # points at which both libraries do the same
        "test_padding_is_what_the_mask_hides",
        "test_explicit_positions_win_behind_a_cache",
        "test_epsilon_is_the_config_s",
    }
    told = {name for cells in rows() for name in names(cells[-1])}
    assert set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)) - told == agreed
