"""Training with the tools that people use: a TrainState and an optimiser of optax."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
optax = pytest.importorskip("optax")

from flax.training.train_state import TrainState

from roberta_pln.flax import RobertaPreLayerNormForMaskedLM
from tests.contract import random_ids, tiny_config


@pytest.mark.parametrize("with_class", [True, False])
def test_learns_a_batch_by_heart(with_class):
    model = RobertaPreLayerNormForMaskedLM(tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    ids = random_ids(4, 8)

    def apply(params, ids, labels, key):
        if with_class:
            return model(ids, labels=labels, params=params, dropout_rng=key, train=True)
        rngs = {"dropout": key}
        return model.module.apply({"params": params}, ids, labels=labels, deterministic=False, rngs=rngs)

    @jax.jit
    def step(state, key):
        loss, gradient = jax.value_and_grad(lambda params: state.apply_fn(params, ids, ids, key).loss)(state.params)
        return state.apply_gradients(grads=gradient), loss

    state = TrainState.create(apply_fn=apply, params=model.params, tx=optax.adamw(1e-2))
    losses = []
    for key in jax.random.split(jax.random.PRNGKey(0), 60):
        state, loss = step(state, key)
        losses.append(float(loss))
    assert abs(losses[0] - np.log(99)) < 0.5  # a fresh model knows nothing: the loss of 99 equal guesses
    assert losses[-1] < 0.5
    before = model(ids, labels=ids).loss
    model.params = state.params
    assert model(ids, labels=ids).loss < 0.2 < before
