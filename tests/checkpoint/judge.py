"""Opens hostile checkpoints, and says of each what is wrong with how that went.

Run as a program, `python -m tests.checkpoint.judge FOLDER SAMPLE...`, it does so in a process of its own with limits,
so that a crash ends that process only, and writes lines of JSON: the name of a case, then its name, what was wrong and
how long it took.
"""

from __future__ import annotations

import ast
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import unicodedata  # noqa: F401  which Python imports for names that are not of ASCII
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from roberta_pln import checkpoint, schema
from roberta_pln.checkpoint import CheckpointError
from roberta_pln.config import ConfigError
from tests.checkpoint import attacks, hostile  # noqa: F401  attacks register themselves
from tests.checkpoint.hostile import Case

SECONDS = 20
"""That one case may take; most need a few milliseconds, some half a second."""
MEMORY = {"orbax, packed": 2**33, "orbax, database": 2**33}
"""Bytes that one case may take beside twice its files, where it is more: tensorstore, which unpacks what Orbax has
packed, makes room for as much as the packed bytes announce."""
USUAL_MEMORY = 64 * 2**20
"""What Python needs for a deeply nested value, with a reserve."""

MARK = "ran"
"""The file that attacks make, if anything in them runs, beside the folder of a case."""


FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.", "pty.", "socket.", "webbrowser."),
    *("exec", "import", "marshal.", "pickle.find_class", "ctypes.", "builtins.input"),
)
"""How events of the interpreter start that no checkpoint may cause."""
PATHS = dict.fromkeys(("open", "os.listdir", "os.scandir", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"), 1)
PATHS |= dict.fromkeys(("os.truncate", "os.chmod"), 1) | dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2)
"""Events with paths, and how many of their arguments are paths."""


class Watch:
    """Notes what the interpreter does while a case is open: files outside of its folder, processes, code."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments!r}"[:200])
        for argument in arguments[: PATHS.get(event, 0)]:
            if not isinstance(argument, int) and not self._is_inside(os.fsdecode(argument)):
                self.seen.append(f"{event} of {argument!r}")

    def _is_inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self.folder + os.sep) or os.path.realpath(path) == self.folder

    @contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        self.seen = []
        self.folder = os.path.realpath(folder)
        try:
            yield self.seen
        finally:
            self.folder = None


def judge(case: Case, folder: Path, watch: Watch, memory: int = USUAL_MEMORY) -> str:
    """What is wrong; nothing, if it is refused for a reason that is given, or read right."""
    lay_out(case, folder)
    size = sum(len(content) for content in case.files.values())
    with limits(2 * size + memory), watch.over(folder) as seen:
        wrong = read(case, folder / case.target)
    if seen:
        wrong = f"{wrong}; it did {', '.join(seen)}"
    lost = [
        name for name in case.kept if not (folder / name).is_file() or (folder / name).read_bytes() != case.files[name]
    ]
    if lost:
        wrong = f"{wrong}; it changed {', '.join(lost)}"
    if (folder.parent / MARK).exists():
        wrong = f"{wrong}; code ran"
        (folder.parent / MARK).unlink()
    return wrong


_laid_out: dict[Path, Case] = {}


def lay_out(case: Case, folder: Path) -> None:
    """Write the files of a case, or only those that differ from the case before."""
    last = _laid_out.get(folder)
    same = last is not None and last.files.keys() == case.files.keys() and not (last.links or last.kept or last.pipes)
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, content in case.files.items():
        if not same or last.files[name] is not content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    _laid_out[folder] = case
    for name in case.pipes:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)
    for name, target in case.links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target.format(outside=outside(folder)))


def outside(folder: Path) -> Path:
    """A folder that no case may look into, with everything that one could want to find."""
    return folder.parent / "outside"


class TooSlow(BaseException):
    pass


@contextmanager
def limits(memory: int) -> Iterator[None]:
    """Stop what takes too much memory or time; who started this process ends what cannot be stopped."""

    def stop(*_: object) -> None:
        raise TooSlow

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.alarm(0)


def read(case: Case, path: Path) -> str:
    try:
        opened = checkpoint.open(path)
        arrays = dict(opened)
        summary = checkpoint.inspect(path)
    except (CheckpointError, ConfigError) as error:
        return wrong_refusal(case, error)
    except FileNotFoundError as error:
        return "" if case.refused and error.errno is None and str(path) in str(error) else f"{error!r}"
    except (Exception, TooSlow) as error:
        return f"{type(error).__name__}: {error}"[:500]
    if case.refused:
        return "it opened"
    return wrong_tensors(case, arrays, summary)


def wrong_refusal(case: Case, error: BaseException) -> str:
    names = {part for name in (*case.files, *case.links, *case.pipes, case.target) for part in Path(name).parts}
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) and not is_of_parser(chain):
            return f"it took too much memory: {error}"[:500]
        chain = chain.__cause__ or chain.__context__
    if not any(name in str(error) for name in names):
        return f"the message names no file: {error}"[:500]
    return ""


def is_of_parser(error: MemoryError) -> bool:
    """Whether it is what Python says of source that is nested too deeply, as NumPy's headers are source."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] == ast.__file__


def wrong_tensors(case: Case, arrays: dict[str, np.ndarray], summary: checkpoint.Summary) -> str:
    for name, array in case.tensors.items():
        if array is None:
            continue
        if name not in arrays or arrays[name].shape != array.shape:
            if summary.whole:
                return f"{name} is missing or of another shape, and nothing says so"
        elif case.zeros and not arrays[name].any():
            continue
        elif arrays[name].dtype != array.dtype or arrays[name].tobytes() != array.tobytes():
            return f"{name} is wrong: {arrays[name].dtype} {arrays[name].tobytes()[:40]!r}"
    unexpected = set(arrays) - set(case.tensors) - set(schema.TIES)
    if summary.whole and unexpected:
        return f"unexpected: {sorted(unexpected)}"
    return ""


def main(folder: Path, names: list[str]) -> None:
    """Judge the cases of some samples, or single ones by name."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    whole = {name.split("/")[0] for name in names}
    whole |= {"orbax, packed" for name in whole if name.startswith("orbax")}
    for name in whole:  # so that nothing has to be imported, and no thread started, later
        lay_out(Case(hostile.sample(name).files), folder / "case")
        checkpoint.inspect(folder / "case" / hostile.sample(name).target)
    lay_out(Case(hostile.sample("safetensors").files), outside(folder / "case"))
    watch = Watch()
    for name in names:
        for case_name, make in hostile.cases(name.split("/")[0]):
            if case_name.startswith(name):
                print(json.dumps(case_name), flush=True)
                start = time.perf_counter()
                memory = MEMORY.get(name.split("/")[0], USUAL_MEMORY)
                wrong = judge(make(), folder / "case", watch, memory)
                print(json.dumps([case_name, wrong, time.perf_counter() - start]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
