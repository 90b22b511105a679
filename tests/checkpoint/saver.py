"""A process that saves checkpoints when it is told to, each in a fork of its own, which can be killed.

It reads a line of JSON per save, and answers with the fork's process id; and after another line with how it ended.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from roberta_pln import checkpoint
from roberta_pln.checkpoint import FORMATS, atomic, writing
from roberta_pln.config import RobertaPreLayerNormConfig
from tests.contract import random_tensors, tiny_config

HEAD = "ForMaskedLM"
NOBODY = 65534


def config(number: int) -> RobertaPreLayerNormConfig:
    """Every checkpoint has another config, also of another size."""
    return tiny_config(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2 + number % 2,
        type_vocab_size=1,
        initializer_range=(number + 1) / 1000,
    )


def save(folder: str, number: int, format: str, max_shard_size: int | str = "5GB") -> None:
    tensors = random_tensors(config(number), HEAD, seed=number)
    tensors["roberta_prelayernorm.embeddings.token_type_embeddings.weight"][:] = 0  # which fairseq's files do not have
    checkpoint.save(tensors, folder, config(number), HEAD, format, max_shard_size=max_shard_size)


def before(module: Any, name: str, do: Callable[[int], None]) -> None:
    """Do something before each call of a function, which is told how many calls there have been."""
    function = getattr(module, name)
    calls = iter(range(10**9))

    def call(*arguments: Any, **options: Any) -> Any:
        do(next(calls))
        return function(*arguments, **options)

    setattr(module, name, call)


STEPS = ((os, "fsync"), (Path, "replace"), (atomic, "_remove"))
"""The steps of a save that change what is on disk for good."""


def slow(seconds: float) -> None:
    """So that a save takes so long in every step that each can be hit."""
    for module, name in STEPS:
        before(module, name, lambda _: time.sleep(seconds))


def kill_at(step: int) -> None:
    """Kill this process before one of its renames."""
    before(Path, "replace", lambda calls: os.kill(os.getpid(), signal.SIGKILL) if calls == step else None)


def full_at(step: int) -> None:
    """A disk that is full from one step on."""
    done = iter(range(10**9))

    def refuse(_: int) -> None:
        if next(done) >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in STEPS[:2]:
        before(module, name, refuse)


def largest_file(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_journal(_: bool) -> None:
    """What a save would be that only renames its files one by one."""

    def commit(self: atomic.Transaction) -> None:
        atomic._apply(self.folder, self._renames, self._removals)

    atomic.Transaction.commit = commit


def without_looking(_: bool) -> None:
    """Start to write even if there is no room."""
    writing._check_room = lambda *_: None


def as_nobody(_: bool) -> None:
    os.setuid(NOBODY)


MODES = {
    "slow": slow,
    "kill_at": kill_at,
    "full_at": full_at,
    "largest_file": largest_file,
    "without_journal": without_journal,
    "without_looking": without_looking,
    "as_nobody": as_nobody,
}


def run(request: dict[str, Any]) -> int:
    """Save in this process, and return how it ended; the reason goes to a file descriptor of the request."""
    for mode in MODES.keys() & request.keys():
        MODES[mode](request[mode])
    try:
        if "open" in request:
            checkpoint.open(request["open"])
        else:
            save(**request["save"])
    except Exception as error:
        os.write(request["answer"], f"{type(error).__name__}: {error}".encode()[:4000])
        return 1
    return 0


def main() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with TemporaryDirectory() as folder:
        for format in FORMATS:  # so that nothing has to be imported later
            save(f"{folder}/{format}", 0, format)
    for line in sys.stdin:
        receive, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os._exit(run(json.loads(line) | {"answer": answer}))
        os.close(answer)
        print(pid, flush=True)
        sys.stdin.readline()  # until then the process id is the fork's, even if that has ended
        _, status = os.waitpid(pid, 0)
        with os.fdopen(receive, errors="replace") as file:
            print(json.dumps([os.waitstatus_to_exitcode(status), file.read()]), flush=True)


if __name__ == "__main__":
    main()
