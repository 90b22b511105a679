"""What the measuring scripts share: measurements in processes of their own, that take turns; tables in the README."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
THREADS = "2"
"""Of every process that is measured."""


def put_into_readme(name: str, text: str, file: Path | None = None) -> None:
    """Put a text between the two markers of a name, in the README or another file."""
    file = file or README
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    found, count = re.subn(pattern, lambda _: begin + text + end, file.read_text(encoding="utf-8"), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{file} must have {begin.strip()} and {end.strip()} once, it has them {count} times")
    file.write_text(found, encoding="utf-8")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def run(*arguments: str, python: str | None = None) -> dict[str, Any]:
    """What the calling script prints as JSON in its last line, in a fresh process with `--one ARGUMENTS`."""
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": THREADS,
        "TF_NUM_INTRAOP_THREADS": THREADS,
        "TF_NUM_INTEROP_THREADS": THREADS,
        "NPROC": THREADS,  # what XLA takes for the number of processors
    }
    command = [python or sys.executable, sys.argv[0], "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def steady(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the first time that something is done, and the median of later times, the second left out."""
    times: list[float] = []
    while len(times) < 5 or (len(times) < 17 and sum(times[2:]) < 6):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[2:]), "first": times[0]}


def take_turns(
    rounds: int, *commands: Sequence[str], pythons: Sequence[str | None] | None = None
) -> list[dict[str, float]]:
    """The medians of some measurements, which take turns so that a slow moment of the machine meets all.

    Args:
        rounds: how often each is measured.
        commands: arguments of `run`.
        pythons: the interpreter of each; None is this one.
    """
    pairs = list(zip(commands, pythons or [None] * len(commands), strict=True))
    measured = [[run(*command, python=python) for command, python in pairs] for _ in range(rounds)]
    return [
        {key: statistics.median(one[key] for one in same) for key in same[0]} for same in zip(*measured, strict=True)
    ]


def save(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write rows as JSON, if there is a path."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def peak() -> int:
    """The most bytes of memory that this process has had (`ru_maxrss` would begin with those of its parent)."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("this system does not tell the peak memory of a process in /proc/self/status")
    return int(found[1]) * 1024


def processor() -> str:
    """What the system calls its processor."""
    told = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", told.read_text()) if told.is_file() else []
    return " ".join(names[0].split()) if names else platform.processor()


def resident() -> int:
    """Bytes of this process in memory, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Watches the memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.going = resident(), True
        self.start()

    def run(self) -> None:
        while self.going:
            self.highest = max(self.highest, resident())
            time.sleep(0.002)

    def stop(self) -> int:
        """The highest that was seen, in bytes."""
        self.going = False
        self.join()
        return max(self.highest, resident())
