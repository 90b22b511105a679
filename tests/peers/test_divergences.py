"""Where transformers' three libraries disagree with each other, or fail, and what every backend does here.

Each test is one such point. Its docstring says in a line what transformers does and what this library does; its first
half shows the latter in every backend, its second half, where that is quick, that transformers indeed differs.
"""

import importlib
import tempfile
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

from roberta_pln import backends, checkpoint
from roberta_pln.checks import InputError
from roberta_pln.config import ConfigError, RobertaPreLayerNormConfig
from roberta_pln.schema import HEADS as CLASSES
from roberta_pln.schema import PREFIX as BASE
from tests.contract import CONFIGS, HEADS, INPUTS, PAD, load, random_ids, random_tensors, tiny_config
from tests.peers.library import PREFIX, array, arrays, call, saved, tensor, theirs

every_backend = pytest.mark.parametrize("backend", backends.installed())
CLOSE = dict(rtol=0, atol=5e-6)  # some tens of roundings of float32, 6e-8, on numbers up to 4
FAR = 1e-3  # no rounding is as large
IDS = random_ids()
PADDED = INPUTS["right padding"]
STATES = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
EMBEDDINGS = np.random.default_rng(1).standard_normal((3, 11, 32)).astype(np.float32)
ENCODER = {"is_decoder": True, "add_cross_attention": True}

_FOLDER = tempfile.TemporaryDirectory()  # for as long as the tests run


@cache
def folder(head: str, **changes) -> Path:
    """Checkpoints of one layer, by framework."""
    root = Path(_FOLDER.name, f"{head} {changes}")
    return saved(root, head, {"num_hidden_layers": 1, **changes})


@cache
def ours(backend: str, head: str = "Model", dtype: str = "float32", **changes):
    return load(backend, folder(head, **changes) / backend, head, dtype)


@cache
def peer(backend: str, head: str = "Model", **changes):
    """transformers' model with the same weights."""
    return theirs(backend, folder(head, **changes), head)


def run(backend: str, model, inputs: dict, **options) -> dict[str, np.ndarray]:
    """Every array of the record of a call; the first call with labels of a classifier settles its kind of problem."""
    model.config.problem_type = None
    return arrays(call(backend, model, inputs, **options))


def first(backend: str, model, inputs: dict, **options) -> np.ndarray:
    """The states of a base model, or the logits."""
    found = run(backend, model, inputs, **options)
    return next(found[name] for name in ("last_hidden_state", "logits", "start_logits") if name in found)


def trained(backend: str, model, inputs: dict, **options) -> dict[str, np.ndarray]:
    """The same with dropout."""
    if backend == "tf":
        return arrays(call(backend, model, inputs, training=True, **options))
    if backend == "flax":
        import jax

        return arrays(call(backend, model, inputs, train=True, dropout_rng=jax.random.PRNGKey(0), **options))
    model.train()
    found = arrays(call(backend, model, inputs, **options))
    model.eval()
    return found


def in_two(backend: str, model, inputs: dict, **options) -> np.ndarray:
    """The states of all tokens but the first six, computed with the cache of these."""
    start = {name: value[:, :6] for name, value in inputs.items()}
    past = call(backend, model, start, use_cache=True, **options).past_key_values
    rest = {name: value[:, 6:] for name, value in inputs.items()}
    return first(backend, model, rest, past_key_values=past, **options)


def differ(left, right) -> bool:
    return np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64)).max() > FAR


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean of -log softmax(logits)[label], written out."""
    logits = logits.astype(np.float64)
    chosen = np.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return np.mean(np.log(np.exp(logits).sum(axis=-1)) - chosen)


def same(left, right) -> None:
    np.testing.assert_allclose(left, right, **CLOSE)


# ---------------------------------------------------------------- masks, positions, inputs


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fully_masked_rows_are_uniform(backend, dtype):
    """transformers adds -10000 in TensorFlow, so such a row sees everything as usual; here it weighs all keys alike."""
    inputs = INPUTS["a fully masked row"]
    row = run(backend, ours(backend, dtype=dtype), inputs, output_attentions=True)["attentions.0"][1]
    assert np.all(row == row.flat[0])
    assert float(row.flat[0]) == pytest.approx(1 / 11, rel=2**-8)  # bfloat16
    if dtype == "float32":
        others = run(backend, peer(backend), inputs, output_attentions=True)["attentions.0"]
        assert (np.ptp(others[1]) > FAR) == (backend == "tf")


@every_backend
def test_a_mask_keeps_what_is_one_or_more(backend):
    """transformers weighs keys by 0.5 or 2 in PyTorch and TensorFlow; here, as in its Flax, int(mask) > 0 decides."""
    inputs = INPUTS["a mask of other numbers"]
    mask = inputs["attention_mask"]
    kept = {"input_ids": IDS, "attention_mask": (mask.astype(int) > 0).astype(int)}
    expected = first(backend, ours(backend), kept)
    same(first(backend, ours(backend), inputs), expected)
    same(first(backend, ours(backend), {**kept, "attention_mask": mask.astype(int) > 0}), expected)
    mask = mask.astype(np.float32)
    assert differ(first(backend, peer(backend), {**inputs, "attention_mask": mask}), expected) == (backend != "flax")


@every_backend
def test_masks_of_three_and_four_axes(backend):
    """transformers takes three axes in PyTorch alone, and four nowhere; here both, and a decoder hides no more."""
    pattern = INPUTS["a mask of three axes"]["attention_mask"]
    three = {"input_ids": IDS, "attention_mask": pattern}
    four = {"input_ids": IDS, "attention_mask": pattern[:, None]}
    expected = first(backend, ours(backend), three)
    for model in (ours(backend), ours(backend, is_decoder=True)):
        same(first(backend, model, three), expected)
        same(first(backend, model, four), expected)
    reader = ours(backend, **ENCODER)
    states = {"input_ids": IDS, "encoder_hidden_states": STATES}
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    each = np.repeat(mask[:, None], 11, axis=1)
    expected_with_states = first(backend, reader, {**states, "encoder_attention_mask": mask})
    same(first(backend, reader, {**states, "encoder_attention_mask": each}), expected_with_states)
    same(first(backend, reader, {**states, "encoder_attention_mask": each[:, None]}), expected_with_states)
    if backend == "pt":
        same(first(backend, peer(backend), three), expected)
    with pytest.raises(Exception, match="shape"):
        first(backend, peer(backend), four if backend == "pt" else three)


@every_backend
def test_padding_is_what_the_mask_hides(backend):
    """transformers attends to padding that no mask hides; so does this library."""
    ids = {"input_ids": PADDED["input_ids"]}
    found = first(backend, ours(backend), ids)
    same(found, first(backend, ours(backend), {**ids, "attention_mask": np.ones_like(IDS)}))
    assert differ(found[0, :7], first(backend, ours(backend), PADDED)[0, :7])
    same(first(backend, peer(backend), ids), found)


@every_backend
def test_positions_skip_the_pad_token_of_the_config(backend):
    """transformers skips token 1 in TensorFlow whatever the config says; here `pad_token_id` is skipped."""
    ids = np.where(PADDED["input_ids"] == PAD, 5, PADDED["input_ids"])
    told = {"input_ids": ids, "position_ids": 5 + np.cumsum(ids != 5, axis=1) * (ids != 5)}
    changes = CONFIGS["another pad token"]
    expected = first(backend, ours(backend, **changes), told)
    same(first(backend, ours(backend, **changes), {"input_ids": ids}), expected)
    same(first(backend, peer(backend, **changes), told), expected)
    assert differ(first(backend, peer(backend, **changes), {"input_ids": ids}), expected) == (backend == "tf")


@every_backend
def test_embeddings_behind_a_cache_go_on_counting(backend):
    """transformers starts the positions of `inputs_embeds` anew behind a cache; here they go on."""
    whole = first(backend, ours(backend, is_decoder=True), {"inputs_embeds": EMBEDDINGS})
    same(in_two(backend, ours(backend, is_decoder=True), {"inputs_embeds": EMBEDDINGS}), whole[:, 6:])
    if backend != "flax":
        model = peer(backend, is_decoder=True)
        same(first(backend, model, {"inputs_embeds": EMBEDDINGS}), whole)
        assert differ(in_two(backend, model, {"inputs_embeds": EMBEDDINGS}), whole[:, 6:])


@every_backend
def test_explicit_positions_win_behind_a_cache(backend):
    """Both libraries count what is cached, padding too, unless `position_ids` say otherwise."""
    model, inputs = ours(backend, is_decoder=True), INPUTS["left padding"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = first(backend, model, inputs)[:, 6:]

    def rest(model, **positions):
        past = call(backend, model, {"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}).past_key_values
        new = {"input_ids": ids[:, 6:], "attention_mask": mask, **positions}
        return first(backend, model, new, past_key_values=past)

    counted = rest(model)
    same(counted, rest(model, position_ids=np.broadcast_to(PAD + 1 + np.arange(6, 11), (3, 5)).copy()))
    same(rest(model, position_ids=PAD + np.cumsum(mask, axis=1)[:, 6:]), whole)
    assert differ(counted[0], whole[0])
    if backend != "flax":
        same(rest(peer(backend, is_decoder=True)), counted)


@every_backend
def test_relative_distances_with_a_cache(backend):
    """transformers takes every query for the last one as soon as there is a cache; here each has its own place."""
    kind = "relative_key_query"
    model = ours(backend, is_decoder=True, position_embedding_type=kind)
    whole = first(backend, model, {"input_ids": IDS}, use_cache=False)
    same(first(backend, model, {"input_ids": IDS}, use_cache=True), whole)
    same(in_two(backend, model, {"input_ids": IDS}), whole[:, 6:])
    if backend == "pt":
        model = peer(backend, is_decoder=True, position_embedding_type=kind)
        same(first(backend, model, {"input_ids": IDS}, use_cache=False), whole)
        assert differ(first(backend, model, {"input_ids": IDS}, use_cache=True), whole)


@every_backend
@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_in_every_backend(backend, kind):
    """transformers has them in PyTorch alone, and takes a misspelt kind for none; here all backends have them."""
    found = first(backend, ours(backend, position_embedding_type=kind), PADDED)
    same(found, first("pt", peer("pt", position_embedding_type=kind), PADDED))
    with pytest.raises(ConfigError, match="position_embedding_type must be one of"):
        tiny_config(position_embedding_type="relative")
    if backend != "pt":
        ignored = theirs(
            "pt", folder("Model", position_embedding_type=kind), "Model", position_embedding_type="absolute"
        )
        same(first(backend, peer(backend, position_embedding_type=kind), PADDED), first("pt", ignored, PADDED))


@every_backend
def test_ids_out_of_range_are_an_error(backend):
    """transformers' Flax takes -1 for the last row and gives NaN above; here it is an error, and NaN where compiled."""
    negative, last, above = (np.where(np.eye(3, 11, dtype=bool), wrong, IDS) for wrong in (-1, 98, 99))
    for ids in (negative, above, random_ids(1, 39)):
        with pytest.raises(InputError):
            first(backend, ours(backend), {"input_ids": ids})
    if backend == "flax":
        import jax

        compiled = jax.jit(lambda ids: ours(backend)(ids).last_hidden_state)
        assert np.isnan(compiled(negative)[0]).all()
        assert np.isnan(compiled(above)[0]).all()
        same(first(backend, peer(backend), {"input_ids": negative}), first(backend, peer(backend), {"input_ids": last}))
        assert np.isnan(first(backend, peer(backend), {"input_ids": above})[0]).all()
    else:
        with pytest.raises(Exception, match=r"ind(ex|ices)"):
            first(backend, peer(backend), {"input_ids": negative})


def of_every_kind(values: np.ndarray) -> dict[str, object]:
    """A nested list, and every installed framework's tensor."""
    kinds = {"list": values.tolist()} | {name: tensor(name, values) for name in backends.installed()}
    if "flax" in kinds:
        import jax

        kinds["flax"] = jax.numpy.asarray(values)
    return kinds


@every_backend
def test_inputs_of_every_kind(backend):
    """transformers takes no nested lists and no other framework's tensors; here both are taken."""
    expected = first(backend, ours(backend), PADDED)
    masks = of_every_kind(PADDED["attention_mask"])
    for kind, ids in of_every_kind(PADDED["input_ids"]).items():
        same(array(ours(backend)(ids, attention_mask=masks[kind]).last_hidden_state), expected)
        if kind != backend:
            with pytest.raises((TypeError, ValueError)):
                peer(backend)(ids)
    with pytest.raises(InputError, match=r"input_ids must have shape \(any, any\), got \(11,\)"):
        ours(backend)(IDS[0])


@every_backend
def test_embeddings_come_alone(backend):
    """transformers' TensorFlow must have a first argument, be it None; here, as in its PyTorch, embeddings suffice."""
    inputs_embeds = tensor(backend, EMBEDDINGS)
    expected = first(backend, ours(backend), {"inputs_embeds": EMBEDDINGS})  # behind None
    same(array(ours(backend)(inputs_embeds=inputs_embeds).last_hidden_state), expected)
    if backend == "pt":
        same(array(peer(backend)(inputs_embeds=inputs_embeds).last_hidden_state), expected)
    if backend == "tf":
        with pytest.raises(ValueError, match="first argument .* must always be passed"):
            peer(backend)(inputs_embeds=inputs_embeds)


# ---------------------------------------------------------------- losses and labels


@every_backend
@pytest.mark.parametrize("name", ["causal", "classes in a column", "tokens", "an answer"])
def test_losses_are_scalars(backend, name):
    """transformers gives a loss of one axis in TensorFlow, for some heads one per example; here a mean everywhere."""
    head, changes, inputs = HEADS[name]
    assert run(backend, ours(backend, head, **changes), inputs)["loss"].shape == ()
    if backend == "tf":
        per_example = name in ("classes in a column", "an answer")
        shape = (len(inputs["input_ids"]) if per_example else 1,)
        assert run(backend, peer(backend, head, **changes), inputs)["loss"].shape == shape


@every_backend
@pytest.mark.parametrize("name", ["several targets", "several values"])
def test_the_problem_type_decides_in_every_backend(backend, name):
    """transformers heeds `problem_type` in PyTorch alone; here every backend does, and notes the kind it inferred."""
    head, changes, inputs = HEADS[name]
    kind = changes.get("problem_type", "multi_label_classification")
    inputs = {**inputs, "labels": inputs["labels"].astype(np.float32)}
    model = ours(backend, head, **changes)
    model.config.problem_type = changes.get("problem_type")
    loss = array(call(backend, model, inputs).loss)
    assert model.config.problem_type == kind
    same(loss, array(call("pt", peer("pt", head, **changes), inputs).loss))
    if backend == "tf":
        with pytest.raises(Exception, match="shape"):
            call(backend, peer(backend, head, **changes), inputs)


@every_backend
def test_labels_of_minus_100_alone_are_left_out(backend):
    """transformers' TensorFlow refuses -100 in a classifier and takes -1 for 0; here -100 is left out, -1 an error."""
    head, changes, inputs = HEADS["classes"]
    found = run(backend, ours(backend, head, **changes), inputs)
    assert inputs["labels"][2] == -100
    same(found["loss"], cross_entropy(found["logits"][:2], inputs["labels"][:2]))
    masked = {"input_ids": IDS, "labels": np.full_like(IDS, -1)}
    with pytest.raises(InputError, match="-100 to be ignored, got -1"):
        run(backend, ours(backend, "ForMaskedLM"), masked)
    if backend == "tf":
        with pytest.raises(Exception, match="label value"):
            run(backend, peer(backend, head, **changes), inputs)
        assert np.isfinite(run(backend, peer(backend, "ForMaskedLM"), masked)["loss"])


@every_backend
def test_labels_of_every_type(backend):
    """transformers' PyTorch takes int64 for classes, and smaller integers for targets; here any integer is a class."""
    head, changes, inputs = HEADS["classes in a column"]
    model, labels = ours(backend, head, **changes), inputs["labels"][:, 0]
    expected = run(backend, model, {**inputs, "labels": labels})["loss"]
    for kind in (np.int8, np.uint8, np.int16, np.int32):
        same(run(backend, model, {**inputs, "labels": labels.astype(kind)})["loss"], expected)
    one = ours(backend, head, num_labels=1)
    expected = run(backend, one, {**inputs, "labels": labels.astype(np.float32)})["loss"]
    for kind in (np.int64, np.float16, np.float64):
        same(run(backend, one, {**inputs, "labels": labels.astype(kind)})["loss"], expected)
    if backend == "pt":
        for kind in (np.int32, np.uint8):
            with pytest.raises((RuntimeError, ValueError)):
                run(backend, peer(backend, head, **changes), {**inputs, "labels": labels.astype(kind)})
    if backend == "tf":
        with pytest.raises(AttributeError, match="rank"):
            peer(backend, head, num_labels=1)(**{**inputs, "labels": labels.astype(np.float32)})


@every_backend
def test_answers_outside_are_left_out(backend):
    """transformers' PyTorch trains on token 0 where the answer is at -1; here -1 is left out as 11 and 100 are."""

    def loss(model, outside):
        at = np.array([outside, 4, 3])
        return run(backend, model, {**PADDED, "start_positions": at, "end_positions": at})["loss"]

    model = ours(backend, "ForQuestionAnswering")
    found = run(backend, model, PADDED)
    inside = np.array([4, 3])
    expected = sum(cross_entropy(found[f"{which}_logits"][1:], inside) for which in ("start", "end")) / 2
    for outside in (-1, 11, 100):
        same(loss(model, outside), expected)
    if backend == "pt":
        same(loss(peer(backend, "ForQuestionAnswering"), -1), loss(model, 0))
        same(loss(peer(backend, "ForQuestionAnswering"), 11), expected)
    if backend == "tf":
        with pytest.raises(Exception, match="label value"):
            loss(peer(backend, "ForQuestionAnswering"), 11)


@every_backend
def test_every_backend_offers_the_same(backend, tmp_path):
    """transformers' Flax has no labels, embeddings, resizing, pruning or loading information; here all backends do."""
    root = folder("ForMaskedLM")
    model_class = backends.BACKENDS[backend].model_class("ForMaskedLM")
    model, info = model_class.from_pretrained(root / backend, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert run(backend, model, {"inputs_embeds": EMBEDDINGS, "labels": IDS})["loss"] > 0
    model.prune_heads({0: [1]})
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    changed = checkpoint.open(tmp_path)
    assert changed.shape(f"{BASE}.embeddings.word_embeddings.weight") == (120, 32)
    assert changed.shape(f"{BASE}.encoder.layer.0.attention.self.query.weight") == (24, 32)
    if backend == "flax":
        other = peer(backend, "ForMaskedLM")
        with pytest.raises(TypeError):
            theirs(backend, root, "ForMaskedLM", output_loading_info=True)
        for missing in ({"labels": IDS}, {"inputs_embeds": EMBEDDINGS}, {"use_cache": True}):
            with pytest.raises(TypeError, match=next(iter(missing))):
                other(IDS, **missing)
        assert not hasattr(other, "resize_token_embeddings")
        assert not hasattr(other, "prune_heads")


@every_backend
@pytest.mark.parametrize("name", ["causal", "classes", "a regression", "several targets", "tokens", "an answer"])
def test_losses_are_in_float32(backend, name):
    """transformers' PyTorch gives a loss in bfloat16 from a model in bfloat16; here a loss has at least float32."""
    head, changes, inputs = HEADS[name]
    model = ours(backend, head, "bfloat16", **changes)
    model.config.problem_type = None
    assert "float32" in str(call(backend, model, inputs).loss.dtype)
    if backend == "pt" and name == "tokens":
        import torch

        half = theirs(backend, folder(head, **changes), head, dtype=torch.bfloat16)
        assert call(backend, half, inputs).loss.dtype == torch.bfloat16


# ---------------------------------------------------------------- numbers, dropout, initialisation


@every_backend
def test_the_variance_survives_a_large_mean(backend, tmp_path):
    """transformers' Flax takes E[x^2] - E[x]^2 for the variance; here it is the mean of squared deviations."""
    tensors = random_tensors(tiny_config(num_hidden_layers=1), "Model")
    tensors[f"{BASE}.embeddings.word_embeddings.weight"] += np.float32(1000)
    root = saved(tmp_path, "Model", {"num_hidden_layers": 1}, tensors)
    exact, found, other = (
        run(which, model, {"input_ids": IDS}, output_hidden_states=True)["hidden_states.0"]
        for which, model in (
            ("pt", load("pt", root / "pt", "Model")),
            (backend, load(backend, root / backend, "Model", "float32")),
            (backend, theirs(backend, root, "Model")),
        )
    )
    # a mean of 32 numbers near 1000 may be off by 1e-3, and the deviations from it are of size 0.2
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-2)
    assert (np.abs(other - exact).max() > 0.1) == (backend == "flax")


@every_backend
def test_attention_dropout_is_independent(backend):
    """transformers' Flax drops the same keys in every row and head; here every element is drawn for itself."""
    changes = {"attention_probs_dropout_prob": 0.5}

    def patterns(model):
        dropped = trained(backend, model, {"input_ids": IDS}, output_attentions=True)["attentions.0"] == 0
        return {pattern.tobytes() for pattern in dropped.reshape(12, 11, 11)}

    assert len(patterns(ours(backend, **changes))) == 12
    assert len(patterns(peer(backend, **changes))) == (1 if backend == "flax" else 12)


@every_backend
def test_fresh_weights_are_normal(backend, tmp_path):
    """transformers truncates the normal in TensorFlow, and draws others in Flax; here N(0, 0.02), the pad rows zero."""
    sizes = dict(num_labels=64, hidden_size=256, num_hidden_layers=0)
    backends.BACKENDS[backend].model_class("ForTokenClassification")(tiny_config(**sizes)).save_pretrained(tmp_path)
    fresh = checkpoint.open(tmp_path)
    spread = fresh["classifier.weight"].std() / 0.02
    assert spread == pytest.approx(1, abs=0.03)  # of 16,384 draws, 0.0055 is one standard error
    for table in ("word", "position"):
        rows = fresh[f"{BASE}.embeddings.{table}_embeddings.weight"]
        assert not rows[PAD].any()
        assert rows[PAD + 1].any()
    config = transformers.RobertaPreLayerNormConfig(**tiny_config(**sizes).to_dict())
    model = getattr(transformers, f"{PREFIX[backend]}RobertaPreLayerNormForTokenClassification")(config)
    if backend == "tf":
        model(IDS)
        assert model.classifier.kernel.numpy().std() / 0.02 < 0.92
    if backend == "flax":
        assert np.asarray(model.params["classifier"]["kernel"]).std() / 0.02 > 2


@every_backend
def test_pads_send_no_gradient_to_the_tables(backend):
    """transformers trains the pad token's rows in TensorFlow and Flax; here, as in its PyTorch, lookups do not."""
    inputs = {"input_ids": PADDED["input_ids"]}
    probe = importlib.import_module(f"roberta_pln.{backend}.probe")
    for table in ("word", "position"):
        gradient = probe.run(ours(backend), inputs, gradients=True)[
            f"gradient.{BASE}.embeddings.{table}_embeddings.weight"
        ]
        assert not gradient[PAD].any()
        assert gradient[PAD + 1 :].any()
    if backend == "tf":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            scalar = tf.nn.l2_loss(peer(backend)(**inputs).last_hidden_state)
        assert np.any(tf.convert_to_tensor(tape.gradient(scalar, peer(backend).get_input_embeddings().weight))[PAD])


@every_backend
def test_epsilon_is_the_config_s(backend):
    """Both libraries default to 1e-12, and the checkpoints converted from fairseq say 1e-5; every norm obeys."""
    assert (
        RobertaPreLayerNormConfig().layer_norm_eps == transformers.RobertaPreLayerNormConfig().layer_norm_eps == 1e-12
    )
    large = first(backend, ours(backend, **CONFIGS["large epsilon"]), PADDED)
    assert differ(large, first(backend, ours(backend), PADDED))
    same(large, first(backend, peer(backend, **CONFIGS["large epsilon"]), PADDED))


@every_backend
def test_activations_have_the_same_names(backend):
    """transformers lacks gelu_pytorch_tanh in TensorFlow and mish in Flax; here every name is in every backend."""
    for name in ("gelu_pytorch_tanh", "mish"):
        found = first(backend, ours(backend, hidden_act=name), PADDED)
        same(found, first("pt", peer("pt", hidden_act=name), PADDED))
    root = folder("Model", hidden_act="relu")
    given = load(backend, root / backend, "Model", "float32", hidden_act=lambda x: (x + abs(x)) / 2)
    same(first(backend, given, PADDED), first(backend, ours(backend, hidden_act="relu"), PADDED))
    if backend != "pt":
        with pytest.raises(KeyError):
            peer(backend, hidden_act="mish" if backend == "flax" else "gelu_pytorch_tanh")


@every_backend
def test_dropout_of_everything_is_zero(backend):
    """transformers' TensorFlow refuses a rate of 1; here, as in its PyTorch and Flax, nothing is left."""
    changes = {"hidden_dropout_prob": 1.0}
    found = trained(backend, ours(backend, **changes), {"input_ids": IDS}, output_hidden_states=True)
    assert not found["hidden_states.0"].any()
    with pytest.raises(ValueError, match="rate") if backend == "tf" else nullcontext():
        trained(backend, peer(backend, **changes), {"input_ids": IDS})


@every_backend
def test_head_masks_are_factors(backend):
    """transformers has none in TensorFlow, and only zeros and ones in Flax; here they are factors, (A,) or (N, A)."""
    factors = np.array([1.0, 0.0, 0.5, 2.0], np.float32)
    flags = {"output_attentions": True}
    model, inputs = ours(backend), {"input_ids": IDS}
    whole = run(backend, model, inputs, **flags)["attentions.0"]
    found = run(backend, model, {**inputs, "head_mask": factors}, **flags)
    same(found["attentions.0"], whole * factors[:, None, None])
    same(run(backend, model, {**inputs, "head_mask": factors[None]})["last_hidden_state"], found["last_hidden_state"])
    with pytest.raises(InputError, match=r"head_mask must have shape \(4,\) or \(1, 4\), got \(2, 4\)"):
        run(backend, model, {**inputs, "head_mask": np.ones((2, 4))})
    if backend == "tf":
        with pytest.raises(NotImplementedError):
            run(backend, peer(backend), {**inputs, "head_mask": factors})
    if backend == "flax":
        assert not run(backend, peer(backend), {**inputs, "head_mask": factors[None] / 4}, **flags)[
            "attentions.0"
        ].any()
        with pytest.raises(ValueError, match="head_mask should be specified for 1 layers"):
            run(backend, peer(backend), {**inputs, "head_mask": factors})


# ---------------------------------------------------------------- decoder, cache, outputs


@every_backend
def test_every_decoder_has_a_cache(backend):
    """transformers' Flax has one only with cross-attention; here every decoder has, and so every head's base."""
    model = ours(backend, is_decoder=True)
    same(in_two(backend, model, {"input_ids": IDS}), first(backend, model, {"input_ids": IDS})[:, 6:])
    if backend == "flax":
        import jax

        other, positions = peer(backend, is_decoder=True), np.broadcast_to(np.arange(5), (3, 5))
        with pytest.raises(ValueError, match="broadcasting"):  # the mask is for the cache, which is ignored
            jax.eval_shape(
                lambda: other(
                    IDS[:, :5], np.ones((3, 11), int), None, positions, past_key_values=other.init_cache(3, 11)
                )
            )


@every_backend
@pytest.mark.parametrize("head", [head for head in CLASSES if head not in ("Model", "ForCausalLM")])
def test_every_head_takes_a_config_with_cross_attention(backend, head):
    """transformers' Flax cannot construct the other heads with cross-attention; here every head takes that config."""
    config = tiny_config(num_hidden_layers=1, **ENCODER)
    ids = IDS.reshape(1, 3, 11) if head == "ForMultipleChoice" else IDS
    model = backends.BACKENDS[backend].model_class(head)(config)
    assert first(backend, model, {"input_ids": ids}).shape[0] == ids.shape[0]
    if backend == "flax" and head == "ForMaskedLM":
        theirs_config = transformers.RobertaPreLayerNormConfig(**config.to_dict())
        with pytest.raises(Exception, match="truth value|shape"):
            getattr(transformers, f"FlaxRobertaPreLayerNorm{head}")(theirs_config, _do_init=False)


@every_backend
def test_no_cross_attentions_without_encoder_states(backend):
    """transformers' PyTorch fails, its TensorFlow gives an empty tuple; here the field is absent."""
    record = call(backend, ours(backend, **ENCODER), {"input_ids": IDS}, output_attentions=True)
    assert "cross_attentions" not in record
    assert record.cross_attentions is None
    if backend == "pt":
        with pytest.raises(IndexError):
            call(backend, peer(backend, **ENCODER), {"input_ids": IDS}, output_attentions=True)
    if backend == "tf":
        assert (
            call(backend, peer(backend, **ENCODER), {"input_ids": IDS}, output_attentions=True).cross_attentions == ()
        )


@every_backend
def test_tuples_hold_the_cache(backend):
    """transformers' TensorFlow drops the cache from plain tuples; here it is third, and records keep their order."""
    inputs, flags = {"input_ids": IDS}, {"output_hidden_states": True, "output_attentions": True}
    record = call(backend, ours(backend, is_decoder=True), inputs, **flags)
    plain = call(backend, ours(backend, is_decoder=True), inputs, return_dict=False, **flags)
    assert len(plain) == 5
    assert array(plain[2][0][0]).shape == (3, 4, 11, 8)
    assert array(plain[3][1]).shape == (3, 11, 32)
    if backend == "flax":
        assert tuple(record.keys()) == tuple(call("pt", peer("pt", is_decoder=True), inputs, **flags))
    else:
        assert tuple(record.keys()) == tuple(call(backend, peer(backend, is_decoder=True), inputs, **flags))
        other = call(backend, peer(backend, is_decoder=True), inputs, return_dict=False, **flags)
        assert len(other) == (4 if backend == "tf" else 5)


@every_backend
def test_untied_decoders_are_their_own(backend):
    """transformers' TensorFlow ties the decoder whatever the config says; here `tie_word_embeddings` decides."""
    expected = first("pt", peer("pt", "ForMaskedLM", **CONFIGS["untied"]), PADDED)
    same(first(backend, ours(backend, "ForMaskedLM", **CONFIGS["untied"]), PADDED), expected)
    other = first(backend, peer(backend, "ForMaskedLM", **CONFIGS["untied"]), PADDED)
    assert differ(other, expected) == (backend == "tf")


@every_backend
def test_choices_have_every_option(backend):
    """transformers' TensorFlow loses the switches of multiple choice and cannot take embeddings; here all is there."""
    model = ours(backend, "ForMultipleChoice")
    flags = {"output_hidden_states": True, "output_attentions": True}
    found = run(backend, model, {"input_ids": IDS[None]}, **flags)
    assert {"hidden_states.0", "hidden_states.1", "attentions.0"} < set(found)
    assert run(backend, model, {"inputs_embeds": EMBEDDINGS[None]})["logits"].shape == (1, 3)
    if backend == "tf":
        assert list(run(backend, peer(backend, "ForMultipleChoice"), {"input_ids": IDS[None]}, **flags)) == ["logits"]
        with pytest.raises(Exception, match="unpack|shape"):
            run(backend, peer(backend, "ForMultipleChoice"), {"inputs_embeds": EMBEDDINGS[None]})


@every_backend
def test_a_cache_without_cross_keys_is_completed(backend):
    """transformers' TensorFlow takes self keys for cross keys in a cache without these; here they are computed."""
    states = {"encoder_hidden_states": STATES}

    def shortened(model):
        past = call(backend, model, {"input_ids": IDS[:, :6], **states}, use_cache=True).past_key_values
        short = tuple(tuple(layer)[:2] for layer in past)
        return first(backend, model, {"input_ids": IDS[:, 6:], **states}, past_key_values=short)

    expected = first(backend, ours(backend, **ENCODER), {"input_ids": IDS, **states})[:, 6:]
    same(shortened(ours(backend, **ENCODER)), expected)
    if backend == "tf":
        assert differ(shortened(peer(backend, **ENCODER)), expected)


@every_backend
def test_a_cache_is_never_changed(backend):
    """transformers' PyTorch adds to the cache it is given; here a call returns another, and takes every older form."""
    model, rest = ours(backend, is_decoder=True), {"input_ids": IDS[:, 6:]}
    past = call(backend, model, {"input_ids": IDS[:, :6]}).past_key_values
    expected = first(backend, model, rest, past_key_values=past)
    np.testing.assert_array_equal(first(backend, model, rest, past_key_values=past), expected)
    same(first(backend, model, rest, past_key_values=tuple((*layer, None, None) for layer in past)), expected)
    short = {**rest, "attention_mask": np.ones((3, 1), int)}
    with pytest.raises(InputError, match=r"attention_mask must have shape \(3, 11\)"):
        first(backend, model, short, past_key_values=past)
    encoder = ours(backend)
    record = call(backend, encoder, rest, past_key_values=past, use_cache=True)
    assert record.past_key_values is None
    same(array(record.last_hidden_state), first(backend, encoder, rest))
    if backend == "pt":
        other = peer(backend, is_decoder=True)
        past = call(backend, other, {"input_ids": IDS[:, :6]}).past_key_values
        once, again = (first(backend, other, rest, past_key_values=past) for _ in range(2))
        assert differ(once, again)
        with pytest.raises(AttributeError):
            first(backend, other, rest, past_key_values=past.to_legacy_cache())


@every_backend
@pytest.mark.parametrize("name", ["ForMaskedLM", "causal"])
def test_training_on_labels_has_no_logits(backend, name):
    """transformers computes all of them for a loss that needs those of labelled tokens."""
    head, changes, inputs = HEADS.get(name, (name, {}, {**PADDED, "labels": IDS}))
    model = ours(backend, head, **changes)
    found = trained(backend, model, inputs)
    assert "logits" not in found
    asked = trained(backend, model, inputs, output_logits=True)
    same(asked["loss"], found["loss"])
    same(asked["logits"], run(backend, model, inputs)["logits"])
    if backend != "flax":
        assert "logits" in trained(backend, peer(backend, head, **changes), inputs)


@every_backend
def test_labels_come_without_a_cache(backend):
    """transformers' TensorFlow also returns the cache beside a loss; here, as in its PyTorch, there is none."""
    head, changes, inputs = HEADS["causal"]
    assert call(backend, ours(backend, head, **changes), inputs).keys() == ("loss", "logits")
    if backend != "flax":
        assert ("past_key_values" in call(backend, peer(backend, head, **changes), inputs)) == (backend == "tf")


@every_backend
def test_encoder_states_need_cross_attention(backend):
    """transformers' Flax ignores encoder states it has no layers for, and a decoder's switch; here both are errors."""
    with pytest.raises(InputError, match="config.add_cross_attention=True"):
        first(backend, ours(backend, is_decoder=True), {"input_ids": IDS, "encoder_hidden_states": STATES})
    with pytest.raises(ConfigError, match="set is_decoder=True"):
        tiny_config(add_cross_attention=True)
    other = peer(backend, is_decoder=True)
    if backend == "flax":
        found = first(backend, other, {"input_ids": IDS, "encoder_hidden_states": STATES})
        same(found, first(backend, other, {"input_ids": IDS}))
    else:
        with pytest.raises(ValueError, match="add_cross_attention"):
            first(backend, other, {"input_ids": IDS, "encoder_hidden_states": STATES})


@every_backend
def test_an_answer_has_two_labels(backend):
    """transformers finds out in the call that question answering has a start and an end; here the constructor does."""
    with pytest.raises(InputError, match=r"needs num_labels=2 \(start and end\), got 3"):
        backends.BACKENDS[backend].model_class("ForQuestionAnswering")(tiny_config(num_labels=3))
    if backend == "pt":
        config = transformers.RobertaPreLayerNormConfig(**tiny_config(num_labels=3).to_dict())
        model = transformers.RobertaPreLayerNormForQuestionAnswering(config)
        with pytest.raises(ValueError, match="unpack"):
            call(backend, model, {"input_ids": IDS})


# ---------------------------------------------------------------- generation

PROMPTS = {"input_ids": IDS[:, :6], "attention_mask": np.ones((3, 6), np.int64)}
LEFT = {name: value[:, :6] for name, value in INPUTS["left padding"].items()}


def generated(backend: str, model, inputs: dict, **options) -> tuple[np.ndarray, np.ndarray]:
    """New tokens (B, N) and scores (N, B, V) of a search in which nothing ends, in either library."""
    options = {"max_new_tokens": 3, "suppress_tokens": [2], "return_dict_in_generate": True, **options}
    if backend != "flax" or type(model).__module__.startswith("roberta_pln"):
        options["output_scores"] = True
    arguments = {name: tensor(backend, value) for name, value in inputs.items()}
    record = model.generate(arguments.pop("input_ids"), **arguments, **options)
    scores = getattr(record, "scores", None)
    width = inputs["input_ids"].shape[1]
    return array(record.sequences)[:, width:], None if scores is None else np.stack([array(step) for step in scores])


def told(backend: str, model, inputs: dict, new: np.ndarray) -> np.ndarray:
    """Scores (N, B, V) by a call on the prompts and the new tokens, with an end that does not come."""
    whole = {
        "input_ids": np.concatenate((inputs["input_ids"], new), axis=1),
        "attention_mask": np.concatenate((inputs["attention_mask"], np.ones_like(new)), axis=1).astype(np.int64),
    }
    logits = first(backend, model, {**inputs, **whole})[:, -new.shape[1] - 1 : -1].swapaxes(0, 1)
    return np.where(np.arange(logits.shape[-1]) == 2, -np.inf, logits)


@every_backend
def test_texts_have_the_positions_of_the_call(backend):
    """transformers numbers them 0, 1, ... in PyTorch and Flax, not as its call; here each token is the call's best."""
    model = ours(backend, "ForCausalLM", is_decoder=True)
    new, _ = generated(backend, model, PROMPTS)
    np.testing.assert_array_equal(new.T, told(backend, model, PROMPTS, new).argmax(axis=-1))
    other = peer(backend, "ForCausalLM", **ENCODER)  # its Flax has a cache with these only
    new, _ = generated(backend, other, PROMPTS)
    assert np.array_equal(new.T, told(backend, other, PROMPTS, new).argmax(axis=-1)) == (backend == "tf")


@every_backend
def test_padding_on_the_left_changes_no_text(backend):
    """transformers' TensorFlow counts the padding as soon as there is a cache; here a cache changes no number."""
    model = ours(backend, "ForCausalLM", is_decoder=True)
    new, scores = generated(backend, model, LEFT)
    same(scores, told(backend, model, LEFT, new))
    same(generated(backend, model, LEFT, use_cache=False)[1], scores)
    if backend == "tf":
        other = peer(backend, "ForCausalLM", is_decoder=True)
        new, scores = generated(backend, other, LEFT)
        expected = told(backend, other, LEFT, new)
        same(scores[0], expected[0])
        assert differ(scores[1, 0, 3:], expected[1, 0, 3:])  # the row with most padding


@every_backend
def test_every_decoder_generates(backend):
    """transformers' Flax needs cross-attention for it; here no decoder does, and every head without one says so."""
    assert generated(backend, ours(backend, "ForCausalLM", is_decoder=True), PROMPTS)[0].shape == (3, 3)
    with pytest.raises(InputError, match="set is_decoder=True"):
        generated(backend, ours(backend, "ForCausalLM"), PROMPTS)
    if backend == "flax":
        with pytest.raises(Exception, match="broadcast"):
            generated(backend, peer(backend, "ForCausalLM", is_decoder=True), PROMPTS)


@every_backend
def test_texts_read_the_encoder(backend):
    """transformers fails in PyTorch with a cache, ignores the states in TensorFlow, refuses them in Flax."""
    model, states = ours(backend, "ForCausalLM", **ENCODER), {"encoder_hidden_states": STATES}
    new, scores = generated(backend, model, {**PROMPTS, **states})
    same(scores, told(backend, model, {**PROMPTS, **states}, new))
    same(generated(backend, model, {**PROMPTS, **states}, use_cache=False)[1], scores)
    other_scores = generated(backend, model, {**PROMPTS, "encoder_hidden_states": -STATES})[1]
    assert differ(other_scores[0, :, 3:], scores[0, :, 3:])
    other = peer(backend, "ForCausalLM", **ENCODER)
    if backend == "tf":
        same(generated(backend, other, {**PROMPTS, **states})[1], generated(backend, other, PROMPTS)[1])
    else:
        with pytest.raises((RuntimeError, ValueError), match="size of tensor|not used by the model"):
            generated(backend, other, {**PROMPTS, **states})


@pytest.mark.skipif("tf" not in backends.installed(), reason="it is about TensorFlow")
def test_compiled_texts_are_the_same():
    """transformers' TensorFlow gives other texts under XLA, with positions from its padded cache; here the same."""
    import tensorflow as tf

    model = ours("tf", "ForCausalLM", is_decoder=True)
    new, scores = generated("tf", model, PROMPTS)
    for way in ({"jit_compile": True}, {"compiled": False}):
        found, close = generated("tf", model, PROMPTS, **way)
        np.testing.assert_array_equal(found, new)
        same(close, scores)
    other = peer("tf", "ForCausalLM", is_decoder=True)
    eager, _ = generated("tf", other, PROMPTS)
    ids, mask = (tf.constant(PROMPTS[name]) for name in ("input_ids", "attention_mask"))
    compiled = tf.function(other.generate, jit_compile=True)
    found = compiled(ids, attention_mask=mask, max_new_tokens=3, suppress_tokens=[2]).numpy()[:, 6:]
    assert not np.array_equal(found, eager)


@every_backend
def test_options_of_texts_work_or_are_refused(backend):
    """transformers ignores some in Flax, fails with others, and fetches code for more; here it is one or the other."""
    model = ours(backend, "ForCausalLM", is_decoder=True)
    plain, _ = generated(backend, model, PROMPTS)
    word = [int(token) for token in plain[0, :2]]
    penalty, bad = {"repetition_penalty": 5.0}, {"bad_words_ids": [word]}
    for option in (
        penalty,
        bad,
        {"no_repeat_ngram_size": 1},
        {"num_beams": 2, "do_sample": True, "seed": 0, "temperature": 5.0},
    ):
        assert not np.array_equal(generated(backend, model, PROMPTS, **option)[0], plain)
    for option in ({"penalty_alpha": 0.6, "top_k": 4}, {"num_beam_groups": 2, "num_beams": 2}, {"stop_strings": ["a"]}):
        with pytest.raises(InputError, match="is not supported: leave it out"):
            generated(backend, model, PROMPTS, **option)
    other = peer(backend, "ForCausalLM", **ENCODER)
    if backend == "flax":
        before, _ = generated(backend, other, PROMPTS)
        np.testing.assert_array_equal(generated(backend, other, PROMPTS, **penalty)[0], before)
        np.testing.assert_array_equal(
            generated(backend, other, PROMPTS, bad_words_ids=[[int(before[0, 0])]])[0], before
        )
        with pytest.raises(NotImplementedError):
            generated(backend, other, PROMPTS, no_repeat_ngram_size=2)
        with pytest.raises(NotImplementedError, match="Beam sampling"):
            generated(backend, other, PROMPTS, num_beams=2, do_sample=True)
    if backend == "pt":
        with pytest.raises(ValueError, match="trust_remote_code"):
            generated(backend, other, PROMPTS, penalty_alpha=0.6, top_k=4)


# ---------------------------------------------------------------- Keras


@pytest.mark.skipif("tf" not in backends.installed(), reason="it is about TensorFlow")
def test_gradients_of_tables_are_dense():
    """transformers' TensorFlow gives them in slices, which Keras 3 squares one by one for a row that comes twice."""
    import tensorflow as tf

    for model, kind in ((ours("tf"), tf.Tensor), (peer("tf"), tf.IndexedSlices)):
        with tf.GradientTape() as tape:
            scalar = tf.nn.l2_loss(model(IDS).last_hidden_state)
        table = next(weight for weight in model.trainable_weights if tuple(weight.shape) == (99, 32))
        assert isinstance(tape.gradient(scalar, table if kind is tf.IndexedSlices else table.value), kind)


@pytest.mark.skipif("tf" not in backends.installed(), reason="it is about TensorFlow")
def test_models_are_those_of_keras_3():
    """transformers' TensorFlow refuses Keras 3's optimizers and its inputs of functional models; here both fit."""
    import keras

    ids, head = keras.Input((None,), dtype="int32"), "ForMaskedLM"
    same(keras.Model(ids, ours("tf", head)(ids).logits)(IDS), first("tf", ours("tf", head), {"input_ids": IDS}))
    model = load("tf", folder(head) / "tf", head, "float32")
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    model.fit(IDS, IDS, verbose=0)
    assert differ(first("tf", model, {"input_ids": IDS}), first("tf", ours("tf", head), {"input_ids": IDS}))
    other = theirs("tf", folder(head), head)
    with pytest.raises(ValueError, match="Could not interpret optimizer"):
        other.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="KerasTensor"):
        other(ids)
