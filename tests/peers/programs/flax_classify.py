"""Trains a classifier of texts in a compiled step, with parameters beside the model."""

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from transformers import FlaxRobertaPreLayerNormForSequenceClassification


def main(path, inputs, folder):
    model, params = FlaxRobertaPreLayerNormForSequenceClassification.from_pretrained(path, _do_init=False)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=model.__call__, params=params, tx=optimizer)
    batch = {name: np.asarray(value) for name, value in inputs.items()}
    labels = batch.pop("labels")

    @jax.jit
    def train_step(state, batch, labels, dropout_rng):
        def loss_fn(params):
            logits = state.apply_fn(**batch, params=params, dropout_rng=dropout_rng, train=True).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=gradients), loss

    @jax.jit
    def eval_step(state, batch):
        return state.apply_fn(**batch, params=state.params, train=False)

    losses = []
    for key in jax.random.split(jax.random.PRNGKey(0), 4):
        state, loss = train_step(state, batch, labels, key)
        losses.append(float(loss))
    outputs = eval_step(state, batch)
    return {"losses": losses, "logits": outputs.logits, "classes": outputs.logits.argmax(axis=-1)}
