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
