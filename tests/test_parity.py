import json

import numpy as np
import pytest

from roberta_pln import backends, parity
from roberta_pln.backends import BackendError, Request
from roberta_pln.parity import Report
from tests.contract import random_checkpoint, tiny_config


def one(name, ours, theirs, dtype="float64", least=0.0):
    return parity.difference(name, "pt", "tf", dtype, np.array(ours), np.array(theirs), least)


def test_the_largest_difference_and_where():
    found = one("logits", [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.5], [3.25, 4.0]])
    assert (found.absolute, found.where, found.relative) == (0.5, (0, 1), 0.125)
    assert not found.passed


@pytest.mark.parametrize(
    ("ours", "theirs", "absolute"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
        ([1.0], [1.0, 2.0], np.inf),
        ([0.0], [0.0], 0.0),
    ],
)
def test_odd_numbers(ours, theirs, absolute):
    found = one("logits", ours, theirs)
    assert found.absolute == absolute
    assert found.passed == (absolute == 0)


def test_tolerances():
    assert one("logits", [1.0], [1.0 + 0.9e-12]).passed
    assert not one("logits", [1.0], [1.0 + 1.1e-12]).passed
    assert one("logits", [100.0], [100.0 + 0.9e-10]).passed
    assert one("gradient.a", [1e-6], [1e-6 + 0.9e-17]).passed
    assert not one("gradient.a", [1e-6], [1e-6 + 1.1e-17]).passed
    assert not one("logits", [1.0], [1.0 + 1e-4], "float32").passed


def test_a_gradient_that_is_rounding_noise_is_measured_against_the_largest():
    noise = {"gradient.key.weight": np.ones((2, 2)), "gradient.key.bias": np.array([1e-17, 0.0])}
    other = {**noise, "gradient.key.bias": np.array([0.0, -1e-17])}
    assert all(found.passed for found in parity.differences({"pt": noise, "tf": other}, "float64"))
    other["gradient.key.bias"] = np.array([0.0, -1e-13])
    assert not all(found.passed for found in parity.differences({"pt": noise, "tf": other}, "float64"))


def test_a_missing_array_is_seen():
    found = list(parity.differences({"pt": {"loss": np.ones(())}, "tf": {}}, "float64"))
    assert [difference.passed for difference in found] == [False]


@pytest.fixture
def report():
    answers = {
        "pt": {"loss": np.array(1.0), "hidden_states.0": np.ones(3), "logits": np.zeros(4), "gradient.a": np.ones(2)},
        "tf": {
            "loss": np.array(1.0),
            "hidden_states.0": np.ones(3),
            "logits": np.full(4, 1e-3),
            "gradient.a": np.ones(2),
        },
    }
    return Report("here", "ForMaskedLM", ("pt", "tf"), "float64", tuple(parity.differences(answers, "float64")))


def test_a_report(report):
    assert not report.passed
    assert report.worst("logits")[("pt", "tf")].absolute == 1e-3
    assert report.worst("loss")[("pt", "tf")].passed
    rows = report.table().splitlines()
    assert rows[0].split() == ["float64", "pt", "-", "tf"]
    assert [row for row in rows if row.endswith("!")] == [row for row in rows if row.startswith("logits")]
    saved = json.loads(parity.to_json([report]))["reports"]
    assert saved[0]["passed"] is False
    assert {"name", "left", "right", "absolute", "relative", "where"} <= set(saved[0]["differences"][0])


def test_a_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    parity.save_plot([report], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_random_inputs_are_padded_on_every_side():
    inputs = parity.random_inputs(tiny_config())
    mask = inputs["attention_mask"]
    assert mask[0].all()
    assert not mask[1, -1]
    assert not mask[2, 0]
    assert mask[3, [0, -1]].all()
    assert not mask[3].all()
    assert np.array_equal(inputs["input_ids"] != 1, mask > 0)
    assert (inputs["labels"] >= 0).any()


def test_backends_are_chosen_by_name():
    with pytest.raises(BackendError, match="unknown backend 'jax'; the backends are pt, tf, flax"):
        backends.choose(["jax"])
    with pytest.raises(BackendError, match="at least two backends, got pt"):
        parity.compare("nowhere", ["pt"])


def test_what_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.installed() == ()
    with pytest.raises(BackendError, match="no backend is installed: pip install"):
        backends.choose(None)
    advice = backends.BACKENDS["flax"].advice()
    assert advice == "Flax is not available: install jax, flax (pip install 'roberta_pln[flax]')"


def test_a_process_that_fails_says_why(tmp_path):
    name = backends.choose(None)[0]
    with pytest.raises(BackendError, match=r"(?s)failed with status 1:.*there is no .*nowhere"):
        backends.run(
            name, [Request(str(tmp_path / "nowhere"), "ForMaskedLM", "float32", {"input_ids": np.ones((1, 2))})]
        )


@pytest.mark.skipif(len(backends.installed()) < 2, reason="a comparison needs two backends")
def test_compare_in_processes_of_their_own(tmp_path):
    path = random_checkpoint(tmp_path, tiny_config(), "ForMaskedLM")
    said = []
    report = parity.compare(path, backends.installed()[:2], dtype="float64", progress=said.append)
    assert report.passed
    assert report.head == "ForMaskedLM"
    assert len(said) == 2
    assert {d.name for d in report.differences} >= {"loss", "logits", "hidden_states.2", "gradient.lm_head.bias"}
