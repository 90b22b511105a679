"""The process that `backends.run` starts: reads requests from a folder, writes answers there, counts them on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from roberta_pln.backends import Request, answer


def main(folder: str) -> None:
    """Answer the requests of one folder, in order."""
    out = sys.stdout
    sys.stdout = sys.stderr  # only the count goes to the parent
    jobs = json.loads(Path(folder, "jobs.json").read_text(encoding="utf-8"))
    for index, fields in enumerate(jobs["requests"]):
        with np.load(Path(folder, f"inputs-{index}.npz"), allow_pickle=False) as inputs:
            request = Request(**{**fields, "inputs": dict(inputs)})
        arrays = answer(jobs["backend"], request)
        np.savez(Path(folder, f"outputs-{index}.npz"), **arrays)  # type: ignore[arg-type]
        print(index + 1, file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
