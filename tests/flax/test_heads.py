"""What JAX and Flax offer, for every head: modules, trees of parameters, transformations, types, an optimiser."""

from functools import cache, partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp
from flax.core import freeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

from roberta_pln import flax, schema
from roberta_pln.outputs import ModelOutput
from tests.contract import HEADS, INPUTS, tiny_config, with_labels

KEY = jax.random.PRNGKey(0)
CASES = {
    "Model": ({}, INPUTS["right padding"], None),
    "ForMaskedLM": ({}, with_labels(INPUTS["right padding"]), 99),
    "ForCausalLM": (*HEADS["causal"][1:], 99),
    "ForSequenceClassification": (*HEADS["classes"][1:], 3),
    "ForTokenClassification": (*HEADS["tokens"][1:], 5),
    "ForQuestionAnswering": (*HEADS["an answer"][1:], 11),
    "ForMultipleChoice": (*HEADS["choices"][1:], 3),
}
"""Changes of `TINY`, arguments, and among how many answers a fresh model guesses."""
# Compiled for one and for many, sums are made in other orders: a few roundings of float32 (6e-8) on numbers of size 5.
CLOSE = dict(rtol=0, atol=5e-6)


jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def make(head: str, changes: dict | None = None, **options):
    config = tiny_config(**{"num_hidden_layers": 1, **CASES[head][0], **(changes or {})})
    return getattr(flax, schema.architecture(head))(config, **options)


@cache
def model(head: str):
    return make(head, dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))


def loss_of(record: ModelOutput) -> jax.Array:
    return record.loss if "loss" in record else jnp.square(record.pooler_output - 0.5).mean()


@pytest.fixture(params=schema.HEADS)
def head(request):
    return request.param


# ---------------------------------------------------------------- transformations


def test_learns_a_batch_by_heart(head):
    """With a TrainState, with dropout, and with the module, which needs no class."""
    _, inputs, answers = CASES[head]

    @jit
    def step(state, key):
        def loss(params):
            rngs = {"dropout": key}
            return loss_of(state.apply_fn({"params": params}, **inputs, deterministic=False, rngs=rngs))

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    state = TrainState.create(apply_fn=model(head).module.apply, params=model(head).params, tx=optax.adam(1e-2))
    losses = []
    for key in jax.random.split(KEY, 40):
        state, value = step(state, key)
        losses.append(float(value))
    assert answers is None or abs(losses[0] - np.log(answers)) < 0.5
    learned = loss_of(state.apply_fn({"params": state.params}, **inputs))  # without dropout
    assert learned < 0.1 * losses[0]


def test_gradient_in_vmap_in_pmap(head):
    """Each group of rows gets the loss and the gradient that it has alone."""
    params, (_, inputs, _) = model(head).params, CASES[head]
    groups = [inputs, {name: value[::-1] for name, value in inputs.items()}]
    stacked = jax.tree.map(lambda *values: np.stack(values)[None], *groups)  # (devices, groups, ...)
    run = jax.value_and_grad(lambda params, inputs: loss_of(model(head)(**inputs, params=params)))
    together = jit(jax.pmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(None, 0)))(params, stacked)
    alone = jit(run)
    for i, group in enumerate(groups):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[0, i], y, **CLOSE), together, alone(params, group))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(together))


# ---------------------------------------------------------------- parameters


def test_trees_of_parameters(head):
    whole, (_, inputs, _) = model(head), CASES[head]
    assert jax.eval_shape(whole.module.init, KEY, **inputs)["params"] == whole.params_shape_tree
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole.params) == whole.params_shape_tree
    assert flatten_dict(whole.params).keys() == whole.required_params
    frozen = freeze(whole.params)
    shapes = [jax.eval_shape(partial(whole, **inputs), params=params) for params in (whole.params, frozen)]
    assert shapes[0].items() == shapes[1].items()
    whole.params = frozen
    assert type(whole.params) is dict


def test_missing_leaves_are_drawn(head):
    """Each from its own key, so that they are those of a whole initialisation."""
    given, other = flatten_dict(model(head).params), flatten_dict(model(head).init_weights(jax.random.PRNGKey(1)))
    missing = list(given)[::3]
    kept = {path: array for path, array in given.items() if path not in missing}
    made = flatten_dict(model(head).init_weights(jax.random.PRNGKey(1), params=freeze(unflatten_dict(kept))))
    assert made.keys() == given.keys()
    for path, array in made.items():
        np.testing.assert_array_equal(array, other[path] if path in missing else given[path])


def test_types(head):
    whole, (_, inputs, _) = model(head), CASES[head]
    kernels = jax.tree.map(lambda x: x.ndim == 2, whole.params)
    for change, dtype in ((whole.to_bf16, "bfloat16"), (whole.to_fp16, "float16")):
        assert {x.dtype.name for x in jax.tree.leaves(change(whole.params))} == {dtype}
        part = change(whole.params, kernels)
        assert {(x.ndim, x.dtype.name) for x in jax.tree.leaves(part)} == {(1, "float32"), (2, dtype)}
        record = jax.eval_shape(partial(whole, **inputs), params=part)
        assert {x.dtype.name for x in jax.tree.leaves(record)} == {"float32"}  # the type of the computation
        assert {x.dtype.name for x in jax.tree.leaves(whole.to_fp32(part))} == {"float32"}
        biases = jax.tree.map(lambda chosen: not chosen, kernels)
        assert {x.dtype.name for x in jax.tree.leaves(whole.to_fp32(part, biases))} == {"float32", dtype}


def test_shapes_cost_no_memory(head):
    """A model that no machine holds, at 4 bytes for each of its parameters."""
    sizes = dict(hidden_size=2**16, num_attention_heads=2**9, intermediate_size=2**18, num_hidden_layers=6)
    huge, (_, inputs, _) = make(head, sizes, _do_init=False), CASES[head]
    assert huge.num_parameters() > 3e11
    assert jax.eval_shape(huge.init_weights, KEY) == huge.params_shape_tree
    assert jax.eval_shape(huge.module.init, KEY, **inputs)["params"] == huge.params_shape_tree
    record = jax.eval_shape(partial(huge, **inputs, output_hidden_states=True), params=huge.params_shape_tree)
    assert record.hidden_states[6].shape[-2:] == (11, 2**16)
    if huge.config.is_decoder:
        past = jax.eval_shape(partial(huge.init_cache, 2**20, 40))
        assert {x.shape for x in jax.tree.leaves(past)} == {(), (2**20, 40, 2**9, 2**7)}
