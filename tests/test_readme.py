"""What the README says is true: its samples run, its table is what the script measures."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(roberta-pln .*)$", README, re.MULTILINE)

pytestmark = pytest.mark.skipif(len(backends.installed()) < 3, reason="the README shows all three backends")


def run(code: str) -> str:
    as_users_do = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=as_users_do)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_samples_give_the_same_number():
    losses = [float(re.search(r"\d+\.\d+", run(sample)).group()) for sample in SAMPLES[:3]]
    np.testing.assert_allclose(losses, losses[0], rtol=0, atol=2e-4)  # PyTorch prints four digits
    assert 0 < losses[0] < 8


def test_the_samples_differ_in_the_import_only():
    first, *others = [sample.splitlines() for sample in SAMPLES[:3]]
    for other in others:
        assert [line for line in first if line not in other] == first[:1]


def test_the_sample_for_your_own_tests():
    (sample,) = [sample for sample in SAMPLES if "parity.compare" in sample]
    run(sample)


def test_the_sample_of_packed_texts():
    (sample,) = [sample for sample in SAMPLES if "pack_sequences" in sample]
    *lines, fill = run(sample).splitlines()
    assert [line.partition(" (")[0] for line in lines] == re.findall(r'"([^"]+[.])"', sample)
    assert 50 < int(fill.partition("%")[0]) <= 100


def test_the_sample_that_continues_a_text():
    (sample,) = [sample for sample in SAMPLES if "generate" in sample]
    lines = run(sample).splitlines()
    assert len(set(lines)) == 2
    assert all(line.startswith("And God said ") for line in lines)


def test_the_commands(tmp_path, monkeypatch):
    """In their order, since one reads what another has written."""
    (tmp_path / "roberta_pln").symlink_to(ROOT / "roberta_pln")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        few = ["--steps", "2"] if " train " in command else []
        assert cli.main([*shlex.split(command)[1:], *few]) == 0, command


def script(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    loader = SourceFileLoader(name, str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def test_the_table_is_what_the_script_measures(monkeypatch):
    """Rounding differs between processors: the figures agree within a factor of ten, and the form exactly."""
    told = README.partition("<!-- differences -->\n")[2].partition("<!-- end of differences -->\n")[0]
    measured = script("compare", monkeypatch).measure()
    assert re.sub(NUMBER, "N", told) == re.sub(NUMBER, "N", measured)
    for ours, theirs in zip(re.findall(NUMBER, told), re.findall(NUMBER, measured), strict=True):
        floor = 1e-15 if max(float(ours), float(theirs)) < 1e-9 else 1e-7  # a difference of one rounding, or none
        assert max(float(ours), floor) <= 10 * max(float(theirs), floor)
        assert max(float(theirs), floor) <= 10 * max(float(ours), floor)


NUMBER = r"\d\.\de[-+]\d\d"
