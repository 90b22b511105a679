"""JAX's transformations of calls, and what they see of ids that are out of range."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from roberta_pln.checks import InputError
from roberta_pln.flax import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel
from roberta_pln.outputs import BaseModelOutput, MaskedLMOutput
from tests.contract import INPUTS, random_ids, tiny_config, with_labels

# Compiled code orders its sums otherwise: a few roundings of float32 (6e-8) on numbers of size 3.
CLOSE = dict(rtol=0, atol=2e-6)
IDS = random_ids()
BAD = {
    "input_ids": (-1, -99, 99, 100, 2**31 - 1),
    "token_type_ids": (-1, 2),
    "position_ids": (-1, -40, 40),
}


@pytest.fixture(scope="module")
def masked_lm():
    return RobertaPreLayerNormForMaskedLM(tiny_config())


@pytest.fixture(scope="module")
def base():
    return RobertaPreLayerNormModel(tiny_config())


@pytest.mark.parametrize("name", ["right padding", "a fully padded row", "a head mask", "embeddings"])
def test_compiled_is_eager(masked_lm, name):
    inputs = with_labels(INPUTS[name])

    def call(inputs):
        return masked_lm(**inputs, output_hidden_states=True, output_attentions=True)

    eager, compiled = call(inputs), jax.jit(call)(inputs)
    assert isinstance(compiled, MaskedLMOutput)
    assert compiled.keys() == eager.keys() == ("loss", "logits", "hidden_states", "attentions")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), eager, compiled)


def test_module_can_be_compiled_without_its_class(masked_lm):
    compiled = jax.jit(masked_lm.module.apply)({"params": masked_lm.params}, IDS)
    np.testing.assert_allclose(compiled.logits, masked_lm(IDS).logits, **CLOSE)


def test_vmap_over_inputs_and_over_parameters(base):
    groups = np.stack([IDS, IDS[::-1]])
    together = jax.jit(jax.vmap(base))(groups)
    assert isinstance(together, BaseModelOutput)
    np.testing.assert_allclose(together.last_hidden_state[1], base(groups[1])[0], **CLOSE)
    twice = jax.tree.map(lambda value: jnp.stack([value, 2 * value]), base.params)
    outputs = jax.jit(jax.vmap(lambda params: base(IDS, params=params)[0]))(twice)
    np.testing.assert_allclose(outputs[0], base(IDS)[0], **CLOSE)


def test_record_is_a_tree_with_names(base):
    record = base(IDS, output_hidden_states=True)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(record)]
    assert paths == [".last_hidden_state", ".pooler_output", *(f".hidden_states[{i}]" for i in range(3))]
    assert jax.tree.map(jnp.shape, record).pooler_output == (3, 32)


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_bad_id_is_an_error_where_it_is_seen_and_nan_where_not(base, name, bad):
    ids = {"input_ids": IDS, name: np.where(np.arange(33).reshape(3, 11) == 14, bad, IDS if name == "input_ids" else 0)}
    with pytest.raises(InputError, match=f"{name} must be at least 0 and below .*, got {bad}"):
        base(**ids)
    output = jax.jit(lambda ids: base(**ids))(ids).last_hidden_state
    assert np.isnan(output).all(axis=(1, 2)).tolist() == [False, True, False]
    assert np.isfinite(output[0]).all()


def test_id_beyond_32_bits_does_not_wrap(base):
    with pytest.raises(InputError, match="input_ids must be"):
        base(np.array([[2**32 + 5]]))


@pytest.mark.parametrize("bad", [-1, 99, -101])
def test_bad_label_is_an_error_where_it_is_seen_and_nan_where_not(masked_lm, bad):
    labels = np.where(np.arange(33).reshape(3, 11) == 14, bad, IDS)
    with pytest.raises(InputError, match=f"labels must be at least 0 and below 99, .*, got {bad}"):
        masked_lm(IDS, labels=labels)
    assert np.isnan(jax.jit(lambda labels: masked_lm(IDS, labels=labels).loss)(labels))


def test_no_label_is_nan(masked_lm):
    assert np.isnan(masked_lm(IDS, labels=np.full_like(IDS, -100)).loss)


@pytest.mark.parametrize("cross", [False, True])
def test_compiled_steps_over_the_cache_are_one_call(cross):
    model = RobertaPreLayerNormModel(tiny_config(is_decoder=True, add_cross_attention=cross))
    states = {"encoder_hidden_states": np.random.default_rng(0).standard_normal((3, 5, 32))} if cross else {}
    step = jax.jit(lambda ids, past: model(ids, past_key_values=past, **states))
    first = step(IDS[:, :6], None)
    second = step(IDS[:, 6:], first.past_key_values)
    assert [len(layer) for layer in second.past_key_values] == [4 if cross else 2] * 2
    assert second.past_key_values[0][0].shape == (3, 4, 11, 8)
    np.testing.assert_allclose(second[0], model(IDS, **states)[0][:, 6:], **CLOSE)
