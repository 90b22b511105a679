"""Saves that are stopped half-way, by a kill, a full disk or a folder that cannot be written to.

Whatever happens to it, the folder holds the old checkpoint or the new one, whole, with its config.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

pytest.importorskip("resource")  # processes are forked, and limited
pytest.importorskip("h5py")

from roberta_pln import checkpoint
from roberta_pln.checkpoint import FORMATS
from tests.checkpoint import saver

KILLS = 60
SLOW = 0.003
"""Seconds that each step takes longer, most of which are renames and flushes."""

FORMS = [{"format": format} for format in FORMATS]
FORMS += [{"format": format, "max_shard_size": 2000} for format in ("safetensors", "torch", "msgpack", "h5")]
"""How a checkpoint may be saved."""


class Saver:
    """The process of `saver`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.checkpoint.saver"]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment)

    def tell(self, line: str = "") -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def start(self, **request) -> int:
        """Start a save, and return its process id."""
        self.tell(json.dumps(request))
        return int(self.process.stdout.readline())

    def end(self) -> tuple[int, str]:
        """The exit status of the save, negative for a signal, and the error that it ended with."""
        self.tell()
        return tuple(json.loads(self.process.stdout.readline()))

    def run(self, **request) -> tuple[int, str]:
        self.start(**request)
        return self.end()


@pytest.fixture(scope="module")
def process():
    process = Saver()
    yield process
    process.process.stdin.close()
    process.process.wait()


@pytest.fixture
def folder():
    """One that other users can look into, as the usual temporary folders of tests are not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def state(number):
    """What a checkpoint holds: its config, and the bytes of each tensor."""
    config = saver.config(number).replace(dtype="float32", architectures=[f"RobertaPreLayerNorm{saver.HEAD}"])
    tensors = saver.random_tensors(saver.config(number), saver.HEAD, seed=number)
    tensors["roberta_prelayernorm.embeddings.token_type_embeddings.weight"][:] = 0
    return config, {name: array.tobytes() for name, array in tensors.items()}


def found(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of two checkpoints in one folder
        opened = checkpoint.open(folder)
    return opened.config, {name: array.tobytes() for name, array in opened.items()}


def request(folder, number, form):
    return {"folder": str(folder), "number": number, **form}


def forms(rng):
    """A form to save in first, and one to save in over it; a file of fairseq gives way to such files only."""
    old, new = rng.choice(FORMS), rng.choice(FORMS)
    return (new, new) if "fairseq" in (old["format"], new["format"]) else (old, new)


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize("part", range(5))
def test_killed_at_any_moment(process, folder, part):
    rng = random.Random(part)
    ends = []
    for kill in range(part * KILLS // 5, (part + 1) * KILLS // 5):
        old, new = forms(rng)
        saver.save(**request(folder, 2 * kill, old))
        start = time.perf_counter()
        assert process.run(save=request(folder / "measured", 0, new), slow=SLOW) == (0, "")
        seconds = time.perf_counter() - start
        shutil.rmtree(folder / "measured")

        pid = process.start(save=request(folder, 2 * kill + 1, new), slow=SLOW)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        process.end()
        after = found(folder)
        assert after in (state(2 * kill), state(2 * kill + 1)), f"kill {kill}: {old}, {new}"
        ends.append(after == state(2 * kill))
        saver.save(**request(folder, 2 * kill + 1, new))
        assert found(folder) == state(2 * kill + 1)
        emptied(folder)
    assert set(ends) == {True, False}  # some came before the change, some after it


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir(mode=0o755)
    return folder


def is_whole(folder, *numbers):
    """Whether a folder holds one of some checkpoints."""
    try:
        return found(folder) in [state(number) for number in numbers]
    except Exception:
        return False


@pytest.mark.parametrize("step", range(4))
def test_killed_before_each_rename(process, folder, step):
    """And the control: a save that renames one file after the other leaves new weights beside the old config."""
    form = {"format": "safetensors"}
    for control in ({}, {"without_journal": True}):
        saver.save(**request(emptied(folder), 0, form))
        status, _ = process.run(save=request(folder, 1, form), kill_at=step, **control)
        assert status == (0 if step > (1 if control else 2) else -signal.SIGKILL)
        assert is_whole(folder, 0, 1) == (not control or step != 1)


# ------------------------------------------------------------------ no room


def all_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_is_full(process, folder, seed):
    """From one step on everything fails, also the end of a change that has begun."""
    rng = random.Random(seed)
    old, new = forms(rng)
    saver.save(**request(folder, 0, old))
    status, error = process.run(save=request(folder, 1, new), full_at=rng.randrange(12))
    assert is_whole(folder, 0, 1)
    assert status == 0 or os.strerror(errno.ENOSPC) in error
    saver.save(**request(folder, 1, new))
    assert is_whole(folder, 1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_files_that_cannot_grow(process, folder, form):
    """Writing itself fails, and leaves nothing behind."""
    saver.save(**request(folder, 0, {"format": "safetensors"}))
    before = all_files(folder)
    size = max(len(content) for content in before.values())
    for seed in range(3):
        limit = random.Random(seed).randrange(1, size // 8)
        status, error = process.run(save=request(folder, 1, form), largest_file=limit)
        assert (status, all_files(folder)) == (1, before)
        assert os.strerror(errno.EFBIG) in error


@pytest.fixture
def small_disk(folder):
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_full(process, small_disk):
    """First the room is looked at; but others may take it meanwhile."""
    saver.save(**request(small_disk, 0, {"format": "safetensors"}))
    before = all_files(small_disk)
    for form in FORMS:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**12))
        for look in ({}, {"without_looking": True}):
            status, error = process.run(save=request(small_disk, 1, form), **look)
            filler.unlink(missing_ok=False) if look else None
            assert (status, all_files(small_disk).keys() - {"filler"}) == (1, before.keys())
            assert ("has room for" if not look else os.strerror(errno.ENOSPC)) in error
        assert all_files(small_disk) == before


# ------------------------------------------------------------------ a folder that cannot be written to


def readable_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_folder_that_cannot_be_written_to(process, folder):
    saver.save(**request(folder, 0, {"format": "safetensors"}))
    before = all_files(folder)
    readable_only(folder)
    user = {"as_nobody": True} if os.getuid() == 0 else {}
    for form in FORMS:
        status, error = process.run(save=request(folder, 1, form), **user)
        assert (status, all_files(folder)) == (1, before)
        assert error.startswith("PermissionError: ")
        assert str(folder) in error
    assert process.run(open=str(folder), **user) == (0, "")
    folder.chmod(0o755)


def test_a_change_that_cannot_be_finished(process, folder):
    """Who may not write may not guess either which of the files belong together."""
    saver.save(**request(folder, 0, {"format": "safetensors"}))
    process.run(save=request(folder, 1, {"format": "safetensors"}), kill_at=1)
    readable_only(folder)
    status, error = process.run(open=str(folder), **({"as_nobody": True} if os.getuid() == 0 else {}))
    assert status == 1
    assert f"JournalError: {folder} holds a save that was interrupted" in error
    assert "must be writable" in error
    folder.chmod(0o755)
    assert is_whole(folder, 1)
