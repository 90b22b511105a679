"""The training script on a tiny text."""

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("torch")
pytest.importorskip("tensorboardX")

from roberta_pln import backends, checkpoint
from roberta_pln.checks import InputError
from roberta_pln.tokenizer import Tokenizer
from tests.contract import random_checkpoint, tiny_config

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain"
STEPS = 300
SIZES = "--hidden-size 16 --layers 1 --heads 2 --vocab-size 280 --length 32 --tokens-per-batch 256 --precision float32"
BACKEND = "pt"
WORDS = ["light", "darkness", "heaven", "earth", "water", "day", "night", "seed", "tree", "fruit", "man", "woman"]


@pytest.fixture(scope="module")
def pretrain():
    loader = importlib.machinery.SourceFileLoader("pretrain", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("pretrain", loader))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    line = "And God made the {} and the {}, and called the {} good."
    documents = ["\n".join(line.format(*rng.choice(WORDS, 3)) for _ in range(4)) for _ in range(31)]
    path = tmp_path_factory.mktemp("corpus") / "tiny.txt"
    path.write_text("\n\n".join(documents))
    return path


@pytest.fixture(scope="module", params=["masked", "causal"])
def objective(request):
    return request.param


def command(objective, corpus, work, *more):
    often = ["--save-every", "20", "--backend", BACKEND]
    what = ["--objective", objective, "--corpus", str(corpus), "--work", str(work), "--steps", str(STEPS)]
    return [*what, *SIZES.split(), *often, *more]


@pytest.fixture(scope="module")
def trained(pretrain, objective, corpus, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    pretrain.main(command(objective, corpus, work))
    return work


def test_killed_and_gone_on_with_is_the_same(pretrain, objective, corpus, trained, tmp_path):
    arguments = command(objective, corpus, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments], env=environment, stdout=subprocess.DEVNULL)
    state = tmp_path / "run" / "state" / "progress.json"
    while not state.exists():
        assert process.poll() is None, "the script ended before it saved a state"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pretrain.main(arguments)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "examples.json"):
        assert (tmp_path / "model" / name).read_bytes() == (trained / "model" / name).read_bytes()


def test_result_is_complete_and_was_measured(pretrain, objective, corpus, trained, capsys):
    folder = trained / "model"
    card = json.loads((folder / "card.json").read_text())
    model = backends.BACKENDS[BACKEND].model_class(pretrain.OBJECTIVES[objective].head).from_pretrained(folder)
    assert (card["objective"], card["parameters"]) == (objective, model.num_parameters())
    assert (model.head, model.config.is_decoder) == (checkpoint.open(folder).head, objective == "causal")
    assert Tokenizer.from_pretrained(folder).max_length == 32
    assert (card["steps"], card["training_lines"], card["held_out_lines"]) == (STEPS, 29 * 4, 2 * 4)
    told, readme = card["held_out"], (folder / "README.md").read_text()
    if objective == "masked":
        assert f"| 40% | {told['0.4']['accuracy']:.1%} |" in readme
        assert told["0.4"]["accuracy"] > told["0.4"]["unigram_accuracy"]
    else:
        assert f"| model | {told['model']['perplexity']:.1f} | {told['model']['accuracy']:.1%} |" in readme
        assert told["model"]["perplexity"] < told["unigram"]["perplexity"] / 2

    capsys.readouterr()
    pretrain.main(["--corpus", str(corpus), "--evaluate", str(folder)])
    again = json.loads(capsys.readouterr().out)
    assert again == {name: card[name] for name in again}
    assert set(again) == {"held_out", "sample", "examples", "all_examples"}


def test_something_is_learned(trained):
    lines = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, STEPS + 1, 20))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1


@pytest.mark.parametrize("objective", ["masked"], indirect=True)
def test_a_run_of_other_settings_is_refused(pretrain, objective, corpus, trained):
    for changed in (["--seed", "1"], ["--steps", "5"]):
        with pytest.raises(InputError, match=f"begun otherwise: {changed[0][2:]} was"):
            pretrain.main(command(objective, corpus, trained, *changed))


def test_only_language_models_are_measured(pretrain, corpus, tmp_path):
    random_checkpoint(tmp_path, tiny_config(), "ForQuestionAnswering")
    with pytest.raises(SystemExit, match="must hold a masked or a causal language model .* got ForQuestionAnswering"):
        pretrain.objective_of(tmp_path)


def test_missing_package_names_the_remedy(pretrain, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pretrain.corpus, "BIBLE_FILE", "no/such/file")
    with pytest.raises(
        SystemExit, match=r"no /no/such/file.* install bible-kjv-text, or name a text file with --corpus"
    ):
        pretrain.documents(pretrain.parse(["--work", str(tmp_path / "work")]))
