"""Training moves every pair of backends alike, in float64: ten steps on ten batches, in each framework's own loop.

The tolerances: a loss has the roundings of a forward pass, see `test_equality`. SGD adds ten gradients' roundings of
1e-16. AdamW divides by sqrt(v) + 1e-8, so that a rounding of 1e-17 in a gradient that is zero in exact arithmetic, as
that of the bias of the keys, becomes 1e-9 of the learning rate: 1e-12 in a step, 1e-11 in ten. Another epsilon, decay
or rate moves parameters by 1e-8 and more.
"""

from functools import cache, partial

import numpy as np
import pytest

from roberta_pln import backends, checkpoint
from tests.contract import load, precision, random_checkpoint, random_ids, random_tensors, tiny_config

LOSS_TOLERANCE = 1e-12
PARAMETER_TOLERANCE = {"sgd": 1e-14, "adamw": 1e-11}
STEPS = 10
RATE = {"sgd": 2**-4, "adamw": 1e-3}  # Keras keeps the rate of SGD in float32, which is exact for powers of two
DECAY = 0.01

NAMES = backends.installed()
pytestmark = pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")

HEADS = {
    "ForMaskedLM": {},
    "ForSequenceClassification": {"num_labels": 3, "num_hidden_layers": 1},
    "ForCausalLM": {"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": 1},
}
"""Changes of the tiny config."""


def batches(head: str) -> dict[str, np.ndarray]:
    """Ten batches of three rows, stacked."""
    rng = np.random.default_rng(0)
    ids = random_ids(STEPS * 3).reshape(STEPS, 3, 11)
    mask = np.ones_like(ids)
    mask[:, 0, 7:] = 0
    inputs = {"input_ids": np.where(mask > 0, ids, 1), "attention_mask": mask}
    if head == "ForSequenceClassification":
        return {**inputs, "labels": rng.integers(0, 3, (STEPS, 3))}
    if head == "ForCausalLM":
        inputs["encoder_hidden_states"] = rng.standard_normal((STEPS, 3, 5, 32))
    return {**inputs, "labels": np.where(rng.random(ids.shape) < 0.5, ids, -100)}


def rows(stacked: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: value[step] for name, value in stacked.items()} for step in range(STEPS)]


def train_pt(model, data, optimizer):
    import torch

    kinds = {"sgd": torch.optim.SGD, "adamw": partial(torch.optim.AdamW, weight_decay=DECAY)}
    stepper, losses = kinds[optimizer](model.parameters(), lr=RATE[optimizer]), []
    for batch in rows(data):
        stepper.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    return losses


def train_tf(model, data, optimizer):
    import keras
    import tensorflow as tf

    from roberta_pln.tf import AdamW

    kinds = {
        "sgd": partial(keras.optimizers.SGD, RATE["sgd"]),
        "adamw": partial(AdamW, RATE["adamw"], weight_decay=DECAY),
        "adamw of Keras": partial(keras.optimizers.AdamW, RATE["adamw"], weight_decay=DECAY, epsilon=1e-8),
    }
    model.compile(optimizer=kinds[optimizer](), jit_compile=False)
    losses, steps = [], rows(data)
    # what `fit` reports is a running mean in float32
    watch = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda i, logs: losses.append(model(**steps[i]).loss))
    model.fit(tf.data.Dataset.from_tensor_slices(data), callbacks=[watch], shuffle=False, verbose=0)
    return [float(loss) for loss in losses]


def train_flax(model, data, optimizer):
    import jax
    import optax

    kinds = {"sgd": optax.sgd, "adamw": partial(optax.adamw, weight_decay=DECAY)}
    transform = kinds[optimizer](RATE[optimizer])

    @jax.jit
    def step(params, state, batch):
        call = partial(model, **batch, train=True, dropout_rng=jax.random.key(0))  # the rates are zero
        loss, gradient = jax.value_and_grad(lambda params: call(params=params).loss)(params)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = model.params, transform.init(model.params), []
    for batch in rows(data):
        params, state, loss = step(params, state, batch)
        losses.append(loss.item())
    model.params = params
    return losses


TRAIN = {"pt": train_pt, "tf": train_tf, "flax": train_flax}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses and parameters after training, by backend, head and optimizer."""

    @cache
    def run(backend: str, head: str, optimizer: str):
        config = tiny_config(**HEADS[head])
        path = random_checkpoint(tmp_path_factory.mktemp(head), config, head)
        with precision(backend, "float64"):
            model = load(backend, path, head)
            losses = TRAIN[backend](model, batches(head), optimizer)
            model.save_pretrained(path / "trained")
        return losses, dict(checkpoint.open(path / "trained"))

    return run


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of a parameter."""
    assert one.keys() == other.keys()
    return max(np.abs(one[name] - other[name]).max() for name in one)


@pytest.mark.parametrize("optimizer", RATE)
@pytest.mark.parametrize("head", HEADS)
def test_ten_steps(trained, head, optimizer):
    losses, parameters = trained(NAMES[0], head, optimizer)
    assert np.isfinite(losses).all()
    for backend in NAMES[1:]:
        other_losses, other_parameters = trained(backend, head, optimizer)
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=LOSS_TOLERANCE)
        assert apart(other_parameters, parameters) < PARAMETER_TOLERANCE[optimizer]


@pytest.mark.parametrize("backend", NAMES)
def test_rows_of_padding_decay_as_all_others(trained, backend):
    """Without a decoder that is tied to it no gradient reaches the row, so the decay is all that moves it."""
    head = "ForSequenceClassification"
    start = random_tensors(tiny_config(**HEADS[head]), head)
    _, parameters = trained(backend, head, "adamw")
    for table in ("word_embeddings", "position_embeddings"):
        name = f"roberta_prelayernorm.embeddings.{table}.weight"
        expected = start[name][1].astype(np.float64) * (1 - RATE["adamw"] * DECAY) ** STEPS
        np.testing.assert_allclose(parameters[name][1], expected, rtol=1e-15 * STEPS)  # a rounding in each step
        assert np.abs(parameters[name][2:] - start[name][2:]).max() > RATE["adamw"]


@pytest.mark.skipif("tf" not in NAMES, reason="it is about Keras")
def test_another_adamw_is_seen(trained):
    """The control: Keras' own adds epsilon at another place."""
    head = "ForSequenceClassification"
    _, ours = trained("tf", head, "adamw")
    _, theirs = trained("tf", head, "adamw of Keras")
    assert apart(theirs, ours) > 1000 * PARAMETER_TOLERANCE["adamw"]
