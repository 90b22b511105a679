"""What Keras does with its own models it does with every head: fit, evaluate, predict, save, functional models."""

import itertools

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from roberta_pln import tf as backend
from roberta_pln.outputs import ModelOutput
from roberta_pln.schema import architecture
from roberta_pln.tf import AdamW, RobertaPreLayerNormModel
from tests.contract import HEADS, INPUTS, random_ids, tiny_config, with_labels

LABELS = ("labels", "start_positions", "end_positions")
NAMES = ["causal", "classes", "a regression", "several targets", "tokens", "an answer", "choices"]
CASES = {
    "masked": ("ForMaskedLM", {}, with_labels(INPUTS["right padding"])),
    **{name: HEADS[name] for name in NAMES},
}
EVERY = pytest.mark.parametrize("name", CASES)
POLICIES = ["mixed_bfloat16", "mixed_float16", "bfloat16"]


def built(name: str, **options):
    """One layer for two of the heads, and the others without, since all heads have the same."""
    head, changes, _ = CASES[name]
    config = tiny_config(**{"num_hidden_layers": int(name in ("masked", "choices")), **changes})
    return getattr(backend, architecture(head))(config, **{"seed": 0, **options})


def data(name: str):
    """Inputs, and labels as `y`."""
    *_, inputs = CASES[name]
    labels = {key: value for key, value in inputs.items() if key in LABELS}
    rest = {key: value for key, value in inputs.items() if key not in LABELS}
    return rest, labels if len(labels) > 1 else labels["labels"]


def compiled(model, **options):
    """Not traced unless the test is about that: tracing is what takes long."""
    model.compile(**{"optimizer": AdamW(1e-2), "run_eagerly": True, **options})
    return model


def assert_same(ours, expected):
    assert type(ours) is type(expected)
    assert ours.keys() == expected.keys()
    for one, other in zip(tf.nest.flatten(ours), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)  # float32


@EVERY
def test_inputs_and_labels_in_every_form(name):
    """As one mapping, beside each other, in lists, in datasets: the same loss, and the same predictions."""
    *_, inputs = CASES[name]
    (rest, y), model = data(name), compiled(built(name))
    expected = model(**inputs)
    forms = {
        "one mapping": (inputs,),
        "labels as y": (rest, y),
        "a list": (list(rest.values()), y),
        "a tuple": (tuple(rest.values()), y),
        "a dataset": (tf.data.Dataset.from_tensor_slices((rest, y)).batch(3),),
    }
    if isinstance(y, dict):
        forms["several labels in a tuple"] = (rest, tuple(y.values()))
    for form, given in forms.items():
        assert model.evaluate(*given, verbose=0) == pytest.approx(float(expected.loss), rel=1e-5), form
    for given in (inputs, *forms["a list"][:1], *forms["a tuple"][:1]):
        record = model.predict(given, verbose=0)
        assert all(isinstance(value, np.ndarray) for _, value in record.named_arrays())
        assert_same(record, model(**rest))


@EVERY
def test_compiled(name):
    """By XLA the loss falls; batches that are not all of one size are predicted as one batch is."""
    *_, inputs = CASES[name]
    rest, y = data(name)
    model = compiled(built(name), optimizer=keras.optimizers.SGD(0.01), run_eagerly=False, jit_compile=True)
    first = model(**inputs).loss
    losses = model.fit(rest, y, epochs=6, shuffle=False, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(float(first), rel=1e-5)
    losses.append(float(model(**inputs).loss))
    assert all(before > after for before, after in itertools.pairwise(losses))
    compiled(model, run_eagerly=False, jit_compile=False)
    assert_same(model.predict(rest, batch_size=2 if len(rest["input_ids"]) > 2 else 1, verbose=0), model(**rest))


@EVERY
def test_saved_with_its_optimizer(name, tmp_path):
    """A model that is saved and loaded trains on where the other stands; its config alone gives the same outline."""
    (rest, y), model = data(name), compiled(built(name, dtype="float64"))  # no noise for AdamW to magnify
    model.fit(rest, y, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    again = type(model).from_config(model.get_config())
    again.load_weights(tmp_path / "model.weights.h5")
    assert_same(again(**rest), model(**rest))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(again) is type(model)
    assert type(loaded.optimizer) is AdamW
    assert loaded.config == again.config == model.config
    for one in (model, loaded):
        compiled(one, optimizer=one.optimizer).fit(rest, y, verbose=0)
    assert_same(loaded(**rest), model(**rest))
    assert np.abs(again(**rest)[0] - model(**rest)[0]).max() > 1e-3  # the control: one step behind


@EVERY
def test_in_a_functional_model(name):
    (rest, _), model = data(name), built(name)
    inputs = {key: keras.Input(value.shape[1:], dtype="int32", name=key) for key, value in rest.items()}
    record = model(inputs)
    assert isinstance(record, ModelOutput)
    outer = keras.Model(inputs, keras.layers.Dense(1)(record[0]))
    expected = outer.layers[-1](model(**rest)[0])
    np.testing.assert_allclose(outer(rest), expected, rtol=0, atol=2e-6)  # float32
    before = model.weights[1].numpy()
    outer.compile(loss="mse", optimizer=keras.optimizers.SGD(0.1), run_eagerly=True)
    outer.fit(rest, np.ones(expected.shape), verbose=0)
    assert np.abs(model.weights[1] - before).max() > 0


def test_a_functional_model_with_a_head_of_ones_own(tmp_path):
    """The base model with a classifier, trained, saved and loaded."""
    base = RobertaPreLayerNormModel(tiny_config(num_hidden_layers=1), seed=0, name="base")
    ids = keras.Input((None,), dtype="int32")
    outer = keras.Model(ids, keras.layers.Dense(3, activation="softmax")(base(ids).pooler_output))
    outer.compile(AdamW(1e-2), "sparse_categorical_crossentropy")
    x, y = random_ids(), np.array([0, 2, 1])
    losses = outer.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    outer.save(tmp_path / "outer.keras")
    loaded = keras.saving.load_model(tmp_path / "outer.keras")
    assert type(loaded.get_layer("base")) is RobertaPreLayerNormModel
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), outer.predict(x, verbose=0))


@pytest.mark.parametrize("policy", POLICIES)
@EVERY
def test_half_precision_trains(name, policy):
    (rest, y), model = data(name), compiled(built(name, dtype=policy))
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    losses = model.fit(rest, y, epochs=6, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert {weight.dtype for weight in model.weights} == {model.variable_dtype}
    assert model(**rest)[0].dtype == model.compute_dtype
    if scaled:
        assert int(model.optimizer.step_counter) == 6  # no step was left out for a gradient that is not finite


def test_a_changed_policy():
    """Layers compute in the policy that they have when they are called, with the weights that they have."""
    model = built("masked")
    expected = model(**data("masked")[0]).logits
    for layer in model._flatten_layers():
        layer.dtype_policy = "mixed_bfloat16"
    logits = model(**data("masked")[0]).logits
    assert logits.dtype == "bfloat16"
    assert {weight.dtype for weight in model.weights} == {"float32"}
    np.testing.assert_allclose(tf.cast(logits, "float32"), expected, rtol=0, atol=16 * 2**-8)


@pytest.mark.parametrize("loss", ["auto", "passthrough"])
def test_the_names_that_transformers_has_for_the_models_own_loss(loss):
    rest, y = data("tokens")
    own, named = (compiled(built("tokens"), **options) for options in ({}, {"loss": loss}))
    assert named.evaluate(rest, y, verbose=0) == own.evaluate(rest, y, verbose=0)


def test_a_loss_of_keras_on_the_logits():
    (rest, _), model = data("classes"), built("classes")
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    found = model.evaluate(rest, np.array([0, 2, 1]), verbose=0, return_dict=True)
    logits = model(**rest).logits
    expected = keras.losses.sparse_categorical_crossentropy(np.array([0, 2, 1]), logits, from_logits=True)
    assert found["loss"] == pytest.approx(float(np.mean(expected)), rel=1e-5)
    assert 0 <= found["accuracy"] <= 1
