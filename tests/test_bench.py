"""The instruments that measure speed, on tiny models: not what they measure, but that they measure what they say."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends

if len(backends.installed()) < 3:
    pytest.skip("they measure all three backends", allow_module_level=True)
pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("transformers")

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = ["--layers", "1", "--hidden", "64", "--rounds", "1"]


@pytest.fixture
def load(monkeypatch):
    """Loads a script whose processes are calls."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def loaded(name):
        loader = SourceFileLoader(name, str(SCRIPTS / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
        loader.exec_module(module)
        monkeypatch.setattr(module.measuring, "run", lambda *arguments, python=None: module.answer(*arguments))
        monkeypatch.setattr(module.measuring, "steady", once)
        return module

    return loaded


def once(step):
    start = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start}


@pytest.fixture
def bench(load):
    return load("bench")


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    module.main()


def test_list(bench, monkeypatch, capsys):
    run(bench, monkeypatch, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(bench.WORKLOADS)
    assert all("ours pt, ours tf, ours flax, transformers4 pt" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backward"], "unknown workload 'backward'; there is forward,"),
        (["forward", "--sides", "theirs"], "forward has no side 'theirs'; there is ours pt,"),
        (["forward", "--sides", "onnxruntime"], "forward has no side 'onnxruntime'"),
        (["--write", "--layers", "1"], "--write takes every side at base size"),
        (["--resume"], "--resume needs --json FILE"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(SystemExit):
        run(bench, monkeypatch, *arguments)
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One workload from end to end, in processes of their own."""
    folder = tmp_path_factory.mktemp("bench")
    sides = ["--sides", "ours pt,transformers4 pt"]
    command = [sys.executable, SCRIPTS / "bench", "forward", *TINY, *sides]
    command += ["--json", folder / "rows.json", "--plot", folder / "plot.png"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_one_workload(measured):
    folder, printed = measured
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["side"] for row in rows] == ["ours pt", "transformers4 pt"]
    for row in rows:
        assert row["limit"] < row["seconds"] <= 60
        assert row["bytes"] > 1e8
        assert row["difference"] < 1e-5
    ours, peer = printed.splitlines()[2:4]
    assert f"| {rows[0]['seconds'] / rows[1]['seconds']:.2f} |" in ours
    assert "|  |  |" in peer
    told = printed.rstrip().splitlines()[-1]
    assert told.startswith("ours pt: attention: scaled_dot_product_attention, dtype: float32, ")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_measured_workloads_are_kept(bench, monkeypatch, measured, capsys):
    folder, printed = measured
    monkeypatch.setattr(bench, "measure", None)
    run(bench, monkeypatch, "forward", "--resume", "--json", folder / "rows.json")
    assert capsys.readouterr().out == printed


def test_the_readme_gets_table_and_plot(bench, monkeypatch, measured, tmp_path):
    rows = json.loads((measured[0] / "rows.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- performance -->\nold\n<!-- end of performance -->\nafter\n")
    monkeypatch.setattr(bench.measuring, "README", readme)
    monkeypatch.setattr(bench, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(bench, "measure", lambda name, folder, options: rows if name == "forward" else [])
    others = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, check: others.append(command))
    run(bench, monkeypatch, "--write", "--all")
    text = readme.read_text()
    assert text.startswith("before\n<!-- performance -->\n2 threads, ")
    assert "old" not in text
    assert bench.table(rows) in text
    assert "(plot.png)" in text
    assert (tmp_path / "plot.png").is_file()
    assert [Path(command[1]).name for command in others] == ["compare", "bench-load", "bench-generate", "import-cost"]
    assert all(Path(command[1]).is_file() for command in others)
    assert ["--write" in command for command in others] == [True, True, True, False]


@pytest.mark.parametrize("name", ["ragged", "train-classify"])
def test_other_kinds_of_work(bench, monkeypatch, tmp_path, name):
    sides = ["ours pt", "transformers4 pt", *(["transformers4 pt sorted"] if name == "ragged" else [])]
    monkeypatch.setitem(bench.WORKLOADS, name, dataclasses.replace(bench.WORKLOADS[name], batch=40, length=32))
    run(bench, monkeypatch, name, *TINY, "--sides", ",".join(sides), "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in rows] == sides
    assert max(row["difference"] for row in rows) < 1e-5


# ------------------------------------------------------------------ what a time must not hide


@pytest.mark.parametrize(
    ("result", "passes"), [([1.0, 2.0001], True), ([1.0, 2.1], False), ([1, np.nan], False), ([1], False)]
)
def test_another_result_is_refused(bench, tmp_path, result, passes):
    paths = {side: tmp_path / f"{side}.npy" for side in ("first", "second")}
    np.save(paths["first"], [1.0, 2.0])
    np.save(paths["second"], result)
    if passes:
        assert bench.workloads.check_same("work", paths, 1e-3)["second"] == pytest.approx(5e-5)
        return
    with pytest.raises(SystemExit, match="work: second computes something else than first"):
        bench.workloads.check_same("work", paths, 1e-3)


@pytest.mark.parametrize("arrange", ["packed", "padded", "sorted", "wide"])
def test_texts_come_back_in_their_order(bench, arrange):
    workloads = bench.workloads
    texts = workloads.texts(40, 64)
    arranged = {
        "packed": lambda: workloads.packed(texts, 64, most_rows=4),
        "padded": lambda: workloads.padded(texts, 8),
        "sorted": lambda: workloads.padded(texts, 8, by_length=True),
        "wide": lambda: workloads.padded(texts, 8, multiple=64),
    }[arrange]()
    shapes = {batch["input_ids"].shape for batch in arranged.batches}
    assert len(shapes) == 1 if arrange in ("packed", "wide") else len(shapes) > 1
    for text, found in zip(texts, arranged.restore([batch["input_ids"] for batch in arranged.batches]), strict=True):
        np.testing.assert_array_equal(text, found)


@pytest.mark.parametrize("train", [False, True])
def test_operations_are_those_that_pytorch_counts(bench, train, monkeypatch):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from roberta_pln import pt

    sizes = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256, "num_hidden_layers": 2}
    model = pt.RobertaPreLayerNormForMaskedLM(pt.RobertaPreLayerNormConfig(**sizes))
    ids = torch.randint(4, 1000, (3, 20))
    with FlopCounterMode(display=False) as counter:
        logits = model.eval()(ids, output_attentions=True).logits  # with them the products are plain ones
        if train:
            logits.sum().backward()
    needed = bench.workloads.operations([20] * 3, [20] * 3, decoded=True, train=train, layers=2, hidden=64)
    assert needed == counter.get_total_flops()
    for file in ("model", "encoder"):  # the counter's own hooks look at every layer
        monkeypatch.setattr(f"roberta_pln.pt.{file}.is_watched", lambda _: False)
    with FlopCounterMode(display=False) as counter:
        record = model.roberta_prelayernorm(ids, head_mask=torch.ones(1), places=torch.zeros(1, 1, dtype=int))
        if train:
            record.last_hidden_state.sum().backward()
    needed = bench.workloads.operations([20] * 3, [1] * 3, train=train, layers=2, hidden=64)
    assert needed == counter.get_total_flops()


# ------------------------------------------------------------------ on a GPU


def test_the_code_for_gpus_on_the_processor(load, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    module = load("bench-gpu")
    arguments = ["ragged-128", "train-128", "--device", "cpu", "--batch", "2", *TINY, "--json", tmp_path / "rows.json"]
    run(module, monkeypatch, *arguments)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["side"] for row in rows] == 2 * list(module.SIDES)
    assert [row["tokens"] for row in rows[3:]] == 3 * [256]
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
    assert "of the measured peak" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(load, monkeypatch, capsys):
    module = load("bench-gpu")
    monkeypatch.setattr(module.measuring, "run", lambda *arguments: {"name": ""})
    with pytest.raises(SystemExit) as stopped:
        run(module, monkeypatch)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("no GPU: ")


def test_what_a_gpu_reaches_is_of_its_peak(load):
    module = load("bench-gpu")
    row = {"task": "train-128", "side": "ours pt", "seconds": 2.0, "operations": 8e12, "tokens": 300, "bytes": 5e8}
    assert module.table([row], peak=8e12, vendors=16e12).splitlines()[2].split(" | ")[3:6] == ["150", "50%", "25%"]
    assert module.PEAKS["NVIDIA H200"] == 989e12
