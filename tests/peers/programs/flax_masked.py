"""Trains a masked language model on every local device."""

import flax
import jax
import jax.numpy as jnp
import optax
from flax.training.common_utils import onehot, shard
from flax.training.train_state import TrainState
from transformers import FlaxRobertaPreLayerNormForMaskedLM


def main(path, inputs, folder):
    model = FlaxRobertaPreLayerNormForMaskedLM.from_pretrained(path, seed=1, dtype=jnp.float32)

    def decay_mask(params):
        flat = flax.traverse_util.flatten_dict(params)
        return flax.traverse_util.unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})

    schedule = optax.linear_schedule(0.0, 1e-3, 4)
    optimizer = optax.adamw(schedule, weight_decay=0.01, mask=decay_mask)
    state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=optimizer)

    def train_step(state, batch, dropout_rng):
        dropout_rng, new_dropout_rng = jax.random.split(dropout_rng)

        def loss_fn(params):
            labels = batch["labels"]
            texts = {name: value for name, value in batch.items() if name != "labels"}
            logits = state.apply_fn(**texts, params=params, dropout_rng=dropout_rng, train=True)[0]
            chosen = jnp.where(labels >= 0, 1.0, 0.0)
            loss = optax.softmax_cross_entropy(logits, onehot(labels, logits.shape[-1])) * chosen
            return loss.sum() / chosen.sum()

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        gradients = jax.lax.pmean(gradients, "batch")
        loss = jax.lax.pmean(loss, "batch")
        return state.apply_gradients(grads=gradients), loss, new_dropout_rng

    p_train_step = jax.pmap(train_step, "batch")
    state = flax.jax_utils.replicate(state)
    keys = jax.random.split(jax.random.PRNGKey(0), jax.local_device_count())
    losses = []
    for _ in range(4):
        state, loss, keys = p_train_step(state, shard(dict(inputs)), keys)
        losses.append(float(flax.jax_utils.unreplicate(loss)))
    params = jax.device_get(flax.jax_utils.unreplicate(state.params))
    model.save_pretrained(folder, params=params)

    model = FlaxRobertaPreLayerNormForMaskedLM.from_pretrained(folder)

    @jax.jit
    def eval_step(input_ids, attention_mask):
        return model(input_ids, attention_mask=attention_mask, output_hidden_states=True)

    outputs = eval_step(inputs["input_ids"], inputs["attention_mask"])
    return {"losses": losses, "logits": outputs.logits, "states": outputs.hidden_states[-1]}
