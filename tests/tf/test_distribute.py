"""`tf.distribute.MirroredStrategy`: two replicas train as one device does on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")

from tests.contract import random_checkpoint, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = random_checkpoint(tmp_path_factory.mktemp("saved"), tiny_config(num_hidden_layers=1), "ForMaskedLM")
    command = [sys.executable, "-m", "tests.tf.replicas", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_two_replicas_are_one_device(found):
    """Models loaded and optimizers made in the strategy's scope, two steps in float64."""
    assert found["replicas"] == 2
    assert found["even"]["sgd"] < 1e-15  # roundings of 1e-16: the halves of the batch are added up last
    assert found["even"]["adamw"] < 1e-12  # they are divided by an epsilon of 1e-8, and multiplied by a rate of 1e-3


def test_every_replicas_mean_counts_alike(found):
    """What the docstring of `compute_loss` says about replicas with different numbers of labels."""
    assert found["uneven, from the mean of both means"] < 1e-15
    assert found["uneven, from the mean over all labels"] > 1e-3


def test_predictions_of_the_replicas_are_put_together(found):
    assert found["predicted"] < 1e-14  # roundings of numbers up to 10


def test_every_replica_drops_other_elements(found):
    assert found["dropped"] == pytest.approx(0.5, abs=0.08)  # 1024 draws: 0.016 is one standard error
    assert found["dropped alike"] == pytest.approx(0.5, abs=0.08)
