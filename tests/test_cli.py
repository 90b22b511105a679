"""The commands as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from roberta_pln import backends
from roberta_pln.cli import main
from roberta_pln.demo import ASSET
from tests.contract import random_checkpoint, tiny_config

ROOT = Path(__file__).parent.parent
DECODER = ASSET.parent / "kjv-decoder"
STAMP = Path(sys.prefix) / "installed"

TWO = backends.installed()[:2]
needs_two = pytest.mark.skipif(len(TWO) < 2, reason="a comparison needs two backends")


def started(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without what `conftest` has set to silence TensorFlow."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**own, **environment})


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return started(sys.executable, "-m", "roberta_pln.cli", *arguments, **environment)


@pytest.fixture
def script(tmp_path):
    """scripts/demo as it is, on the environment of scripts/test: both install in the same way."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv-demo").symlink_to(sys.prefix)
    return tmp_path / "scripts" / "demo"


def test_demo(script):
    """By the script, where there is an environment for it, which calls the command."""
    done = started(script) if STAMP.is_file() else run("demo")
    assert "Installing" not in done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Everything holds."
    for name in backends.installed():
        title = backends.BACKENDS[name].title
        assert title in done.stdout
        assert title in done.stderr  # progress
    assert not {"oneDNN", "cuda", "WARNING", "Warning"} & set((done.stdout + done.stderr).replace(":", " ").split())


def test_demo_goes_on_without_a_backend(tmp_path):
    """A package that cannot be found, and one line that says so."""
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'jax' else f(n, *a)"
    (tmp_path / "sitecustomize.py").write_text(hide)
    done = run("demo", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "not available" in line]
    assert lines == ["Flax is not available: install jax (pip install 'roberta_pln[flax]')"]


@pytest.mark.parametrize("backend", backends.installed())
def test_predict(backend):
    done = run("predict", str(ASSET), "--text", "In the <mask> God created", "--backend", backend, "--top", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert len(json.loads(line)["masks"][0]["tokens"]) == 2


def test_predict_from_a_file(tmp_path, capsys):
    file = tmp_path / "lines.txt"
    file.write_text("a <mask>\n\nand the <mask> said\n")
    assert main(["predict", str(ASSET), "--file", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("backend", backends.installed())
def test_generate(backend):
    done = run("generate", str(DECODER), "--text", "And God", "--max-new-tokens", "6", "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    (continuation,) = json.loads(line)["continuations"]
    assert continuation["text"].startswith(" ")
    assert continuation["tokens"] <= 6
    assert continuation["log_probability"] < 0


def test_generate_several(tmp_path, capsys):
    file = tmp_path / "lines.txt"
    file.write_text("And God said\n\nThe LORD\n")
    options = ["--file", str(file), "--sample", "--seed", "3", "--top-k", "20", "--temperature", "0.8", "--count", "2"]
    assert main(["generate", str(DECODER), *options, "--max-new-tokens", "5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["And God said", "The LORD"]
    assert [len(line["continuations"]) for line in lines] == [2, 2]


@needs_two
def test_verify(tmp_path, capsys):
    path = random_checkpoint(tmp_path / "model", tiny_config(), "ForMaskedLM")
    saved, plot = tmp_path / "report.json", tmp_path / "report.png"
    arguments = ["verify", str(path), "--backends", ",".join(TWO), "--json", str(saved), "--plot", str(plot)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "float32" in out
    assert "float64" in out
    assert [report["dtype"] for report in json.loads(saved.read_text())["reports"]] == ["float32", "float64"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs_two
def test_verify_on_text_fails_above_the_tolerance(tmp_path, monkeypatch, capsys):
    from roberta_pln import parity

    file = tmp_path / "lines.txt"
    file.write_text("In the beginning God created the heaven and the earth.\nAnd God said.\n")
    monkeypatch.setitem(parity.TOLERANCES, "float32", 1e-12)
    assert main(["verify", str(ASSET), "--backends", ",".join(TWO), "--dtype", "float32", "--text", str(file)]) == 1
    assert "!" in capsys.readouterr().out.partition("\n")[2]


def test_convert_inspect_and_verify(tmp_path, capsys):
    """There and back in shards: the digest is the same, and the tokenizer travels along."""
    assert main(["inspect", str(ASSET), "--json", str(tmp_path / "before.json")]) == 0
    before = json.loads((tmp_path / "before.json").read_text())
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert main(["convert", str(ASSET), there, "--to", "msgpack", "--max-shard-size", "2MB"]) == 0
    assert main(["convert", there, back, "--to", "safetensors", "--json", str(tmp_path / "written.json")]) == 0
    assert json.loads((tmp_path / "written.json").read_text())["path"] == f"{back}/model.safetensors"
    capsys.readouterr()
    assert main(["inspect", back, "--json", "-"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert {**after, "path": None} == {**before, "path": None}
    assert before["digest"]
    assert before["parameters"] == 2_633_344
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (ASSET / "tokenizer.json").read_bytes()
    assert len(list((tmp_path / "there").glob("flax_model-*-of-00003.msgpack"))) == 3


@needs_two
def test_verify_two_forms(tmp_path, capsys):
    one = random_checkpoint(tmp_path / "one", tiny_config(), "ForMaskedLM")
    other = random_checkpoint(tmp_path / "other", tiny_config(layer_norm_eps=1e-6), "ForMaskedLM", seed=1)
    same = ["--backends", ",".join(TWO), "--dtype", "float64"]
    assert main(["verify", str(one), str(one), *same]) == 0
    assert "tensors are the same, bit for bit" in capsys.readouterr().err
    assert main(["verify", str(one), str(other), *same, "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)["weights"]
    assert any(line.startswith("lm_head.bias differs by at most") for line in found)
    assert found[-1] == "layer_norm_eps of the config is 1e-05 and 1e-06"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", str(ASSET), str(ASSET), "--to", "h5"], "holds a checkpoint already (model.safetensors)"),
        (["convert", "nowhere/at/all", "x", "--to", "h5"], "nowhere/at/all"),
        (["convert", str(ASSET), "x", "--to", "torch", "--max-shard-size", "big"], "a size must be a number"),
        (["inspect", str(ASSET), "--from", "h5"], "no weight file in"),
        (["predict", "nowhere/at/all", "--text", "a <mask>"], "nowhere/at/all"),
        (["predict", str(ASSET), "--text", "no mask"], "must hold <mask>"),
        (["predict", str(ASSET), "--file", "nowhere.txt"], "nowhere.txt"),
        (["generate", str(ASSET), "--text", "And"], "set is_decoder=True"),
        (["generate", str(DECODER), "--text", "And", "--top-k", "5"], "top_k has an effect with do_sample=True only"),
        (["generate", str(DECODER), "--text", "And", "--max-new-tokens", "9999"], "which leaves room for"),
        (["verify", str(ASSET), "--backends", "pt,jax"], "unknown backend 'jax'"),
        (["verify", str(ASSET), "--backends", "pt"], "at least two backends"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("roberta-pln: error: ")
    assert message in error


def test_a_tokenizer_that_is_absent(tmp_path, capsys):
    path = random_checkpoint(tmp_path, tiny_config(), "ForMaskedLM")
    assert main(["predict", str(path), "--text", "a <mask>"]) == 2
    assert "no tokenizer in" in capsys.readouterr().err
