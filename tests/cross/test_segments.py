"""Several texts in a row, told apart by `segment_ids`, are what each of them is alone.

The tolerance, in float64: alone and packed make the same sums, but a product of matrices of another size adds up in
another order. One rounding is about 1e-16 of a number near 1, and there are some hundred in a row, some thousand in a
gradient; 1e-12 of the largest entry leaves a factor of ten.
"""

import importlib
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from roberta_pln import backends, parity
from roberta_pln.checks import InputError
from roberta_pln.data.packing import pack_sequences
from tests.contract import load, precision, random_checkpoint, random_ids, tiny_config

TOLERANCE = 1e-12
NAMES = backends.installed()
EVERY = pytest.mark.parametrize("backend", NAMES)
LENGTH = 9
LENGTHS = (2, 5, 3)
SHORT = {"max_position_embeddings": 8}  # for at most six tokens: fewer than a row has
CASES = {
    "base": ("Model", {**SHORT, "max_position_embeddings": 12, "pad_token_id": 5}),
    "masked": ("ForMaskedLM", {**SHORT, "num_hidden_layers": 2}),
    "masked, relative": ("ForMaskedLM", {"position_embedding_type": "relative_key_query"}),
    "causal": ("ForCausalLM", {**SHORT, "is_decoder": True}),
    "causal, relative": ("ForCausalLM", {"position_embedding_type": "relative_key_query", "is_decoder": True}),
    "tokens": ("ForTokenClassification", {**SHORT, "num_labels": 5}),
}
CASE = pytest.mark.parametrize("case", CASES)


@cache
def model(backend: str, case: str, dtype: str = "float64"):
    head, changes = CASES[case]
    with tempfile.TemporaryDirectory() as folder, precision(backend, dtype):
        return load(
            backend,
            random_checkpoint(Path(folder), tiny_config(**{"num_hidden_layers": 1, **changes}), head),
            head,
            dtype,
        )


def texts(case: str) -> list[np.ndarray]:
    """Of different lengths; one has a pad token inside."""
    rows = [random_ids(1, length, seed=length)[0] for length in LENGTHS]
    rows[1][2] = CASES[case][1].get("pad_token_id", 1)
    return rows


def packed(case: str):
    return pack_sequences(texts(case), LENGTH, CASES[case][1].get("pad_token_id", 1))


def inputs(case: str, labels: bool = True) -> dict[str, np.ndarray]:
    """The arguments of the packed call, without positions; a causal model has labels at padding as well."""
    batch = packed(case).batches[0]
    given = {"input_ids": batch.input_ids, "segment_ids": batch.segment_ids}
    if not labels or case == "base":
        return given
    (rows,) = packed(case).labels([text % 5 for text in texts(case)])
    if "causal" in case:
        rows = np.where(batch.segment_ids == 0, 3, rows)
    return {**given, "labels": rows}


def array(value) -> np.ndarray:
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def first(backend: str, asked, **given) -> np.ndarray:
    """The first output of a call."""
    with precision(backend, "float64"):
        return array(asked(**{"input_ids": None, **given})[0])


def run(backend: str, case: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output, and with labels every gradient, by name."""
    probe = importlib.import_module(f"roberta_pln.{backend}.probe")
    with precision(backend, "float64"):
        return probe.run(model(backend, case), given, gradients="labels" in given)


together = cache(lambda backend, case: run(backend, case, inputs(case)))


def alone(backend: str, case: str) -> dict[str, np.ndarray]:
    """Each text in a call of its own: outputs one behind the other, loss and gradients as sums over the labels."""
    found: dict[str, list[np.ndarray]] = {}
    for text in texts(case):
        given = {"input_ids": text[None]} | ({} if case == "base" else {"labels": text[None] % 5})
        for name, value in run(backend, case, given).items():
            found.setdefault(name, []).append(value * labels_of(text, case) if is_mean(name) else value[0])
    return {name: sum(parts) if is_mean(name) else np.concatenate(parts) for name, parts in found.items()}


def apart(backend: str, case: str) -> dict[str, np.ndarray]:
    """The packed call in the form of `alone`."""
    count = sum(labels_of(text, case) for text in texts(case))
    return {
        name: value * count if is_mean(name) else np.concatenate(packed(case).unpack([value]))
        for name, value in together(backend, case).items()
    }


def labels_of(text: np.ndarray, case: str) -> int:
    """How many labels of a text count."""
    return len(text) - ("causal" in case)


def is_mean(name: str) -> bool:
    """Whether it is one over all labels."""
    return name == "loss" or name.startswith("gradient.")


@CASE
@EVERY
def test_packed_is_unpacked(backend, case):
    answers = {"packed": apart(backend, case), "alone": alone(backend, case)}
    answers["alone"].pop("pooler_output", None)
    found = parity.differences(answers, "float64")
    assert {item.name: item.relative for item in found if not item.relative <= TOLERANCE} == {}
    assert all(np.isfinite(value).all() for value in together(backend, case).values())  # padding too


@CASE
@pytest.mark.skipif(len(NAMES) < 2, reason="a comparison needs two backends")
def test_backends_agree(case):
    found = parity.differences({backend: together(backend, case) for backend in NAMES}, "float64")
    assert {item.name: item.relative for item in found if not item.relative <= TOLERANCE} == {}


@pytest.mark.parametrize("case", ["base", "causal", "masked, relative"])
@EVERY
def test_no_text_sees_another(backend, case):
    """And the control: without `segment_ids` they do."""
    given, asked = inputs(case, labels=False), model(backend, case)
    other = given["input_ids"].copy()
    other[0, 1] = 50  # in the first text of the first row
    there = (given["segment_ids"] == 1) & (np.arange(len(other)) == 0)[:, None]
    for without in ((), ("segment_ids",)):
        kept = {name: value for name, value in given.items() if name not in without}
        if without and "relative" not in case:
            kept["position_ids"] = packed(case).batches[0].position_ids
        before, after = first(backend, asked, **kept), first(backend, asked, **{**kept, "input_ids": other})
        assert np.abs(after - before)[there].max() > 1e-3
        assert (np.abs(after - before)[~there].max() < 1e-13) == (not without)


@EVERY
def test_positions_of_every_text(backend):
    """The model numbers them as the packed arguments do; embeddings, whose padding cannot be seen, without a gap."""
    given, asked = inputs("base"), model(backend, "base")
    positions = packed("base").batches[0].position_ids
    assert positions.max() == 5 + max(LENGTHS) - 1  # one pad token is inside
    ours = first(backend, asked, **given)
    assert np.array_equal(ours, first(backend, asked, **given, position_ids=positions))
    assert not np.array_equal(ours, first(backend, asked, **given, position_ids=np.maximum(positions - 1, 5)))
    rows = [np.random.default_rng(len(text)).standard_normal((len(text), 32)) for text in texts("base")]
    states = np.zeros((*given["segment_ids"].shape, 32))
    for row, at in zip(rows, packed("base").places, strict=True):
        states[at.row, at.start : at.start + at.length] = row
    ours = first(backend, asked, inputs_embeds=states, segment_ids=given["segment_ids"])
    for part, row in zip(packed("base").unpack([ours]), rows, strict=True):
        np.testing.assert_allclose(part, first(backend, asked, inputs_embeds=row[None])[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["causal", "masked"])
@EVERY
def test_the_loss_without_logits(backend, case):
    with precision(backend, "float64"):
        loss = model(backend, case)(**inputs(case), output_logits=False).loss
    np.testing.assert_allclose(array(loss), together(backend, case)["loss"], rtol=TOLERANCE)


@EVERY
def test_what_is_not_returned(backend):
    """The pooler reads the first token of a row, and a cache goes on with the last."""
    with precision(backend, "float64"):
        record = model(backend, "base")(**inputs("base"))
        assert record.keys() == ("last_hidden_state",)
        plain = model(backend, "base")(**inputs("base"), return_dict=False)
        assert len(plain) == 2
        assert plain[1] is None
        assert model(backend, "causal")(**inputs("causal", labels=False), use_cache=True).keys() == ("logits",)


@EVERY
def test_bfloat16(backend):
    ours = array(model(backend, "causal", "float32")(**inputs("causal", labels=False)).logits)
    rounded = model(backend, "causal", "bfloat16")(**inputs("causal", labels=False)).logits
    rounded = array(rounded.float() if backend == "pt" else rounded).astype(np.float32)
    assert np.abs(rounded - ours).max() < parity.TOLERANCES["bfloat16"] * np.abs(ours).max()


@EVERY
def test_gradient_checkpointing(backend):
    asked = model(backend, "causal")
    asked.gradient_checkpointing_enable()
    try:
        again = run(backend, "causal", inputs("causal"))
    finally:
        asked.gradient_checkpointing_disable()
    for name, value in together(backend, "causal").items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=1e-13, err_msg=name)


# ---------------------------------------------------------------------- what is refused

SEGMENTS = np.array([[1, 1, 2, 2, 0]])
IDS = random_ids(1, 5)
CALLS = {
    "a mask": (
        {"attention_mask": np.ones((1, 5), int)},
        "segment_ids and attention_mask cannot be given together: number the padding 0 in segment_ids",
    ),
    "a cache": (
        {"past_key_values": ()},
        "segment_ids and past_key_values cannot be given together: a text that goes on needs a row for itself",
    ),
    "an encoder": (
        {"encoder_hidden_states": np.zeros((1, 3, 32))},
        "segment_ids and encoder_hidden_states cannot be given together: a text that reads an encoder needs a row",
    ),
    "a number below 0": (
        {"segment_ids": SEGMENTS - 1},
        "segment_ids must be at least 0, which is padding, got -1: number the texts from 1",
    ),
    "numbers of another shape": (
        {"segment_ids": SEGMENTS[:, :4]},
        r"segment_ids must have shape \(1, 5\), got \(1, 4\)",
    ),
    "no integers": ({"segment_ids": SEGMENTS * 1.0}, "segment_ids must be integers, got float"),
    "a text that is too long": (
        {"input_ids": random_ids(1, 9), "segment_ids": np.array([[1] * 2 + [2] * 7])},
        r"position_ids must be at least 0 and below max_position_embeddings \(8\), got 8",
    ),
}


@pytest.mark.parametrize("name", CALLS)
@EVERY
def test_refused(backend, name):
    arguments, message = CALLS[name]
    with precision(backend, "float64"), pytest.raises(InputError, match=f"^{message}"):
        model(backend, "causal")(**{"input_ids": IDS, "segment_ids": SEGMENTS, **arguments})


@EVERY
def test_a_row_is_limited_by_relative_positions(backend):
    for length in (40, 41):
        ids = random_ids(1, length)
        given = {"input_ids": ids, "segment_ids": np.arange(length)[None] // 3 + 1}
        if length == 40:
            assert np.isfinite(first(backend, model(backend, "masked, relative"), **given)).all()
        else:
            with pytest.raises(InputError, match="a sequence must have at most 40 tokens"):
                first(backend, model(backend, "masked, relative"), **given)


# ---------------------------------------------------------------------- compiled


def only(backend: str):
    return pytest.mark.skipif(backend not in NAMES, reason=f"{backend} is not installed")


COMPILED = pytest.mark.parametrize("case", ["base", "causal", "masked, relative", "tokens"])


@only("pt")
@COMPILED
def test_pt_compiled(case):
    """Without graph breaks."""
    import torch

    torch._dynamo.reset()
    asked = torch.compile(model("pt", case).eval(), fullgraph=True, backend="aot_eager")
    record = asked(**{name: torch.as_tensor(value) for name, value in inputs(case).items()})
    for name, value in record.named_arrays():
        np.testing.assert_allclose(array(value), together("pt", case)[name], rtol=0, atol=1e-13)


@only("tf")
@COMPILED
@pytest.mark.parametrize("kind", ["graph", "open shapes", "xla"])
def test_tf_compiled(case, kind):
    import tensorflow as tf

    given = {name: tf.constant(value) for name, value in inputs(case).items()}
    asked = tf.function(lambda given: model("tf", case)(given), jit_compile=kind == "xla")
    if kind == "open shapes":
        asked = asked.get_concrete_function({name: tf.TensorSpec((None, None), tf.int64) for name in given})
    for name, value in asked(given).items():
        np.testing.assert_allclose(value, together("tf", case)[name], rtol=0, atol=1e-13)


@only("flax")
@COMPILED
def test_flax_eager(case):
    """`together` is compiled, but holds the arguments as constants."""
    import jax

    asked = model("flax", case)
    with precision("flax", "float64"):
        for record in (asked(**inputs(case)), jax.jit(lambda given: asked(**given))(inputs(case))):
            for name, value in record.items():
                np.testing.assert_allclose(value, together("flax", case)[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", [name for name in NAMES if name != "pt"])
def test_a_text_that_is_too_long_is_nan_where_it_cannot_be_read(backend):
    ids = random_ids(2, 9)
    given = {"input_ids": ids, "segment_ids": np.array([[1] * 2 + [2] * 7, [1] * 4 + [2] * 5])}
    asked = model(backend, "causal")
    with precision(backend, "float64"):
        if backend == "tf":
            import tensorflow as tf

            found = tf.function(lambda given: asked(given).logits)({k: tf.constant(v) for k, v in given.items()})
        else:
            import jax

            found = jax.jit(lambda given: asked(**given).logits)(given)
    assert np.isnan(found[0]).any()
    assert np.isfinite(found[1]).all()
