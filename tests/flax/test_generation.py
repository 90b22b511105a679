"""What is special to Flax about generation: how often the loop is compiled, parameters and keys given to it, meshes."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from roberta_pln import outputs
from roberta_pln.checks import InputError
from roberta_pln.flax import RobertaPreLayerNormForCausalLM, generation
from roberta_pln.flax.cache import Slots, append, entries
from roberta_pln.flax.generation import BUCKET, PROGRAMS
from roberta_pln.generation import GenerationConfig
from tests.contract import random_ids, tiny_config

IDS = random_ids(2, 5, seed=3)
EXTRAS = {
    "greedy": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[5, 6], [7]]},
    "sampling": {"do_sample": True, "seed": 5, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.01, "output_logits": True},
    "beam sampling": {"num_beams": 2, "do_sample": True, "seed": 6, "early_stopping": True, "output_scores": True},
    "without a cache": {"use_cache": False, "forced_eos_token_id": 4, "suppress_tokens": [5], "min_new_tokens": 3},
}


@pytest.fixture(autouse=True)
def exact():
    with jax.enable_x64(True):
        yield


def decoder(seed=0, dtype="float64", _do_init=True, **changes):
    """A decoder that says many different things."""
    config = tiny_config(is_decoder=True, initializer_range=0.5, **{"max_position_embeddings": 120, **changes})
    return RobertaPreLayerNormForCausalLM(config, seed=seed, dtype=dtype, _do_init=_do_init)


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return decoder()


@pytest.fixture
def traces(monkeypatch):
    """A list that becomes longer whenever the rules of a step are traced, which is twice for each compiled loop."""
    seen, allowed = [], generation.allowed
    monkeypatch.setattr(generation, "allowed", lambda *args: seen.append(1) or allowed(*args))
    return seen


def said(model, ids=IDS, **options):
    return np.asarray(model.generate(ids, **{"max_new_tokens": 12, "eos_token_id": 98, **options}).sequences)


# ------------------------------------------------------------- compiled once


def test_one_compilation_for_a_bucket(traces):
    """Neither lengths nor parameters nor the number of steps compile anew."""
    model = decoder()
    model.generate(IDS, max_new_tokens=5)
    assert len(traces) == 2
    model.generate(random_ids(2, BUCKET), max_new_tokens=BUCKET, min_new_tokens=7)
    model.generate(IDS[:, :1], max_length=9, params=jax.tree.map(lambda array: -array, model.params))
    model.generate(IDS, attention_mask=np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]), max_new_tokens=1)
    model.generate(jnp.asarray(IDS), max_new_tokens=6, streamer=None, stopping_criteria=[], logits_processor=[])
    assert len(traces) == 2
    model.generate(random_ids(2, BUCKET + 1), max_new_tokens=5)
    assert len(traces) == 4
    model.generate(IDS, max_new_tokens=BUCKET + 1)
    assert len(traces) == 6


def test_a_plan_is_compiled_once(traces):
    model = decoder()
    for chance in ({"seed": 1}, {"seed": 2}, {"prng_key": jax.random.PRNGKey(3)}, {}):
        model.generate(IDS, max_new_tokens=4, do_sample=True, top_k=7, **chance)
    assert len(traces) == 2
    for draws in (np.zeros((4, 2)), np.full((3, 2), 0.5)):  # what is handed in is another kind of argument
        model.generate(IDS, max_new_tokens=len(draws), do_sample=True, top_k=7, draws=draws)
    assert len(traces) == 4
    model.generate(IDS, max_new_tokens=4, do_sample=True, top_k=8)
    assert len(traces) == 6


def test_a_streamer_runs_compiled_steps(model, traces):
    seen = []
    for _ in range(2):
        record = model.generate(IDS, max_new_tokens=4, streamer=seen.append, top_k=None)
    assert len(traces) == 2  # the first step, and every further one
    assert all(isinstance(tokens, np.ndarray) for tokens in seen)
    np.testing.assert_array_equal(np.concatenate([seen[0], np.stack(seen[1:5], axis=1)], axis=1), record.sequences)


def test_no_more_programs_than_some_are_kept(monkeypatch, traces):
    monkeypatch.setattr(generation, "PROGRAMS", 2)
    assert PROGRAMS > 2
    model = decoder(num_hidden_layers=0)
    for top_k in (1, 2, 1, 3, 1):
        model.generate(IDS, max_new_tokens=1, do_sample=True, top_k=top_k)
    assert len(generation._PROGRAMS[model]) == 2
    assert len(traces) == 6


def test_compiled_code_goes_with_the_model():
    model = decoder()
    model.generate(IDS, max_new_tokens=2)
    (program,) = generation._PROGRAMS[model].values()
    gone = [weakref.ref(item) for item in (model, model.module, program.run)]
    del model, program
    gc.collect()
    assert [item() for item in gone] == [None] * 3


def test_copies(model):
    """They compile for themselves."""
    expected = said(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other not in generation._PROGRAMS
        np.testing.assert_array_equal(said(other), expected)


# ------------------------------------------------------------- never stale

CHANGES = {
    "a longer vocabulary": lambda model: model.resize_token_embeddings(120),
    "a vocabulary and back": lambda model: [model.resize_token_embeddings(size) for size in (120, 99)],
    "pruned heads": lambda model: model.prune_heads({0: [1, 2]}),
    "another config": lambda model: setattr(model.config, "pad_token_id", 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_says_what_it_would_say_anew(change):
    model = decoder()
    before = said(model)
    CHANGES[change](model)
    model.params = jax.tree.map(lambda array: 0.9 * array, model.params)
    fresh = RobertaPreLayerNormForCausalLM(model.config, dtype="float64", _do_init=False)
    after = said(model)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, said(fresh, params=model.params))


def test_parameters_are_given(model):
    other = decoder(seed=1)
    bare = decoder(_do_init=False)
    assert not np.array_equal(said(other), said(model))
    np.testing.assert_array_equal(said(model, params=other.params), said(other))
    np.testing.assert_array_equal(said(bare, params=other.params), said(other))
    with pytest.raises(ValueError, match="has no parameters: give params"):
        said(bare)


def test_processors_are_compiled(traces):
    model = decoder()

    def mute(token):
        return lambda ids, scores, cur_len: jnp.where(jnp.arange(99) == token, -jnp.inf, scores)

    token = said(model)[0, 5]
    quiet = mute(token)
    assert [token in said(model, logits_processor=[each])[:, 5:] for each in (quiet, quiet, mute(98))] == [0, 0, 1]
    assert len(traces) == 2 * 3  # those that are the same are compiled once


# ------------------------------------------------------------- compiled or not


@pytest.mark.parametrize("call", EXTRAS)
def test_step_by_step(call, model):
    options = {**EXTRAS[call], "max_new_tokens": 8}
    expected = model.generate(IDS, **options)
    record = model.generate(IDS, **options, compiled=False)
    assert isinstance(record, outputs.GenerateOutput)
    assert record.keys() == expected.keys()
    np.testing.assert_array_equal(record.sequences, expected.sequences)
    for (name, ours), (_, theirs) in zip(record.named_arrays(), expected.named_arrays(), strict=True):
        # 1e-16 each, a few hundred: other orders of summation
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("call", EXTRAS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_strict_promotion(call, dtype):
    with jax.numpy_dtype_promotion("strict"):
        record = decoder(dtype=dtype, add_cross_attention=True).generate(
            IDS, **EXTRAS[call], max_new_tokens=3, encoder_hidden_states=np.ones((2, 3, 32))
        )
    assert record.sequences.dtype == jnp.int32
    assert record.log_probs.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


def test_gradient_checkpointing_changes_nothing():
    model = decoder()
    expected = said(model)
    model.gradient_checkpointing_enable()
    np.testing.assert_array_equal(said(model), expected)


@pytest.mark.parametrize("table", [120, 20])
def test_relative_positions_up_to_the_end_of_the_table(table):
    """No bucket leaves the table: the distances of its slots would have no embedding."""
    model = decoder(position_embedding_type="relative_key_query", max_position_embeddings=table)
    whole = said(model, max_new_tokens=15)
    assert whole.shape == (2, 20)
    np.testing.assert_array_equal(said(model, max_new_tokens=15, use_cache=False), whole)
    logits = model(whole[:, :-1]).logits
    np.testing.assert_array_equal(logits.argmax(-1)[:, 4:], whole[:, 5:])


# ------------------------------------------------------------- keys


def test_keys(model):
    def sample(**chance):
        return said(model, do_sample=True, temperature=3.0, **chance)

    for chance in ({"prng_key": jax.random.PRNGKey(1)}, {"prng_key": jax.random.key(1)}):
        np.testing.assert_array_equal(sample(seed=1), sample(**chance))
    np.testing.assert_array_equal(sample(), sample(seed=0))
    assert not np.array_equal(sample(seed=1), sample(seed=2))


def test_what_is_drawn_is_uniform(model):
    """An even choice of four tokens: each comes about equally often."""
    allowed = [5, 6, 7, 8]
    options = {"suppress_tokens": [token for token in range(99) if token not in allowed], "temperature": 1e9}
    tokens = said(model, IDS[:1], max_new_tokens=32, do_sample=True, num_return_sequences=32, **options)[:, 5:]
    counts = np.array([(tokens == token).sum() for token in allowed])
    assert abs(counts - 256).max() < 5 * np.sqrt(1024 * 0.25 * 0.75)  # five standard deviations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prng_key": jax.random.PRNGKey(0), "seed": 0, "do_sample": True}, "seed and prng_key are two sources"),
        ({"prng_key": jax.random.PRNGKey(0)}, "prng_key has an effect with do_sample=True only"),
        ({"generator": 1}, "generate has no option generator"),
    ],
)
def test_keys_that_do_not_fit(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate(IDS, **options)


# ------------------------------------------------------------- around it


def test_inside_jit_is_refused(model):
    with pytest.raises(InputError, match=r"call it outside of jax\.jit"):
        jax.jit(lambda ids: model.generate(ids).sequences)(IDS)


@pytest.mark.parametrize("how", [{}, {"compiled": False}, {"streamer": lambda tokens: None}, {"num_beams": 2}])
def test_what_goes_wrong_in_the_loop_is_an_error(model, how):
    params = copy.deepcopy(jax.tree.map(np.array, model.params))
    params["roberta_prelayernorm"]["embeddings"]["position_embeddings"]["embedding"][8] = np.nan  # of the 7th token
    with pytest.raises(InputError, match="the logits of new token 2 are not numbers"):
        model.generate(IDS, params=params, eos_token_id=98, min_new_tokens=12, max_new_tokens=12, **how)


def test_generation_config_is_saved_and_loaded(model, tmp_path):
    model.generation_config, before = GenerationConfig(max_new_tokens=3, eos_token_id=7), model.generation_config
    model.save_pretrained(tmp_path)
    loaded, params = RobertaPreLayerNormForCausalLM.from_pretrained(tmp_path, dtype="float64", _do_init=False)
    assert loaded.generation_config == model.generation_config
    np.testing.assert_array_equal(loaded.generate(IDS, params=params).sequences, model.generate(IDS).sequences)
    model.generation_config = before


def test_processors_of_transformers(model):
    """They see the prompts as they are given, without the padding that fills the bucket."""
    transformers = pytest.importorskip("transformers")
    ending = int(said(model)[0, 7])
    processors = transformers.FlaxLogitsProcessorList([transformers.FlaxMinLengthLogitsProcessor(5 + 7, ending)])
    longer = said(model, eos_token_id=ending, logits_processor=processors)
    np.testing.assert_array_equal(longer, said(model, eos_token_id=ending, min_new_tokens=8))  # it forbids up to 5 + 7
    assert not np.array_equal(longer, said(model, eos_token_id=ending))


def test_slots_on_either_axis():
    new = np.random.default_rng(0).standard_normal((2, 3, 1, 4))
    empty = [Slots(jnp.zeros((2, 3, 5, 4)), jnp.int32(2), axis=2), Slots(jnp.zeros((2, 5, 3, 4)), jnp.int32(2))]
    filled = [append(slots, jnp.asarray(new)) for slots in empty]
    assert [slots.shape for slots in filled] == [(2, 3, 5, 4)] * 2
    np.testing.assert_array_equal(*map(entries, filled))
    np.testing.assert_array_equal(entries(filled[0])[:, :, 2:3], new)
