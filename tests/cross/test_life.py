"""What happens to a model after it is made: other embeddings, another vocabulary, fewer heads, frozen parameters."""

import importlib

import numpy as np
import pytest

from roberta_pln import backends, checkpoint, schema
from roberta_pln.checks import InputError
from roberta_pln.config import ConfigError
from roberta_pln.surgery import DECODER, LM_BIAS, WORD_TABLE
from tests.contract import INPUTS, load, precision, random_checkpoint, random_tensors, tiny_config, with_labels
from tests.cross.test_equality import failures

NAMES = backends.installed()
LABELLED = with_labels(INPUTS["padding inside"])


@pytest.fixture(params=NAMES)
def backend(request):
    with precision(request.param, "float64"):
        yield request.param


def made(backend: str, folder, head: str = "ForMaskedLM", dtype: str = "float64", **changes):
    return load(backend, random_checkpoint(folder, tiny_config(**changes), head), head, dtype)


def tensors(backend: str, model) -> dict[str, np.ndarray]:
    """The model's parameters by canonical name."""
    weights = importlib.import_module(f"roberta_pln.{backend}.weights")
    return weights.dump(model, model.params) if backend == "flax" else weights.dump(model)


def run(backend: str, model, inputs, gradients: bool = False) -> dict[str, np.ndarray]:
    return importlib.import_module(f"roberta_pln.{backend}.probe").run(model, inputs, gradients)


def table(backend: str, embeddings) -> np.ndarray:
    """The (V, D) array of what `get_input_embeddings` or `get_output_embeddings` returns."""
    if backend == "pt":
        return embeddings.weight.detach().numpy()
    if backend == "tf":
        return np.asarray(embeddings.kernel).T if hasattr(embeddings, "kernel") else np.asarray(embeddings.embeddings)
    return np.asarray(embeddings)


# ------------------------------------------------------------------ the vocabulary

SIZES = {
    "more": ((120,), {}, 120),
    "fewer": ((50,), {}, 50),
    "as many": ((), {}, 99),
    "a multiple": ((), {"pad_to_multiple_of": 64}, 128),
    "more, and a multiple": ((129,), {"pad_to_multiple_of": 64}, 192),
    "fresh rows": ((120,), {"mean_resizing": False}, 120),
}


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in SIZES), ("more", False), ("fewer", False)])
def test_another_vocabulary(backend, name, tied, tmp_path):
    arguments, options, size = SIZES[name]
    model = made(backend, tmp_path, tie_word_embeddings=tied)
    before = tensors(backend, model)
    model.resize_token_embeddings(*arguments, **options)
    after = tensors(backend, model)
    assert model.config.vocab_size == size
    assert set(after) == set(before) == set(schema.expand(model.config, "ForMaskedLM"))
    kept = min(size, 99)
    for changed in {WORD_TABLE, DECODER, LM_BIAS} & set(after):
        assert after[changed].shape == (size, *before[changed].shape[1:])
        assert np.array_equal(after[changed][:kept], before[changed][:kept])
    assert np.count_nonzero(after[LM_BIAS][kept:]) == 0
    assert all(np.array_equal(after[same], before[same]) for same in set(after) - {WORD_TABLE, DECODER, LM_BIAS})
    # New rows are near the mean of the old ones (1e-9 of their variance of 0.01 is a spread of 3e-6), or scattered.
    distances = np.abs(after[WORD_TABLE][kept:] - before[WORD_TABLE].mean(axis=0))
    assert np.all(distances < 3e-5) if options.get("mean_resizing", True) else np.median(distances) > 1e-3
    assert run(backend, model, {"input_ids": np.array([[5, size - 1]])})["logits"].shape == (1, 2, size)
    with pytest.raises(InputError, match=rf"vocab_size \({size}\), got {size}"):
        model(input_ids=np.array([[5, size]]))


@pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")
@pytest.mark.parametrize("tied", [True, False])
def test_every_backend_makes_the_same_vocabulary(tied, tmp_path):
    """Bit for bit; and the models compute the same, outputs and gradients."""
    found, answers = {}, {}
    for name in NAMES:
        with precision(name, "float64"):
            model = made(name, tmp_path, tie_word_embeddings=tied)
            model.resize_token_embeddings(120)
            found[name] = tensors(name, model)
            answers[name] = run(name, model, LABELLED, gradients=True)
    first = found[NAMES[0]]
    assert all(np.array_equal(other[name], first[name]) for other in found.values() for name in first)
    assert failures(answers) == []


def test_another_vocabulary_and_back_and_on_disk(backend, tmp_path):
    """Resized twice, saved, loaded: as it was, the rows in between included."""
    model = made(backend, tmp_path)
    before = tensors(backend, model)
    model.resize_token_embeddings(120)
    model.resize_token_embeddings(99)
    assert all(np.array_equal(array, before[name]) for name, array in tensors(backend, model).items())
    model.resize_token_embeddings(101)
    after = tensors(backend, model)
    for safe in (True, False):
        model.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        again = load(backend, tmp_path / str(safe), "ForMaskedLM")
        assert again.config.vocab_size == 101
        assert all(np.array_equal(array, after[name]) for name, array in tensors(backend, again).items())


def test_half_precision_keeps_its_type(backend, tmp_path):
    model = made(backend, tmp_path, dtype="bfloat16")
    model.resize_token_embeddings(120)
    assert {str(array.dtype) for array in tensors(backend, model).values()} == {"bfloat16"}


def test_transformers_resizes_alike(tmp_path):
    """Shapes, kept rows, the bias and where the new rows are; those themselves are random there."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    ours = made("pt", tmp_path)
    theirs = transformers.RobertaPreLayerNormForMaskedLM.from_pretrained(tmp_path).double()
    ours.resize_token_embeddings(120)
    theirs.resize_token_embeddings(120)
    mine, their = ours.state_dict(), theirs.state_dict()
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in their.items()}
    for name, value in mine.items():
        np.testing.assert_allclose(value, their[name], rtol=0, atol=3e-5, err_msg=name)  # ten times the spread above
    assert ours.lm_head.decoder.out_features == theirs.lm_head.decoder.out_features == 120
    assert ours.get_input_embeddings().num_embeddings == 120


REFUSED_SIZES = {
    "none at all": ((0,), {}, "new_num_tokens must be an integer of at least 1, got 0"),
    "half a token": ((99.5,), {}, "new_num_tokens must be an integer of at least 1, got 99.5"),
    "multiples of nothing": ((), {"pad_to_multiple_of": 0}, "pad_to_multiple_of must be .* got 0"),
    "no special tokens": ((2,), {}, r"must keep the special tokens \(.*\), which needs .* at least 3, got 2"),
}


@pytest.mark.parametrize("name", REFUSED_SIZES)
def test_vocabularies_that_are_refused(backend, name, tmp_path):
    arguments, options, message = REFUSED_SIZES[name]
    model = made(backend, tmp_path)
    before = tensors(backend, model)
    with pytest.raises(ConfigError, match=message):
        model.resize_token_embeddings(*arguments, **options)
    assert model.config.vocab_size == 99
    assert all(np.array_equal(array, before[name]) for name, array in tensors(backend, model).items())


# ------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings(backend, tied, tmp_path):
    model = made(backend, tmp_path, tie_word_embeddings=tied)
    before = tensors(backend, model)
    assert np.array_equal(table(backend, model.get_input_embeddings()), before[WORD_TABLE])
    output = table(backend, model.get_output_embeddings())
    assert np.array_equal(output, before[WORD_TABLE if tied else DECODER])

    new = np.random.default_rng(0).standard_normal((99, 32))
    model.set_input_embeddings(new)
    after = tensors(backend, model)
    assert [name for name in after if not np.array_equal(after[name], before[name])] == [WORD_TABLE]
    assert np.array_equal(after[WORD_TABLE], new)
    assert np.array_equal(table(backend, model.get_output_embeddings()), new if tied else before[DECODER])
    if tied:
        with pytest.raises(InputError, match="the output embeddings are the word table: use set_input_embeddings"):
            model.set_output_embeddings(new)
    else:
        model.set_output_embeddings(2 * new)
        assert np.array_equal(table(backend, model.get_output_embeddings()), 2 * new)
    with pytest.raises(InputError, match=r"= \(99, 32\), got \(98, 32\); resize_token_embeddings changes"):
        model.set_input_embeddings(new[1:])


def test_embeddings_of_another_model(backend, tmp_path):
    """What the getter of one model returns, the setter of another takes."""
    one, other = made(backend, tmp_path / "one"), made(backend, tmp_path / "other", head="Model")
    new = np.random.default_rng(0).standard_normal((99, 32))
    one.set_input_embeddings(new)
    other.set_input_embeddings(one.get_input_embeddings())
    assert np.array_equal(table(backend, other.get_input_embeddings()), new)
    assert other.get_output_embeddings() is None
    with pytest.raises(InputError, match="RobertaPreLayerNormModel has no output embeddings"):
        other.set_output_embeddings(new)


# ------------------------------------------------------------------ heads


def test_pruned_heads(backend, tmp_path):
    """The effect of a head mask of zeros; calls add up; saved and loaded it stays."""
    inputs = INPUTS["padding inside"]
    model = made(backend, tmp_path, "ForTokenClassification")
    model.prune_heads({0: [1, 3]})
    model.prune_heads({0: [3], 1: [0]})
    assert model.config.pruned_heads == {0: [1, 3], 1: [0]}
    mask = np.array([[1.0, 0, 1, 0], [0, 1, 1, 1]])
    masked = run(backend, made(backend, tmp_path, "ForTokenClassification"), {**inputs, "head_mask": mask})
    pruned = run(backend, model, inputs)
    # float64: some hundred roundings of 1e-16
    assert all(np.abs(pruned[name] - masked[name]).max() <= 1e-13 for name in masked)
    assert len(tensors(backend, model)["roberta_prelayernorm.encoder.layer.0.attention.self.query.bias"]) == 16
    model.save_pretrained(tmp_path / "pruned")
    again = load(backend, tmp_path / "pruned", "ForTokenClassification")
    # Products of matrices may add up in another order where the weights begin at another place in memory.
    assert all(np.abs(array - pruned[name]).max() <= 1e-13 for name, array in run(backend, again, inputs).items())


REFUSED_HEADS = {
    "a head that is not there": ({0: [4]}, r"pruned_heads\[0\] must hold heads from 0 to 3, got \[4\]"),
    "a layer that is not there": ({2: [0]}, "pruned_heads names layer 2, but layers are 0 to 1"),
    "all heads": ({1: [0, 1, 2, 3]}, r"pruned_heads\[1\] removes all 4 heads; at least one must stay"),
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_heads_that_are_refused(backend, name, tmp_path):
    heads, message = REFUSED_HEADS[name]
    model = made(backend, tmp_path, "Model")
    with pytest.raises(ConfigError, match=message):
        model.prune_heads(heads)
    assert model.config.pruned_heads == {}


# ------------------------------------------------------------------ parameters


@pytest.mark.parametrize("head", schema.HEADS)
def test_counts(backend, head):
    config = tiny_config(num_labels=2)
    model = backends.BACKENDS[backend].model_class(head)(config)
    sizes = {name: parameter.size for name, parameter in schema.expand(config, head).items()}
    assert model.num_parameters() == sum(sizes.values())
    tables = (99 + 40 + 2) * 32
    assert model.num_parameters(exclude_embeddings=True) == sum(sizes.values()) - tables
    assert model.num_parameters(only_trainable=True) == sum(sizes.values())
    model.freeze()
    outside = sum(size for name, size in sizes.items() if not name.startswith(schema.PREFIX))
    assert model.num_parameters(only_trainable=True) == outside
    model.unfreeze("roberta_prelayernorm.embeddings")
    assert model.num_parameters(only_trainable=True) == outside + tables + 64
    with pytest.raises(ValueError, match="no parameter is at or below 'embeddings'; give paths of canonical names"):
        model.freeze("embeddings")


def one_step(backend: str, model) -> None:
    """One step of gradient descent in the framework's own way."""
    if backend == "pt":
        import torch

        model(**{name: torch.from_numpy(value) for name, value in LABELLED.items()}).loss.backward()
        torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1).step()
    elif backend == "tf":
        import keras

        model.compile(optimizer=keras.optimizers.SGD(0.1))
        model.train_on_batch(LABELLED)
    else:
        import jax
        import optax

        labels = {True: optax.sgd(0.1), False: optax.set_to_zero()}
        optimizer = optax.multi_transform(labels, model.trainable_mask())
        gradients = jax.grad(lambda params: model(**LABELLED, params=params).loss)(model.params)
        updates, _ = optimizer.update(gradients, optimizer.init(model.params))
        model.params = optax.apply_updates(model.params, updates)


@pytest.mark.parametrize("frozen", [("roberta_prelayernorm.encoder.layer.0", "lm_head.bias"), ()])
def test_frozen_parameters_stay(backend, frozen, tmp_path):
    """Also when they are resized in between; the others move."""
    model = made(backend, tmp_path)
    model.freeze(*frozen)
    model.resize_token_embeddings(100)
    before = tensors(backend, model)
    before = {name: array.copy() for name, array in before.items()}
    one_step(backend, model)
    same = {name for name, array in tensors(backend, model).items() if np.array_equal(array, before[name])}
    expected = schema.select(schema.expand(model.config, "ForMaskedLM"), frozen or (schema.PREFIX,))
    # No attention depends on the bias of its keys, so that one moves by roundings at most.
    assert {name for name in same if not name.endswith("key.bias")} == {
        item.name for item in expected if not item.name.endswith("key.bias")
    }


def test_parameters_are_drawn_anew(backend, tmp_path):
    model = made(backend, tmp_path)
    if backend == "flax":
        import jax

        model.params = model.init_weights(jax.random.key(0))
    else:
        model.init_weights()
    for name, parameter in model.parameters_of_schema.items():
        array = tensors(backend, model)[name]
        if parameter.initializer == "normal":
            assert 0 < np.abs(array).max() < 6 * 0.02, name  # 6 sigma; the weights before are five times as wide
        else:
            assert np.all(array == parameter.initializer), name
    model.tie_weights()
    assert np.array_equal(table(backend, model.get_output_embeddings()), tensors(backend, model)[WORD_TABLE])


# ------------------------------------------------------------------ gradient checkpointing


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForCausalLM"])
def test_gradient_checkpointing_changes_no_number(backend, head, tmp_path):
    decoder = {"is_decoder": True, "add_cross_attention": True} if head == "ForCausalLM" else {}
    model = made(backend, tmp_path, head, **decoder)
    states = {"encoder_hidden_states": np.random.default_rng(2).standard_normal((3, 5, 32))} if decoder else {}
    inputs = {**LABELLED, **states}
    without = run(backend, model, inputs, gradients=True)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    with_it = run(backend, model, inputs, gradients=True)
    for name, array in without.items():
        # The same operations in the same order; XLA may fuse them otherwise, which moves last digits of float64.
        np.testing.assert_allclose(with_it[name], array, rtol=1e-13, atol=1e-15, err_msg=name)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_changed_tensor_is_seen(tmp_path):
    """The control: the comparisons above are of all parameters, and exact."""
    name = "roberta_prelayernorm.encoder.layer.1.output.dense.bias"
    changed = random_tensors(tiny_config(), "ForMaskedLM")
    changed[name] = changed[name] + np.float32(1e-7)
    checkpoint.save(changed, tmp_path, tiny_config(), "ForMaskedLM")
    found = tensors(NAMES[0], load(NAMES[0], tmp_path, "ForMaskedLM"))
    plain = random_tensors(tiny_config(), "ForMaskedLM")
    assert [key for key in plain if not np.array_equal(plain[key], found[key])] == [name]
