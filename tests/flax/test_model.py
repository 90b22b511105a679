"""What is particular to Flax: modules without their class, parameter trees, types, keys."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax.core import freeze
from flax.traverse_util import flatten_dict

from roberta_pln import flax, schema
from roberta_pln.flax import (
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForMaskedLMModule,
    RobertaPreLayerNormModel,
    RobertaPreLayerNormModule,
)
from roberta_pln.flax.layers import LayerNorm
from tests.contract import CONFIGS, INPUTS, random_ids, tiny_config, with_labels

IDS = random_ids()
KEY = jax.random.PRNGKey(0)
ALL_CONFIGS = [*CONFIGS.values(), dict(is_decoder=True, add_cross_attention=True)]
CLASSES = {"Model": RobertaPreLayerNormModel, "ForMaskedLM": RobertaPreLayerNormForMaskedLM}


def test_names_of_transformers():
    for name in ("Model", "ForMaskedLM", "PreTrainedModel"):
        assert getattr(flax, f"FlaxRobertaPreLayerNorm{name}") is getattr(flax, f"RobertaPreLayerNorm{name}")


def test_module_and_class_initialise_alike():
    """Linen's own initialisation and the class's draw other numbers from the same distributions."""
    config = tiny_config(
        num_hidden_layers=1,
        initializer_range=0.5,
        is_decoder=True,
        add_cross_attention=True,
        tie_word_embeddings=False,
        position_embedding_type="relative_key",
    )
    model = RobertaPreLayerNormForMaskedLM(config)
    made, own = flatten_dict(jax.jit(model.module.init)(KEY, IDS)["params"]), flatten_dict(model.params)
    assert made.keys() == own.keys() == model.required_params
    for path, values in made.items():
        if path[-1] in ("bias", "scale"):
            np.testing.assert_array_equal(values, own[path])
        else:  # the standard deviation of n draws is known to 1 / sqrt(2 n): five of those, and one row may be zero
            for array in (values, own[path]):
                assert abs(array.std() / 0.5 - 1) < 5 / np.sqrt(2 * array.size) + 0.5 / len(array)
        if path[-2] in ("word_embeddings", "position_embeddings"):
            assert not values[config.pad_token_id].any()
            assert not own[path][config.pad_token_id].any()


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("changes", ALL_CONFIGS)
def test_module_makes_the_parameters_of_the_class(head, changes):
    """Whatever the module is initialised on, ids or embeddings."""
    model = CLASSES[head](tiny_config(**changes), _do_init=False)
    embeddings = jnp.zeros((3, 11, 32))
    for inputs in ({"input_ids": IDS}, {"inputs_embeds": embeddings}):
        made = jax.eval_shape(lambda inputs=inputs: model.module.init(KEY, **inputs))["params"]
        assert made == model.params_shape_tree


def test_module_without_its_class():
    module = RobertaPreLayerNormForMaskedLMModule(tiny_config(hidden_dropout_prob=0.5, num_hidden_layers=1))
    variables = jax.jit(module.init)(KEY, IDS)
    output = module.apply(variables, IDS)
    noisy = module.apply(variables, IDS, deterministic=False, rngs={"dropout": KEY})
    assert np.abs(output.logits - noisy.logits).max() > 0.1


def test_parameters_are_a_plain_tree():
    model = RobertaPreLayerNormForMaskedLM(tiny_config())
    query = model.params["roberta_prelayernorm"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    assert {name: value.shape for name, value in query.items()} == {"kernel": (32, 32), "bias": (32,)}
    assert model.num_parameters() == sum(value.size for value in jax.tree.leaves(model.params)) == 19437
    frozen = freeze(model.params)
    np.testing.assert_array_equal(model(IDS, params=frozen).logits, model(IDS).logits)
    model.params = frozen
    assert type(model.params) is dict
    broken = dict(model.params, other={"bias": 1})
    del broken["lm_head"]
    with pytest.raises(ValueError, match=r"(?s)missing: lm_head\.bias.*unexpected: other\.bias"):
        model.params = broken


def test_without_parameters():
    model = RobertaPreLayerNormModel(tiny_config(), _do_init=False)
    with pytest.raises(ValueError, match="_do_init=False"):
        model(IDS)
    params = model.init_weights(KEY)
    assert model(IDS, params=params)[0].shape == (3, 11, 32)
    part = {"embeddings": params["embeddings"]}
    whole = model.init_weights(jax.random.PRNGKey(1), params=part)
    np.testing.assert_array_equal(
        whole["embeddings"]["word_embeddings"]["embedding"], params["embeddings"]["word_embeddings"]["embedding"]
    )
    assert np.abs(whole["pooler"]["dense"]["kernel"] - params["pooler"]["dense"]["kernel"]).max() > 0


def test_seed_decides_the_parameters():
    first, again, other = (RobertaPreLayerNormModel(tiny_config(), seed=seed).params for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first["pooler"]["dense"]["kernel"] - other["pooler"]["dense"]["kernel"]).max() > 0


def test_disagreement_with_the_schema_is_found(monkeypatch):
    monkeypatch.setattr(schema, "expand", lambda *args, **kwargs: {})
    with pytest.raises(RuntimeError, match="parameters differ from the schema"):
        RobertaPreLayerNormModel(tiny_config())


# ---------------------------------------------------------------- types


def test_float64_needs_the_64_bit_mode():
    for options in (dict(dtype=jnp.float64), dict(dtype="float64"), dict(param_dtype="float64")):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            RobertaPreLayerNormModel(tiny_config(), **options)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        RobertaPreLayerNormModule(tiny_config(), dtype=jnp.float64).init(KEY, IDS)
    with pytest.raises(ValueError, match="dtype must be one of"):
        RobertaPreLayerNormModel(tiny_config(), dtype=jnp.int32)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_one_type_throughout(dtype):
    """Also while JAX is in its 64-bit mode, where positions and NumPy's numbers are wider than the model."""
    inputs = with_labels(INPUTS["a fully padded row"]) | {"head_mask": np.ones(4)}
    config = tiny_config(num_hidden_layers=1)
    params = RobertaPreLayerNormForMaskedLM(config).params
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        model = RobertaPreLayerNormForMaskedLM(config, dtype=dtype, _do_init=False)
        params = jax.tree.map(lambda value: np.asarray(value).astype(model.dtype), params)

        def run(params):
            record = model(**inputs, params=params, output_hidden_states=True, output_attentions=True)
            return record.loss, record

        gradient, record = jax.jit(jax.grad(run, has_aux=True))(params)
    at_least_float32 = "float64" if dtype == "float64" else "float32"
    assert record.loss.dtype == at_least_float32
    for array in jax.tree.leaves((record.to_tuple()[1:], gradient)):
        assert array.dtype == dtype
        assert np.isfinite(np.asarray(array, np.float64)).all()


@pytest.mark.parametrize("changes", ALL_CONFIGS)
def test_strict_promotion(changes):
    model = RobertaPreLayerNormModel(tiny_config(attention_probs_dropout_prob=0.5, **changes), _do_init=False)
    states = np.ones((3, 5, 32)) if model.config.add_cross_attention else None

    def calls(params):
        record = model(IDS, encoder_hidden_states=states, train=True, dropout_rng=KEY, params=params)
        if record.past_key_values:
            for past in (record.past_key_values, model.init_cache(3, 12)):
                step = dict(inputs_embeds=np.ones((3, 1, 32)), encoder_hidden_states=states, params=params)
                model(**step, past_key_values=past)

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(calls, model.params_shape_tree)


def test_parameters_of_another_type_than_the_computation():
    model = RobertaPreLayerNormModel(tiny_config(), dtype="bfloat16", param_dtype="float32")
    assert {value.dtype for value in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model, IDS)[0].dtype == jnp.bfloat16
    half = model.to_bf16(model.params, mask=jax.tree.map(lambda value: value.ndim == 2, model.params))
    assert {(value.ndim, value.dtype.name) for value in jax.tree.leaves(half)} == {(1, "float32"), (2, "bfloat16")}
    assert all(value.dtype == jnp.float16 for value in jax.tree.leaves(model.to_fp16(half)))
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(model.to_fp32(half)))


def test_variance_survives_a_large_mean():
    rows = (1e4 + np.random.default_rng(0).standard_normal((5, 64))).astype(np.float32)
    norm = LayerNorm(1e-5, jnp.float32, jnp.float32)
    wide = rows.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    # The mean is rounded to 1e4 * 6e-8 = 6e-4 at worst; the one-pass variance would be off by more than itself.
    np.testing.assert_allclose(norm.apply(norm.init(KEY, rows), rows), expected, atol=2e-3)


# ---------------------------------------------------------------- dropout


def test_training_needs_a_key():
    with pytest.raises(ValueError, match="dropout_rng"):
        RobertaPreLayerNormModel(tiny_config())(IDS, train=True)


# ---------------------------------------------------------------- calls


def test_gradient_checkpointing_changes_no_number():
    """Whether it is asked for in the constructor or later, and with dropout, whose key decides."""
    config = tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_hidden_layers=1)
    models = [RobertaPreLayerNormForMaskedLM(config, gradient_checkpointing=switch) for switch in (False, True)]
    inputs, params = with_labels(INPUTS["right padding"]), models[0].params

    def trace(model):
        loss = partial(model, **inputs, train=True, dropout_rng=KEY)
        return jax.jit(jax.grad(lambda params: loss(params=params).loss)).trace(params)

    quick = {"xla_backend_optimization_level": 0}
    traces = [trace(model) for model in models]
    assert ["remat" in str(found.jaxpr) for found in traces] == [False, True]
    gradients = [found.lower().compile(quick)(params) for found in traces]
    # What is computed twice may be rounded twice: a few roundings of float32 on sums of size 1.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), *gradients)
    model = models[0]
    for switch, wanted in ((model.gradient_checkpointing_enable, 1), (model.gradient_checkpointing_disable, 0)):
        switch()
        assert model.is_gradient_checkpointing == wanted
        assert str(trace(model).jaxpr) == str(traces[wanted].jaxpr)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert model.module.config is model.config


@pytest.mark.parametrize("tied", [True, False])
def test_pad_rows_learn_from_the_decoder_only(tied):
    inputs = with_labels({"input_ids": INPUTS["pads that are seen"]["input_ids"]})
    model = RobertaPreLayerNormForMaskedLM(tiny_config(num_hidden_layers=0, tie_word_embeddings=tied))
    gradient = jax.jit(jax.grad(lambda params: model(**inputs, params=params).loss))(model.params)
    tables = gradient["roberta_prelayernorm"]["embeddings"]
    assert not tables["position_embeddings"]["embedding"][1].any()
    assert tables["position_embeddings"]["embedding"][2].any()
    assert tables["word_embeddings"]["embedding"][1].any() == tied


def test_arguments_may_be_lists_or_other_arrays():
    model = RobertaPreLayerNormModel(tiny_config())
    expected = model(IDS, attention_mask=np.ones_like(IDS))[0]
    np.testing.assert_array_equal(model(IDS.tolist(), attention_mask=np.ones(IDS.shape).tolist())[0], expected)
    np.testing.assert_array_equal(model(IDS.astype(np.uint8), attention_mask=np.ones(IDS.shape, bool))[0], expected)


def test_tuple_instead_of_record():
    model = RobertaPreLayerNormModel(tiny_config(), add_pooling_layer=False)
    hidden, pooled, states = model(IDS, return_dict=False, output_hidden_states=True)
    assert (hidden.shape, pooled, len(states)) == ((3, 11, 32), None, 3)


def test_only_this_framework_is_imported():
    code = "import sys, roberta_pln.flax; print([m for m in ('torch', 'tensorflow', 'keras') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
