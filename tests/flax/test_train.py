"""Training with the tools that people use: a TrainState and an optimiser of optax."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
optax = pytest.importorskip("optax")

from flax.training.train_state import TrainState

from roberta_pln.flax import RobertaPreLayerNormForMaskedLM
from tests.contract import random_ids, tiny_config


def test_learns_a_batch_by_heart():
    config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_hidden_layers=1)
    model = RobertaPreLayerNormForMaskedLM(config)
    ids = random_ids(4, 8)

    @jax.jit
    def step(state, key):
        def loss(params):
            rngs = {"dropout": key}
            return state.apply_fn({"params": params}, ids, labels=ids, deterministic=False, rngs=rngs).loss

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    state = TrainState.create(apply_fn=model.module.apply, params=model.params, tx=optax.adamw(1e-2))
    losses = []
    for key in jax.random.split(jax.random.PRNGKey(0), 60):
        state, value = step(state, key)
        losses.append(float(value))
    assert abs(losses[0] - np.log(99)) < 0.5  # a fresh model knows nothing: the loss of 99 equal guesses
    assert losses[-1] < 0.5
    model.params = state.params
    assert model(ids, labels=ids).loss < 0.2
