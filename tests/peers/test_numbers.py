"""transformers in the same framework, with the same weights and inputs, computes the same.

In float64 the PyTorch classes are compared directly. In float32 both sides round, each in its own order, so what is
compared is how far each is from the float64 result: ours must not be farther than `RATIO` times theirs, and neither
can be nearer than that result rounded to float32.

Two distances are taken of every output. The root mean square of thousands of errors is known to a few per cent. The
largest error is not: it is one number, and of two sides that round alike one has it up to twice as large. So the
inputs come in `PARTS` parts, and the largest errors of the parts are averaged, which leaves less than a tenth to
chance. A loss is one number a part, and so those of all cases are taken together.
"""

import gc
import importlib
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

from roberta_pln import backends, checkpoint
from tests.contract import BASE, CONFIGS, HEADS, INPUTS, load, random_tensors, tiny_config, with_labels
from tests.peers.library import arrays, call, saved, theirs

RATIO = 1.5  # what this library promises
PARTS, ROWS = 16, 18  # of inputs; three choices go into 18 rows, so that all heads have the same shapes

LABELS = ("labels", "start_positions", "end_positions")
FLAGS = {"output_hidden_states": True, "output_attentions": True}


def without_labels(inputs):
    return {name: value for name, value in inputs.items() if name not in LABELS}


_PADDED, _ENCODER = INPUTS["right padding"], HEADS["causal, with an encoder"]
_LABELLED = with_labels(_PADDED)
_ALL, _NOT_TF, _PT = ("pt", "tf", "flax"), ("pt", "flax"), ("pt",)

CASES = {
    "base": ("Model", {}, INPUTS["token types"] | _PADDED, _ALL),
    "base, of embeddings": ("Model", {}, INPUTS["embeddings"], ("pt", "tf")),
    "base, a decoder": ("Model", {"is_decoder": True}, _PADDED, _PT),
    "base, with an encoder": ("Model", _ENCODER[1], without_labels(_ENCODER[2]), ("pt", "tf")),
    "masked": ("ForMaskedLM", {}, _LABELLED | {"position_ids": INPUTS["explicit positions"]["position_ids"]}, _ALL),
    "masked, untied": ("ForMaskedLM", CONFIGS["untied"], _LABELLED, _NOT_TF),
    "masked, some heads": ("ForMaskedLM", {}, _PADDED | {"head_mask": np.array([[1, 0, 1, 1], [0, 1, 1, 1]])}, _NOT_TF),
    "masked, heads in part": ("ForMaskedLM", {}, INPUTS["a head mask by layer"], _PT),
    "masked, a pattern": ("ForMaskedLM", {}, INPUTS["a mask of three axes"], _PT),
    "masked, relative_key": ("ForMaskedLM", CONFIGS["relative_key"], _LABELLED, _PT),
    "masked, relative_key_query": ("ForMaskedLM", CONFIGS["relative_key_query"], _LABELLED, _PT),
    "masked, pruned": ("ForMaskedLM", CONFIGS["pruned heads"], _LABELLED, _PT),
    "masked, chunked": ("ForMaskedLM", CONFIGS["chunked feed-forward"], _LABELLED, _PT),
    "causal": (*HEADS["causal"], _ALL),
    "causal without a mask": (*HEADS["causal without a mask"], ("pt", "tf")),
    "causal that sees both sides": (*HEADS["causal that sees both sides"], ("pt", "tf")),
    "causal, with an encoder": (*_ENCODER, _ALL),
    "causal, with an encoder and a pattern": (*HEADS["causal, with an encoder and a pattern"], _PT),
    "classes": (*HEADS["classes"], _NOT_TF),
    "classes in a column": (*HEADS["classes in a column"], ("pt", "tf")),
    "a regression": (*HEADS["a regression"], ("pt", "tf")),
    "several targets": (*HEADS["several targets"], _PT),
    "several values": (*HEADS["several values"], _PT),
    "tokens": (*HEADS["tokens"], _ALL),
    "an answer": (*HEADS["an answer"], _ALL),
    "choices": (*HEADS["choices"], _ALL),
}
"""Head, changes of `TINY`, arguments, and the frameworks whose class in transformers computes that."""


def enlarged(inputs: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """More rows in the likeness of some: a mask is one of theirs, other numbers stand where one of theirs has them.

    Embeddings are drawn anew, and so are ids that are not padding.
    """
    rng = np.random.default_rng(0)
    found = {}
    for name, value in inputs.items():
        shape = (rows, *value.shape[1:])
        if name == "head_mask":
            found[name] = value
        elif value.ndim > 2 and value.dtype.kind == "f":
            found[name] = rng.standard_normal(shape).astype(np.float32)
        else:
            source = rng.integers(len(value), size=(rows, *(1,) * (value.ndim - 1)) if "mask" in name else shape)
            found[name] = np.take_along_axis(value, np.broadcast_to(source, shape), axis=0)
        if name == "input_ids":
            found[name] = np.where(found[name] == 1, 1, rng.integers(2, 99, shape))
        if value.dtype.kind == "f":
            found[name] = found[name].astype(np.float32)
    return found


def answers(backend: str, model, inputs: dict[str, np.ndarray], **flags) -> dict[str, np.ndarray]:
    """Every array of the record, the parts of the inputs stacked; a loss that transformers leaves open is averaged."""
    if inputs.keys().isdisjoint(LABELS):  # only a loss is of all rows that are given together
        found = arrays(call(backend, model, inputs, **flags))
        return {name: np.stack(np.split(value, PARTS)) for name, value in found.items()}
    parts = []
    for index in range(PARTS):
        part = {name: value if name == "head_mask" else np.split(value, PARTS)[index] for name, value in inputs.items()}
        found = arrays(call(backend, model, part, **flags))
        parts.append({name: value.mean() if name == "loss" else value for name, value in found.items()})
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


@cache
def exact(name: str):
    """The inputs of a case, and its answers in float64."""
    head, changes, inputs, _ = CASES[name]
    inputs = enlarged(inputs, PARTS * (ROWS // 3 if head == "ForMultipleChoice" else ROWS))
    with tempfile.TemporaryDirectory() as folder:
        model = load("pt", saved(Path(folder), head, changes) / "pt", head, "float64")
    return inputs, answers("pt", model, inputs, **FLAGS)


@cache
def both(backend: str, name: str):
    """Our answers and theirs in float32."""
    head, changes, _, _ = CASES[name]
    inputs, _ = exact(name)
    if backend == "flax":  # there are no losses there
        inputs = without_labels(inputs)
    with tempfile.TemporaryDirectory() as folder:
        root = saved(Path(folder), head, changes)
        model, peer = load(backend, root / backend, head, "float32"), theirs(backend, root, head, **FLAGS)
    ours, others = answers(backend, model, inputs, **FLAGS), answers(backend, peer, inputs)
    if backend == "pt":  # without attentions another kernel is at work
        ours |= {f"fused {key}": value for key, value in answers("pt", model, inputs).items() if key != "loss"}
    return ours, others


def distances(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Root mean square of the errors, and the largest error of each part, averaged."""
    errors = np.abs(found - exact).reshape(len(exact), -1)
    return float(np.sqrt(np.mean(errors**2))), float(errors.max(axis=1).mean())


def farther(ours: np.ndarray, peer: np.ndarray, exact: np.ndarray) -> str:
    """What is wrong with our distances, in words, or nothing."""
    rounded = distances(exact.astype(np.float32), exact)
    pairs = zip(distances(ours, exact), distances(peer, exact), rounded, strict=True)
    wrong = [f"{mine:.1e} against {their:.1e}" for mine, their, least in pairs if mine > RATIO * max(their, least)]
    return ", ".join(wrong)


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in backends.installed() for name in CASES if backend in CASES[name][-1]],
)
def test_float32_is_as_near_to_float64_as_theirs(backend, name):
    ours, others = both(backend, name)
    _, reference = exact(name)
    comparable = {key for key in others if not key.startswith("past_key_values")}
    assert comparable == {key for key in ours if not key.startswith(("past_key_values", "fused"))}
    assert {value.dtype for value in (*ours.values(), *others.values())} == {np.dtype(np.float32)}
    for key in ours:
        kind = key.removeprefix("fused ")
        if kind not in others or kind == "loss":
            continue
        assert np.abs(others[kind] - reference[kind]).max() < 2e-6  # the peer has these weights indeed
        assert farther(ours[key], others[kind], reference[kind]) == "", key


@pytest.mark.parametrize("backend", [backend for backend in backends.installed() if backend != "flax"])
def test_losses(backend):
    """In units of the spacing of float32 at each loss."""
    found = []
    for name, (_, _, _, frameworks) in CASES.items():
        if backend in frameworks and "loss" in both(backend, name)[1]:
            reference = exact(name)[1]["loss"]
            unit = np.spacing(reference.astype(np.float32)).astype(np.float64)
            found.append([side["loss"] / unit for side in both(backend, name)] + [reference / unit])
    assert len(found) >= 8
    assert farther(*np.concatenate(found, axis=1)) == ""


def test_a_slightly_wrong_epsilon_is_seen():
    """The control: the comparison fails when epsilon is off by a tenth."""
    head, changes, _, _ = CASES["masked"]
    inputs, reference = exact("masked")
    with tempfile.TemporaryDirectory() as folder:
        model = load("pt", saved(Path(folder), head, changes) / "pt", head, "float32", layer_norm_eps=1.1e-5)
    ours = answers("pt", model, inputs, **FLAGS)
    others = both("pt", "masked")[1]
    assert farther(ours["hidden_states.0"], others["hidden_states.0"], reference["hidden_states.0"])
    assert farther(ours["logits"], others["logits"], reference["logits"])


# ------------------------------------------------------------------ base size


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of the published size in every framework's own format, a padded batch, its logits in float64."""
    config = tiny_config().replace(**BASE)
    tensors = random_tensors(config, "ForMaskedLM")
    # at this width the noise of the tiny weights would blow every sum up
    tensors = {name: value if value.ndim == 1 else value * 0.3 for name, value in tensors.items()}
    root = tmp_path_factory.mktemp("base")
    for backend in backends.installed():
        checkpoint.save(tensors, root / backend, config, "ForMaskedLM", backends.BACKENDS[backend].native_format)
    ids = np.random.default_rng(5).integers(3, config.vocab_size, (2, 48))
    ids[0, 36:] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).astype(np.int64)}
    yield root, inputs, probed("pt", root, inputs, "float64")
    gc.collect()


def probed(backend: str, root: Path, inputs, dtype: str) -> np.ndarray:
    """Our logits as they are computed where only they are asked for."""
    model = load(backend, root / backend, "ForMaskedLM", dtype)
    return importlib.import_module(f"roberta_pln.{backend}.probe").run(model, inputs, gradients=False)["logits"]


@pytest.mark.parametrize("backend", backends.installed())
def test_the_published_size(backend, large):
    """Every token is a part: the largest errors of the logits are averaged over the tokens."""
    root, inputs, reference = large
    tokens = inputs["attention_mask"] > 0
    ours = probed(backend, root, inputs, "float32")
    peer = arrays(call(backend, theirs(backend, root, "ForMaskedLM"), inputs))["logits"]
    assert ours.dtype == peer.dtype == np.float32
    assert np.abs(peer - reference)[tokens].max() < 1e-3  # the peer has these weights indeed
    assert farther(ours[tokens], peer[tokens], reference[tokens]) == ""


# ------------------------------------------------------------------ float64


def in_float64(head: str, changes: dict, folder: Path):
    """Our model and theirs in PyTorch, with the same weights."""
    import torch

    root = saved(folder, head, changes)
    return load("pt", root / "pt", head), theirs("pt", root, head, dtype=torch.float64)


# What transformers computes differently on purpose of ours: masks other than 0 and 1 and of four axes.
PEER_INPUTS = [name for name in INPUTS if name not in ("a mask of other numbers", "a mask of four axes")]


@pytest.mark.parametrize("name", PEER_INPUTS)
def test_float64_in_pytorch(name, tmp_path):
    import torch

    ours, peer = in_float64("ForMaskedLM", {}, tmp_path)
    arguments = {key: torch.as_tensor(value) for key, value in with_labels(INPUTS[name]).items()}
    if name == "a mask of booleans":
        arguments["attention_mask"] = arguments["attention_mask"].long()
    compare(ours, peer, arguments)


@pytest.mark.parametrize("changes", [name for name in CONFIGS if name != "another pad token"])
def test_float64_in_pytorch_with_every_config(changes, tmp_path):
    import torch

    ours, peer = in_float64("ForMaskedLM", CONFIGS[changes], tmp_path)
    compare(ours, peer, {key: torch.as_tensor(value) for key, value in with_labels(INPUTS["left padding"]).items()})


# What transformers computes differently on purpose of ours: the loss of its causal model is in float32 whatever the
# model is in, and it takes integers for classes even of a regression that asks for values.
@pytest.mark.parametrize("name", [*HEADS, *(name for name in CASES if CASES[name][0] == "Model")])
def test_float64_in_pytorch_with_every_head(name, tmp_path):
    import torch

    head, changes, inputs = HEADS[name] if name in HEADS else CASES[name][:3]
    ours, peer = in_float64(head, changes, tmp_path)
    arguments = {key: torch.as_tensor(value) for key, value in inputs.items()}
    if changes == {"num_labels": 1}:
        arguments["labels"] = arguments["labels"].double()
    compare(ours, peer, arguments, 1e-6 if head == "ForCausalLM" else 1e-13)


def compare(ours, peer, arguments, loss_tolerance=1e-13):
    flags = {"output_hidden_states": True, "output_attentions": True}
    mine, their = ours(**arguments, **flags), peer(**arguments, **flags)
    assert mine.keys() == tuple(their)
    named = dict(mine.named_arrays())
    for key in named:
        if key.startswith("past_key_values"):
            continue  # an object of its own there; the cache is tested by what is computed with it
        value = their
        for part in key.split("."):
            value = value[int(part) if part.isdigit() else part]
        # a hundred roundings of 1e-16 of numbers near 1
        tolerance = loss_tolerance if key == "loss" else 1e-13
        np.testing.assert_allclose(named[key].detach(), value.detach(), rtol=0, atol=tolerance, err_msg=key)
    if "loss" not in mine:
        return
    mine.loss.backward()
    their.loss.backward()
    gradients = dict(ours.named_parameters(remove_duplicate=False))
    for key, parameter in peer.named_parameters():
        if parameter.grad is not None:
            np.testing.assert_allclose(gradients[key].grad, parameter.grad, rtol=0, atol=loss_tolerance, err_msg=key)
