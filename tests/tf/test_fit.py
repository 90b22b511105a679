"""Keras' compile, fit, evaluate and predict."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from roberta_pln.checks import InputError
from roberta_pln.outputs import MaskedLMOutput
from roberta_pln.tf import RobertaPreLayerNormForCausalLM, RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel
from tests.contract import INPUTS, random_ids, tiny_config, with_labels

INPUT = INPUTS["right padding"]
LABELS = with_labels(INPUT)["labels"]


def masked_lm(**changes):
    return RobertaPreLayerNormForMaskedLM(tiny_config(**{"num_hidden_layers": 1, **changes}), seed=0)


def compiled(model, **options):
    """Not traced unless the test is about that: tracing is what takes long."""
    model.compile(**{"optimizer": keras.optimizers.SGD(1.0), "run_eagerly": True, **options})
    return model


def fit(model, *data, **options):
    return model.fit(*data, verbose=0, shuffle=False, **options).history


DATA = {
    "labels in x": ({**INPUT, "labels": LABELS},),
    "labels as y": (INPUT, LABELS),
    "a mapping as y": (INPUT, {"labels": LABELS}),
}


@pytest.mark.parametrize("data", DATA)
def test_the_models_own_loss(data):
    model = compiled(masked_lm())
    expected = model(**INPUT, labels=LABELS).loss
    assert model.evaluate(*DATA[data], verbose=0) == pytest.approx(float(expected), rel=1e-6)  # float32
    losses = fit(model, *DATA[data], epochs=5)["loss"]
    assert losses[0] == pytest.approx(float(expected), rel=1e-6)
    assert losses[-1] < 0.8 * losses[0]


def test_segments_of_a_causal_model():
    """Labels beside the inputs are left out where the text before would predict them, as in a call."""
    config = tiny_config(num_hidden_layers=1, is_decoder=True)
    ids, segments = random_ids(), np.repeat([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0]], 3, axis=0)
    given = {"input_ids": ids, "segment_ids": segments}
    fresh = RobertaPreLayerNormForCausalLM(config, seed=0)
    expected = fresh(**given, labels=ids).loss
    assert float(fresh.own_loss(fresh(**given).logits, tf.constant(ids))) != pytest.approx(float(expected), rel=1e-3)
    for options in ({}, {"metrics": ["accuracy"]}):
        model = compiled(RobertaPreLayerNormForCausalLM(config, seed=0), **options)
        for data in ((given, ids), ({**given, "labels": ids},)):
            found = model.evaluate(*data, verbose=0, return_dict=True)["loss"]
            assert found == pytest.approx(float(expected), rel=1e-6)  # float32
        assert fit(model, given, ids)["loss"][0] == pytest.approx(float(expected), rel=1e-6)


def test_positional_inputs():
    model = compiled(masked_lm())
    mapping = model.evaluate(INPUT, LABELS, verbose=0)
    assert model.evaluate((INPUT["input_ids"], INPUT["attention_mask"]), LABELS, verbose=0) == mapping


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}], ids=str)
def test_compiled_or_not_the_steps_are_the_same(options):
    """Three steps of SGD in float64 against three written out."""
    config = tiny_config(num_hidden_layers=1)
    model, other = (RobertaPreLayerNormForMaskedLM(config, seed=0, dtype="float64") for _ in range(2))
    options = {"run_eagerly": False, **options}
    fit(compiled(model, optimizer=keras.optimizers.SGD(0.1), **options), INPUT, LABELS, epochs=3)
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = other(**INPUT, labels=LABELS).loss
        for variable, gradient in zip(
            other.weights, tape.gradient(loss, [variable.value for variable in other.weights]), strict=True
        ):
            variable.assign_sub(0.1 * tf.convert_to_tensor(gradient))
    for ours, expected in zip(model.weights, other.weights, strict=True):
        # Keras keeps the learning rate in float32: 0.1 is off by 1.5e-8 of itself
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-8)


def test_fit_trains_and_evaluate_does_not_drop():
    model = compiled(masked_lm(hidden_dropout_prob=1.0), optimizer=keras.optimizers.SGD(0.0))
    evaluated = model.evaluate(INPUT, LABELS, verbose=0)
    assert evaluated == pytest.approx(float(model(**INPUT, labels=LABELS).loss), rel=1e-6)  # float32
    trained = fit(model, INPUT, LABELS)["loss"][0]
    assert trained == pytest.approx(float(model(**INPUT, labels=LABELS, training=True).loss), rel=1e-6)
    assert trained != pytest.approx(evaluated, rel=1e-6)


def test_a_loss_and_metrics_of_keras():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    metric = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model = compiled(masked_lm(), loss=loss, metrics=[metric])
    logits = model(**INPUT).logits
    accuracy = np.mean(np.argmax(logits, axis=-1) == LABELS)
    for data in DATA.values():
        result = model.evaluate(*data, verbose=0, return_dict=True)
        assert result["accuracy"] == pytest.approx(accuracy)
        assert result["loss"] == pytest.approx(float(loss(LABELS, logits)), rel=1e-6)  # float32
    weights = np.zeros(LABELS.shape)
    assert model.evaluate(INPUT, np.abs(LABELS) % 99, sample_weight=weights, verbose=0)[0] == 0
    assert fit(model, INPUT, LABELS, epochs=5)["loss"][-1] < result["loss"]


def test_a_metric_beside_the_models_own_loss():
    model = compiled(masked_lm(), metrics=["accuracy"])
    ids = random_ids()
    accuracy = np.mean(np.argmax(model(ids).logits, axis=-1) == ids)
    assert fit(model, {"input_ids": ids, "labels": ids})["accuracy"] == pytest.approx([accuracy])


def test_a_step_is_traced_once(monkeypatch):
    """Keras makes the optimizer's variables in the step, which then is traced again without that."""
    model, traced, step = masked_lm(), [], RobertaPreLayerNormForMaskedLM.train_step
    monkeypatch.setattr(
        RobertaPreLayerNormForMaskedLM, "train_step", lambda self, data: traced.append(data) or step(self, data)
    )
    fit(compiled(model, optimizer="adamw", run_eagerly=False), INPUT, LABELS, epochs=2)
    assert len(traced) == 1
    assert model.optimizer.iterations == 2


@pytest.mark.parametrize("jit_compile", [False, True])
def test_predict_returns_the_record_in_numpy(jit_compile):
    model = compiled(masked_lm(output_hidden_states=True), run_eagerly=False, jit_compile=jit_compile)
    expected = model(**INPUT)
    for data in (INPUT, {**INPUT, "labels": LABELS}, tf.data.Dataset.from_tensor_slices(INPUT).batch(2)):
        record = model.predict(data, batch_size=None if isinstance(data, tf.data.Dataset) else 2, verbose=0)
        assert isinstance(record, MaskedLMOutput)
        assert record.keys() == ("logits", "hidden_states")
        assert isinstance(record.logits, np.ndarray)
        np.testing.assert_allclose(record.logits, expected.logits, rtol=0, atol=2e-6)  # float32
        np.testing.assert_allclose(record.hidden_states[1], expected.hidden_states[1], rtol=0, atol=2e-6)


def test_what_is_refused():
    model = compiled(masked_lm())
    with pytest.raises(InputError, match="there are no labels: give them as y"):
        fit(model, INPUT)
    with pytest.raises(InputError, match=r"sample_weight needs a loss in compile\(\)"):
        fit(model, INPUT, LABELS, sample_weight=np.ones(3))
    with pytest.raises(InputError, match="need a model with a head that returns records, got BaseModelOutput"):
        fit(compiled(RobertaPreLayerNormModel(tiny_config())), INPUT, LABELS)
    with pytest.raises(InputError, match="set return_dict=True in the config"):
        fit(compiled(masked_lm(return_dict=False)), INPUT, LABELS)


def test_mixed_precision_trains():
    model = RobertaPreLayerNormForMaskedLM(tiny_config(num_hidden_layers=1), seed=0, dtype="mixed_bfloat16")
    losses = fit(compiled(model), INPUT, LABELS, epochs=5)["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert {variable.dtype for variable in model.weights} == {"float32"}
