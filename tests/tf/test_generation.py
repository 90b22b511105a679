"""What is special to TensorFlow about generation: how often the loop is compiled, XLA, seeds, and Keras around it."""

import copy
import gc
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from roberta_pln.checks import InputError
from roberta_pln.generation import GenerationConfig
from roberta_pln.tf import RobertaPreLayerNormForCausalLM, weights
from roberta_pln.tf.generation import BUCKET, PROGRAMS
from tests.contract import random_ids, tiny_config

IDS = random_ids(2, 5, seed=3)


def decoder(seed=0, dtype="float64", **changes):
    """A decoder that says many different things."""
    config = tiny_config(is_decoder=True, initializer_range=0.5, max_position_embeddings=120, **changes)
    return RobertaPreLayerNormForCausalLM(config, seed=seed, dtype=dtype)


@pytest.fixture(scope="module")
def model():
    return decoder()


def compilations(model) -> int:
    functions = [function for program in model.programs.kept.values() for function in program[1:]]
    return sum(function.experimental_get_tracing_count() for function in functions)


# ------------------------------------------------------------- compiled once


def test_one_compilation_for_a_bucket():
    """Neither lengths nor seeds nor the number of steps compile anew."""
    model = decoder()
    model.generate(IDS, max_new_tokens=5)
    assert compilations(model) == 1
    model.generate(random_ids(2, BUCKET), max_new_tokens=BUCKET, min_new_tokens=7)
    model.generate(IDS[:, :1], max_length=9)
    model.generate(IDS, attention_mask=np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]), max_new_tokens=1)
    assert compilations(model) == 1
    model.generate(random_ids(2, BUCKET + 1), max_new_tokens=5)
    assert compilations(model) == 2
    model.generate(IDS, max_new_tokens=BUCKET + 1)
    assert compilations(model) == 3


def test_a_plan_is_compiled_once():
    model = decoder()
    for seed in range(2):
        model.generate(IDS, max_new_tokens=4, do_sample=True, top_k=7, seed=seed)
    assert compilations(model) == 1
    model.generate(IDS, max_new_tokens=4, do_sample=True, top_k=8, seed=0)
    assert compilations(model) == 2


def test_a_streamer_runs_compiled_steps():
    model, seen = decoder(), []
    for _ in range(2):
        model.generate(IDS, max_new_tokens=4, streamer=seen.append)
    assert compilations(model) == 2  # the first step, and every further one
    assert all(isinstance(tokens, np.ndarray) for tokens in seen)


def test_no_more_programs_than_some_are_kept(monkeypatch):
    monkeypatch.setattr("roberta_pln.tf.generation.PROGRAMS", 2)
    assert PROGRAMS > 2
    model = decoder(num_hidden_layers=0)
    for top_k in (1, 2, 1, 3, 1):
        model.generate(IDS, max_new_tokens=1, do_sample=True, top_k=top_k, seed=0)
    assert len(model.programs.kept) == compilations(model) == 2


def test_compiled_code_goes_with_the_model():
    model = decoder()
    model.generate(IDS, max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------- never stale


def fresh(model):
    """A model of the same weights and config that has compiled nothing."""
    other = RobertaPreLayerNormForCausalLM(model.config, dtype=model.dtype_policy)
    parameters = other.parameters_of_schema
    weights.load(other, [(parameters[name], array) for name, array in weights.dump(model).items()])
    return other


CHANGES = {
    "other weights": lambda model: [variable.assign(-variable) for variable in model.weights],
    "a longer vocabulary": lambda model: model.resize_token_embeddings(120),
    "a vocabulary and back": lambda model: [model.resize_token_embeddings(size) for size in (120, 99)],
    "pruned heads": lambda model: model.prune_heads({0: [1, 2]}),
    "another config": lambda model: setattr(model.config, "pad_token_id", 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_says_what_it_would_say_anew(change):
    model = decoder()
    before = model.generate(IDS, max_new_tokens=12, eos_token_id=98)
    CHANGES[change](model)
    for variable in model.weights:
        variable.assign(0.9 * variable)
    after = model.generate(IDS, max_new_tokens=12, eos_token_id=98)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, fresh(model).generate(IDS, max_new_tokens=12, eos_token_id=98))


# ------------------------------------------------------------- XLA

CALLS = {
    "greedy": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[5, 6], [7]]},
    "sampling": {"do_sample": True, "seed": 5, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.01, "output_logits": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "output_scores": True},
    "beam sampling": {"num_beams": 2, "do_sample": True, "seed": 6, "early_stopping": True},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("call", CALLS)
def test_xla(call, model):
    """The same numbers in graphs, with XLA and step by step."""
    options = {**CALLS[call], "max_new_tokens": 8, "return_dict_in_generate": True}
    expected = model.generate(IDS, **options)
    for how in ({"jit_compile": True}, {"compiled": False}):
        record = model.generate(IDS, **options, **how)
        assert record.keys() == expected.keys()
        np.testing.assert_array_equal(record.sequences, expected.sequences)
        for (name, ours), (_, theirs) in zip(record.named_arrays(), expected.named_arrays(), strict=True):
            # 1e-16 each, a few hundred: other orders of summation
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=name)


def test_xla_with_an_encoder_and_relative_positions():
    model = decoder(add_cross_attention=True, position_embedding_type="relative_key_query")
    states = np.random.default_rng(0).standard_normal((2, 3, 32))
    said = [
        model.generate(IDS, max_new_tokens=8, encoder_hidden_states=states, jit_compile=xla) for xla in (False, True)
    ]
    np.testing.assert_array_equal(*said)


# ------------------------------------------------------------- seeds


def test_seeds(model):
    def sample(seed):
        return model.generate(IDS, max_new_tokens=16, do_sample=True, temperature=3.0, seed=seed).numpy()

    np.testing.assert_array_equal(sample(1), sample(1))
    assert not np.array_equal(sample(1), sample(2))
    assert not np.array_equal(sample(None), sample(None))


def test_without_a_seed_the_models_own_generator_is_drawn_from():
    said = [decoder(seed=4).generate(IDS, max_new_tokens=16, do_sample=True).numpy() for _ in range(2)]
    np.testing.assert_array_equal(*said)


def test_what_is_drawn_is_uniform(model):
    """One token with an even choice of four: each comes about equally often."""
    allowed = [5, 6, 7, 8]
    suppress = [token for token in range(99) if token not in allowed]
    said = model.generate(
        IDS[:1], max_new_tokens=32, do_sample=True, temperature=1e9, top_k=0, suppress_tokens=suppress, seed=0,
        num_return_sequences=32,
    ).numpy()[:, 5:]  # fmt: skip
    counts = np.array([(said == token).sum() for token in allowed])
    assert abs(counts - 256).max() < 5 * np.sqrt(1024 * 0.25 * 0.75)  # five standard deviations


# ------------------------------------------------------------- Keras and TensorFlow around it


def test_inside_a_function_is_refused(model):
    with pytest.raises(InputError, match=r"call it outside of tf\.function"):
        tf.function(lambda: model.generate(IDS), autograph=False)()


def test_dropout_is_off_and_no_tape_records():
    model = decoder(hidden_dropout_prob=0.5)
    with tf.GradientTape() as tape:
        record = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True)
    assert tape.gradient(record.log_probs, model.trainable_variables) == [None] * len(model.trainable_variables)
    np.testing.assert_array_equal(record.sequences, model.generate(IDS, max_new_tokens=6))


def test_gradient_checkpointing_changes_nothing(model):
    expected = model.generate(IDS, max_new_tokens=6)
    model.gradient_checkpointing_enable()
    said = fresh(model).generate(IDS, max_new_tokens=6)
    model.gradient_checkpointing_disable()
    np.testing.assert_array_equal(said, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed_bfloat16"])
def test_dtypes(dtype):
    model = decoder(dtype=dtype)
    expected = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True, compiled=False)
    record = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True)
    assert record.log_probs.dtype == expected.log_probs.dtype == "float32"
    np.testing.assert_array_equal(record.sequences, expected.sequences)


def test_training_between_two_calls():
    model = decoder(dtype="float32")
    before = model.generate(IDS, max_new_tokens=12)
    model.compile(keras.optimizers.SGD(1.0))
    model.fit({"input_ids": IDS, "labels": IDS}, verbose=0)
    after = model.generate(IDS, max_new_tokens=12)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, fresh(model).generate(IDS, max_new_tokens=12))


def test_keras_files_and_copies_keep_the_generation_config(tmp_path):
    model = decoder()
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=7)
    expected = model.generate(IDS)
    model.save(tmp_path / "model.keras")
    for other in (copy.deepcopy(model), keras.models.load_model(tmp_path / "model.keras")):
        assert other.generation_config == model.generation_config
        assert not other.programs.kept
        np.testing.assert_array_equal(other.generate(IDS), expected)
