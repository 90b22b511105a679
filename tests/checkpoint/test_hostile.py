"""Every checkpoint that is damaged or malicious is refused with a reason, or read right; see `hostile` and `judge`.

To see one case again: `python -m tests.checkpoint.judge FOLDER CASE`, as in `torch/pickles/7`.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource")  # the limits of a process are those of Linux
pytest.importorskip("h5py")

from roberta_pln import checkpoint
from roberta_pln.checkpoint import CheckpointError
from tests.checkpoint import attacks, hostile, judge
from tests.checkpoint.hostile import Case, sample

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of a process are those of Linux")

SECONDS = 300
"""For all cases of a sample; they take a few."""

LEAST = {
    "safetensors": 3800,
    "safetensors in shards": 900,
    "torch": 1600,
    "torch before 1.6": 880,
    "fairseq": 1350,
    "fairseq alone": 2000,
    "h5": 740,
    "h5 since 1.8": 740,
    "h5 in shards": 320,
    "keras": 680,
    "keras archive": 1500,
    "msgpack": 580,
    "npz": 880,
    "orbax": 1100,
    "orbax, packed": 100,
    "orbax, database": 100,
}
"""How many cases there are at least, by sample."""


def run(*command, **options):
    """The verdicts of a process, and what is wrong with how it ended."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=-1, stderr=-1, text=True, env=os.environ | environment, **options
    )
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    lines = [json.loads(line) for line in output.splitlines()]
    wrong = [f"{case}: {text}" for case, text, _ in (line for line in lines if isinstance(line, list)) if text]
    if process.returncode:
        wrong.append(f"the process ended with {process.returncode} in {lines[-1:]}: {errors[-3000:]}")
    return sum(isinstance(line, list) for line in lines), wrong


@pytest.mark.parametrize("name", hostile.SAMPLES)
def test_refused_or_right(tmp_path, name):
    if name.startswith("orbax"):
        pytest.importorskip("tensorstore")
    count, wrong = run("-m", "tests.checkpoint.judge", tmp_path, name)
    assert not wrong, "\n".join(wrong[:20])
    assert count >= LEAST[name]


@pytest.mark.parametrize("name", ["tokenizer.json", "dict.txt"])
def test_links_are_not_copied(tmp_path, name):
    """What is converted may be given to others, who are not to get files from elsewhere with it."""
    (tmp_path / "secret").write_text("secret")
    checkpoint.save(hostile.tensors("fairseq"), tmp_path / "model", hostile.CONFIG, hostile.HEAD)
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
        checkpoint.convert(tmp_path / "model", tmp_path / "new", "fairseq" if name == "dict.txt" else "torch")


def test_there_are_enough():
    assert sum(LEAST.values()) > 10_000
    assert set(LEAST) == set(hostile.SAMPLES)


# ------------------------------------------------------------------ controls: what would be noticed


def unpickle_everything():
    """What an unsafe reader is: print the attacks that work on it."""
    for name, value in attacks.CALLS.items():
        try:
            pickle.loads(b"\x80\x02" + value + b".")
        except Exception as error:
            print(name, repr(error), file=sys.stderr)
        if Path(judge.MARK).exists():
            Path(judge.MARK).unlink()
            print(json.dumps([name, "", 0]), flush=True)


def test_the_attacks_are_real(tmp_path):
    code = "from tests.checkpoint.test_hostile import unpickle_everything as go; go()"
    assert run("-c", code, cwd=tmp_path) == (len(attacks.CALLS), [])


def whole():
    return Case(sample("safetensors").files, refused=False, tensors=sample("safetensors").tensors)


@pytest.fixture(scope="module")
def watch():
    return judge.Watch()


def other_numbers(path):
    return {name: array + 1 for name, array in hostile.tensors().items()}


def fail(path):
    raise KeyError("x")


def refuse(path):
    raise CheckpointError("something is wrong")


def take_memory(path):
    try:
        return bytearray(2**30)
    except MemoryError as error:
        raise CheckpointError(f"{path}: too large") from error


UNSAFE = {
    "is wrong": other_numbers,
    "KeyError": fail,
    "names no file": refuse,
    "too much memory": take_memory,
    "TooSlow": lambda path: time.sleep(60),
    "open of '/etc/hostname'": lambda path: Path("/etc/hostname").read_text(),
    "os.system": lambda path: os.system("true"),
    "code ran": lambda path: (path.parent / judge.MARK).touch(),
    "it changed model.safetensors": lambda path: (path / "model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("text", UNSAFE)
def test_what_is_wrong_is_seen(tmp_path, monkeypatch, watch, text):
    case = Case(whole().files, "", False, whole().tensors, kept=("model.safetensors",))
    assert judge.judge(case, tmp_path / "case", watch) == ""
    inspected = checkpoint.inspect(tmp_path / "case")
    monkeypatch.setattr(checkpoint, "open", lambda path: UNSAFE[text](path) or hostile.tensors())
    monkeypatch.setattr(checkpoint, "inspect", lambda path: inspected)
    monkeypatch.setattr(judge, "SECONDS", 1)
    assert text in judge.judge(case, tmp_path / "case", watch)


def test_what_must_be_refused_may_not_open(tmp_path, watch):
    assert judge.judge(Case(whole().files), tmp_path / "case", watch) == "it opened"


def test_a_crash_names_its_case():
    code = f"import os; print('\"x/1\"', flush=True); os.kill(os.getpid(), {int(signal.SIGSEGV)})"
    count, (wrong,) = run("-c", code)
    assert count == 0
    assert "ended with -11 in ['x/1']" in wrong


def test_damage_hits_something():
    """Most damage makes a difference to what is read, or it would test nothing."""
    for name in ("safetensors", "torch", "h5"):
        file = sample(name).weights[0]
        assert len(hostile.data(name, file)) == sum(array.nbytes for array in sample(name).tensors.values())
        changed = [hostile.damaged(hostile.flip_data, name, seed) for seed in range(20)]
        assert all(case.files[file] != sample(name).files[file] for case in changed)
        assert any(
            not np.array_equal(array, case.tensors[key])
            for case in changed
            for key, array in sample(name).tensors.items()
        )
