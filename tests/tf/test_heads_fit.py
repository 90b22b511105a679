"""Keras' `fit` and `predict` with every head, its labels given in every way."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import keras

from roberta_pln import tf as backend
from roberta_pln.schema import architecture
from tests.contract import HEADS, tiny_config

CASES = ["causal", "classes", "a regression", "several targets", "tokens", "an answer", "choices"]
LABELS = ("labels", "start_positions", "end_positions")


def model_and_data(name: str):
    head, changes, inputs = HEADS[name]
    model = getattr(backend, architecture(head))(tiny_config(**changes), seed=0)
    return model, inputs


@pytest.mark.parametrize("name", CASES)
def test_labels_inside_and_beside_the_inputs(name):
    """The same loss, which falls, and predictions without labels."""
    model, inputs = model_and_data(name)
    labels = {key: value for key, value in inputs.items() if key in LABELS}
    rest = {key: value for key, value in inputs.items() if key not in LABELS}
    model.compile(optimizer=keras.optimizers.Adam(1e-2), jit_compile=False)
    batch = len(next(iter(rest.values())))
    inside = model.evaluate(inputs, batch_size=batch, verbose=0)
    y = labels if len(labels) > 1 else labels["labels"]
    assert model.evaluate(rest, y, batch_size=batch, verbose=0) == pytest.approx(inside, rel=1e-6)
    assert inside == pytest.approx(float(model(**inputs).loss), rel=1e-5)
    losses = model.fit(inputs, batch_size=batch, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    found = model.predict(rest, verbose=0)
    assert "loss" not in found
    assert all(isinstance(value, np.ndarray) for _, value in found.named_arrays())


def test_a_loss_of_keras_on_the_logits():
    model, inputs = model_and_data("classes")
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    found = model.evaluate(rest, np.array([0, 2, 1]), verbose=0, return_dict=True)
    logits = model(**rest).logits
    expected = keras.losses.sparse_categorical_crossentropy(np.array([0, 2, 1]), logits, from_logits=True)
    assert found["loss"] == pytest.approx(float(np.mean(expected)), rel=1e-5)
    assert 0 <= found["accuracy"] <= 1
