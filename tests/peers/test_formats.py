"""transformers reads what this library writes, and this library reads what transformers writes, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("torch", "tensorflow", "tf_keras", "flax", "transformers"):
    pytest.importorskip(module)

CASES = {"torch": 7 * (2 + 2) + 2, "tf": 7 * (2 + 1) + 2, "flax": 7 * (2 + 2) + 2}
"""Per library: heads times (formats it writes + formats it reads), and the logits of both formats it writes."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    run = subprocess.run(
        [sys.executable, "-m", "tests.peers.formats", str(tmp_path_factory.mktemp("peers"))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", CASES)
def test_formats(results, family):
    ours = {case: problem for case, problem in results.items() if case.startswith(f"{family} ")}
    assert {case: problem for case, problem in ours.items() if problem} == {}
    assert len(ours) == CASES[family]
