"""Files appear whole or not at all."""

import os

import pytest

from roberta_pln.checkpoint import atomic


def test_replaces(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with atomic.writing(tmp_path / "x") as file:
        file.write(b"new")
        assert (tmp_path / "x").read_bytes() == b"old"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_failure_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")

    def fail():
        with atomic.writing(tmp_path / "x") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_by_path(tmp_path):
    with atomic.replacing(tmp_path / "x") as temporary:
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_permissions_are_the_usual(tmp_path):
    (tmp_path / "usual").touch()
    with atomic.writing(tmp_path / "x"):
        pass
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


# ------------------------------------------------------------------ several files together


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def old(folder):
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(b"old")
    return folder


def change(folder) -> None:
    """Write two files anew, one of them for the first time, and remove one."""
    with atomic.changing(folder) as changes:
        for name in ("a", "d"):
            with changes.writing(name) as file:
                file.write(b"new")
        changes.remove(["b", "a"])


NEW = {"a": b"new", "c": b"old", "d": b"new"}


def test_together(tmp_path):
    change(old(tmp_path))
    assert content(tmp_path) == NEW


class Stopped(BaseException):
    """What a kill is to the code that it interrupts, but for `except` and `finally`, which must not help."""


@pytest.mark.parametrize("step", range(12))
def test_stopped_between_any_two_steps(tmp_path, monkeypatch, step):
    """Before the journal is there, all is old; after it, whoever comes next makes all new. Nothing is in between."""
    steps = []

    def counted(function):
        def call(*arguments, **options):
            if len(steps) == step:
                raise Stopped
            steps.append(function)
            return function(*arguments, **options)

        return call

    folder = old(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync", counted(atomic._sync))
        patch.setattr(atomic.Path, "replace", counted(atomic.Path.replace))
        patch.setattr(atomic, "_remove", counted(atomic._remove))
        patch.setattr(atomic.Transaction, "discard", lambda self: None)  # a process that is killed cleans nothing up
        try:
            change(folder)
        except Stopped:
            assert len(steps) == step
    atomic.finish(folder)
    left = {name: value for name, value in content(folder).items() if not name.endswith(".tmp")}
    assert left in (NEW, dict.fromkeys(("a", "b", "c"), b"old"))
    assert (left == NEW) == (step > 3)  # two files are flushed, then the journal, then it is renamed
    change(folder)
    assert {name: value for name, value in content(folder).items() if not name.endswith(".tmp")} == NEW


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for value in (b"old", b"new"):
        with atomic.changing(tmp_path) as changes, changes.replacing("x") as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / "y").write_bytes(value)
        assert (tmp_path / "x" / "deep" / "y").read_bytes() == value
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_killed_save_left_goes_after_a_day(tmp_path):
    names = [".x.0123456789abcdef.tmp", ".y.0123456789abcdef.tmp", ".mine.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[0], (0, 0))
    change(tmp_path)
    assert set(names) - {path.name for path in tmp_path.iterdir()} == {names[0]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"rename": {"../x": "y"}, "remove": []}',
        '{"rename": {".x.0123456789abcdef.tmp": "../y"}, "remove": []}',
        '{"rename": {}, "remove": ["/etc/passwd"]}',
        '{"rename": {}, "remove": [".."]}',
        "[" * 100_000,
    ],
)
def test_a_journal_of_somebody_else_is_refused(tmp_path, text):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x").write_text("kept")
    (folder / atomic.JOURNAL).write_text(text)
    with pytest.raises(atomic.JournalError, match=str(folder)):
        atomic.finish(folder)
    assert (tmp_path / "x").read_text() == "kept"
