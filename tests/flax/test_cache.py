"""The cache of fixed size: as exact as no cache and as the cache that grows, one compilation, and what it refuses.

All in float64. The tolerance is that of `tests/cross/test_equality.py`: sums of some hundred terms of size 1, of which
each rounding is 1e-16. A token at the wrong place, or one hidden that should be seen, differs by 1e-2 and more.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from roberta_pln.checks import InputError
from roberta_pln.flax import RobertaPreLayerNormForCausalLM, RobertaPreLayerNormModel
from tests.contract import load, padded, random_checkpoint, random_ids, tiny_config

CLOSE = dict(rtol=0, atol=1e-12)
IDS, LENGTH, ROOM = random_ids(), 11, 12
WHOLE = [slice(0, 11)]
PARTS = [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7), slice(7, 11)]  # two compilations, for 4 tokens and for 1
CONFIGS = {
    "plain": {},
    "with an encoder": {"add_cross_attention": True},
    "relative_key_query": {"position_embedding_type": "relative_key_query"},
    "pruned heads": {"pruned_heads": {0: [1, 3], 1: [0]}},
}
STATES = {
    "encoder_hidden_states": np.random.default_rng(0).standard_normal((3, 5, 32)),
    "encoder_attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]),
}


KEY = ("roberta_prelayernorm", "encoder", "layer", "1", "attention", "self", "cached_key")
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


@pytest.fixture(autouse=True)
def exact():
    with jax.enable_x64(True):
        yield


@cache
def model(name: str = "plain", head: str = "ForCausalLM", dtype: str = "float64"):
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(is_decoder=True, **CONFIGS[name])
        return load("flax", random_checkpoint(Path(folder), config, head), head, dtype)


@cache
def compiled(name: str = "plain", head: str = "ForCausalLM"):
    """A compiled call; what the encoder gave is an argument like any other."""
    return jit(lambda ids, past, **inputs: model(name, head)(ids, past_key_values=past, **inputs))


def run(name, head, past, parts, mask=None, positions=None, **inputs):
    """The outputs of all parts one behind the other, and the last cache."""
    static, outputs = past is not None, []
    inputs |= STATES if name == "with an encoder" else {}
    for part in parts:
        if mask is not None:  # over all slots, or over the tokens so far
            inputs["attention_mask"] = np.pad(mask, ((0, 0), (0, ROOM - LENGTH))) if static else mask[:, : part.stop]
        if positions is not None:
            inputs["position_ids"] = positions[:, part]
        record = compiled(name, head)(inputs["ids"][:, part], past, **{k: v for k, v in inputs.items() if k != "ids"})
        past = record.past_key_values
        outputs.append(record[0])
    return np.concatenate(outputs, axis=1), past


def kind(tree):
    return jax.tree.map(lambda array: (array.shape, array.dtype.name), tree)


@pytest.mark.parametrize(("name", "head"), [*((name, "ForCausalLM") for name in CONFIGS), ("with an encoder", "Model")])
def test_parts_are_the_whole(name, head):
    empty = model(name, head).init_cache(3, ROOM)
    found, past = run(name, head, empty, PARTS, ids=IDS)
    np.testing.assert_allclose(found, run(name, head, None, WHOLE, ids=IDS)[0], **CLOSE)
    assert kind(past) == kind(empty)
    assert {int(x) for path, x in flatten_dict(past).items() if path[-1] == "cache_index"} == {LENGTH}
    assert not any(array.any() for array in jax.tree.leaves(empty))


@pytest.mark.parametrize("explicit", [True, False])
def test_left_padding_is_as_with_the_cache_that_grows(explicit):
    """Also in the rows of the padding, which see no token, and so all tokens that are there alike."""
    parts = [slice(0, 10), slice(10, 11)]
    inputs = padded(IDS, (0, slice(0, 5)), (2, slice(0, 1)))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = mask.cumsum(axis=1) * mask + 1 if explicit else None
    given = dict(ids=ids, mask=mask, positions=positions)
    slots, past = run("plain", "ForCausalLM", model().init_cache(3, ROOM), parts, **given)
    grown, grown_past = run("plain", "ForCausalLM", None, parts, **given)
    np.testing.assert_allclose(slots, grown, **CLOSE)
    for i, (key, value) in enumerate(grown_past):
        item = past["roberta_prelayernorm"]["encoder"]["layer"][str(i)]["attention"]["self"]
        np.testing.assert_allclose(item["cached_key"][:, :LENGTH], key.swapaxes(1, 2), **CLOSE)
        np.testing.assert_allclose(item["cached_value"][:, :LENGTH], value.swapaxes(1, 2), **CLOSE)
    whole = run("plain", "ForCausalLM", None, WHOLE, ids=ids, mask=mask)[0]
    difference = np.abs(slots - whole)[mask > 0].max()
    assert difference < 1e-12 if explicit else difference > 1e-2  # the automatic ones count cached padding as tokens


def test_masks_of_more_axes_and_embeddings():
    """A complete pattern says nothing of slots that hold no token."""
    call, causal = jit(model()), np.tril(np.ones((3, 11, ROOM), int))
    embeddings = np.random.default_rng(0).standard_normal((3, 11, 32))
    expected = call(inputs_embeds=embeddings, input_ids=None).logits
    past = model().init_cache(3, ROOM)
    for part in (slice(0, 10), slice(10, 11)):
        given = {"inputs_embeds": embeddings[:, part], "past_key_values": freeze(past)}
        record = call(None, causal[:, part] | (np.arange(ROOM) >= part.stop), **given)
        np.testing.assert_allclose(record.logits, expected[:, part], **CLOSE)
        past = record.past_key_values


def test_in_records_and_under_gradient_checkpointing():
    call = RobertaPreLayerNormForCausalLM(tiny_config(is_decoder=True), _do_init=False, gradient_checkpointing=True)
    past = call.init_cache(3, ROOM)
    record = jax.eval_shape(partial(call, IDS, past_key_values=past), params=call.params_shape_tree)
    assert kind(record.past_key_values) == kind(past)
    names = {name for name, _ in record.named_arrays()}
    assert len(names) == 7
    assert f"past_key_values.{'.'.join(KEY)}" in names


def test_all_steps_are_one_compilation():
    call, traces = model(), []

    @jit
    def step(ids, past):
        traces.append(ids)
        return call(ids, past_key_values=past)

    past = call.init_cache(3, ROOM)
    for i in range(LENGTH):
        past = step(IDS[:, i : i + 1], past).past_key_values
    assert len(traces) == 1
    assert past["roberta_prelayernorm"]["encoder"]["layer"]["1"]["attention"]["self"]["cache_index"] == LENGTH


def test_scan_and_while_loop():
    call = model()
    expected = run("plain", "ForCausalLM", None, WHOLE, ids=IDS)[0]

    def step(past, ids):
        record = call(ids[:, None], past_key_values=past)
        return record.past_key_values, record.logits[:, 0]

    @jit
    def greedy(past):
        def body(state):
            i, ids, past = state
            past, logits = step(past, ids[:, i])
            return i + 1, ids.at[:, i + 1].set(logits.argmax(-1)), past

        return jax.lax.while_loop(lambda state: state[0] < LENGTH - 1, body, (0, jnp.array(IDS), past))[1]

    empty = call.init_cache(3, ROOM)
    np.testing.assert_allclose(
        jit(jax.lax.scan, static_argnums=0)(step, empty, IDS.T)[1].swapaxes(0, 1), expected, **CLOSE
    )
    ids = greedy(empty)
    chosen = run("plain", "ForCausalLM", None, WHOLE, ids=ids)[0].argmax(-1)
    np.testing.assert_array_equal(chosen[:, :-1], ids[:, 1:])
    assert (ids[:, 1:] != IDS[:, 1:]).any()


@pytest.mark.parametrize("slot", [3, 10])
def test_what_is_in_the_slots_counts(slot):
    """The control: another value where a token is changes the next step; where none is, nothing."""
    past = run("plain", "ForCausalLM", model().init_cache(3, ROOM), PARTS[:1], ids=IDS)[1]
    changed = jax.tree.map(lambda array: array.at[:, slot].add(1.0) if array.ndim else array, past)
    steps = [run("plain", "ForCausalLM", held, PARTS[1:2], ids=IDS)[0] for held in (past, changed)]
    assert (np.abs(steps[0] - steps[1]).max() > 1e-2) == (slot < 4)


# ---------------------------------------------------------------- too much, and wrong


@pytest.mark.parametrize(
    ("room", "taken", "positions", "message"),
    [
        (ROOM, 9, None, r"max_length=12 cannot take 4 tokens behind 9"),
        (40, 35, None, r"at most 38 tokens .*, got 39 \(35 cached and 4 new\)"),
        (40, 35, np.full((3, 4), 40), r"position_ids must be .* below max_position_embeddings \(40\), got 40"),
    ],
)
def test_too_many_tokens_are_an_error_where_they_are_seen_and_nan_where_not(room, taken, positions, message):
    def at(index):
        return jax.tree.map(lambda x: x if x.ndim else jnp.int32(index), model().init_cache(3, room))

    ids, given = IDS[:, :4], {} if positions is None else {"position_ids": positions}
    with pytest.raises(InputError, match=message):
        model()(ids, past_key_values=at(taken), **given)
    record = compiled()(ids, at(taken), **given)
    assert np.isnan(record.logits).all()
    assert np.isnan(compiled()(ids[:, :1], record.past_key_values).logits).all()  # and ever after
    if positions is None:
        assert np.isfinite(compiled()(ids, at(taken - 1)).logits).all()


def test_count_below_zero():
    past = jax.tree.map(lambda x: x if x.ndim else x - 1, model().init_cache(3, ROOM))
    with pytest.raises(InputError, match="cannot take 4 tokens behind -1"):
        model()(IDS[:, :4], past_key_values=past)
    assert np.isnan(compiled()(IDS[:, :4], past).logits).all()


def test_cache_that_cannot_be_made():
    for length in (0, 41):
        with pytest.raises(InputError, match=rf"max_length must be .* at most .* \(40\), got {length}"):
            model().init_cache(3, length)
    for changes in ({}, {"is_decoder": True, "num_hidden_layers": 0}):
        with pytest.raises(InputError, match="a decoder with layers, got is_decoder"):
            RobertaPreLayerNormModel(tiny_config(**changes), _do_init=False).init_cache(3, ROOM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({KEY: None}, "(?s)init_cache or .*missing: encoder.layer.1.attention.self.cached_key"),
        (
            {KEY: None, (*KEY[:-1], "key"): 0},
            "(?s)missing: .*cached_key.*unexpected: encoder.layer.1.attention.self.key",
        ),
        ({KEY: np.zeros((3, 9, 4, 8))}, r"1.attention.self.cached_key .*\(3, 12, 4, 8\), got \(3, 9, 4, 8\)"),
        ({KEY: np.zeros((3, 12, 4))}, r"cached_key .*\(3, 12, 4, 8\), got \(3, 12, 4\)"),
        ({KEY: np.zeros((3, 12, 4, 8), np.float32)}, "cached_key .* must be float64, got float32"),
        ({(*KEY[:-1], "cache_index"): np.zeros((3,), np.int32)}, r"cache_index .*\(\), got \(3,\)"),
    ],
)
def test_cache_of_another_form(changes, message):
    arrays = flatten_dict(model().init_cache(3, ROOM)) | changes
    past = unflatten_dict({path: array for path, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message):
        model()(IDS, past_key_values=past)


def test_cache_of_another_batch_or_mask_of_another_length():
    with pytest.raises(InputError, match=r"\(3, 12, 4, 8\), got \(2, 12, 4, 8\)"):
        model()(IDS, past_key_values=model().init_cache(2, ROOM))
    with pytest.raises(InputError, match=r"attention_mask must have shape \(3, 12\) or .*, got \(3, 11\)"):
        model()(IDS, past_key_values=model().init_cache(3, ROOM), attention_mask=np.ones((3, 11)))


# ---------------------------------------------------------------- the peer


def test_transformers_has_the_same_cache():
    """Where its own works, which is with cross-attention; in float32, whose roundings (6e-8) add up on logits of size
    3 over two layers on either side."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaPreLayerNormConfig(**model("with an encoder").config.to_dict())
    ours = model("with an encoder", dtype="float32")
    theirs = transformers.FlaxRobertaPreLayerNormForCausalLM(config, _do_init=False)
    with jax.enable_x64(False):
        past, peer = ours.init_cache(3, ROOM), jit(partial(theirs.init_cache, 3, ROOM))()
        assert kind(past) == kind(peer)
        base = transformers.FlaxRobertaPreLayerNormModel(config, _do_init=False)
        assert kind(model("with an encoder", "Model", "float32").init_cache(3, ROOM)) == kind(
            jax.eval_shape(partial(base.init_cache, 3, ROOM))
        )
        mask = (np.arange(ROOM) < np.array([[3], [9], [12]])).astype(int)  # the cache hides what it does not hold yet
        near, states = dict(rtol=0, atol=2e-5), jax.tree.map(jnp.asarray, STATES)
        ours, theirs = jit(ours), jit(partial(theirs, params=ours.params))
        for part in PARTS[:3]:
            positions = np.arange(2, 13)[None].repeat(3, 0)[:, part]
            record = ours(IDS[:, part], mask, past_key_values=past, **states)
            other = theirs(IDS[:, part], mask, position_ids=positions, past_key_values=peer, **states)
            past, peer = record.past_key_values, other.past_key_values
            np.testing.assert_allclose(record.logits, other.logits, **near)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **near), past, dict(peer))
        exchanged = [ours(IDS[:, 6:7], mask, past_key_values=held, **states).logits for held in (past, peer)]
        np.testing.assert_allclose(*exchanged, **near)
