"""transformers in the same framework, with the same weights and inputs, computes the same.

In float64 the PyTorch classes are compared directly. In float32 both sides round, each in its own order, so what is
compared is how far each is from the float64 result: ours must not be farther than `RATIO` times theirs.
"""

import gc
import importlib

import numpy as np
import pytest

from roberta_pln import backends, checkpoint
from tests.contract import BASE, CONFIGS, HEADS, INPUTS, TINY, load, random_tensors, tiny_config, with_labels

transformers = pytest.importorskip("transformers")

RATIO = 1.5  # what this library promises
CLASSES = {"pt": "", "tf": "TF", "flax": "Flax"}
SIZES = {"tiny": TINY, "base": BASE}
BATCHES = {"tiny": (16, 30), "base": (2, 48)}


def theirs(backend: str, folder):
    name = CLASSES[backend] + "RobertaPreLayerNormForMaskedLM"
    return getattr(transformers, name).from_pretrained(folder)


def their_logits(backend: str, folder, inputs) -> np.ndarray:
    model = theirs(backend, folder)
    if backend == "pt":
        import torch

        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    return np.asarray(model(**inputs).logits)


def our_logits(backend: str, folder, inputs, dtype: str) -> np.ndarray:
    model = load(backend, folder, "ForMaskedLM", dtype)
    return importlib.import_module(f"roberta_pln.{backend}.probe").run(model, inputs, gradients=False)["logits"]


@pytest.fixture(scope="module", params=SIZES)
def size(request, tmp_path_factory):
    """A checkpoint in every framework's own format, a padded batch, and its logits in float64."""
    pytest.importorskip("torch")
    config = tiny_config().replace(**SIZES[request.param])
    tensors = random_tensors(config, "ForMaskedLM")
    if request.param == "base":  # at this width the noise of the tiny weights would blow every sum up
        tensors = {name: value if value.ndim == 1 else value * 0.3 for name, value in tensors.items()}
    root = tmp_path_factory.mktemp(request.param)
    for backend in backends.installed():
        checkpoint.save(tensors, root / backend, config, "ForMaskedLM", backends.BACKENDS[backend].native_format)
    batch, length = BATCHES[request.param]
    ids = np.random.default_rng(5).integers(3, config.vocab_size, (batch, length))
    ids[::2, length * 3 // 4 :] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).astype(np.int64)}
    reference = our_logits("pt", root / "pt", inputs, "float64")
    yield root, inputs, reference
    gc.collect()


@pytest.mark.parametrize("backend", backends.installed())
def test_float32_is_as_near_to_float64_as_theirs(backend, size):
    root, inputs, reference = size
    tokens = inputs["attention_mask"] > 0
    ours = our_logits(backend, root / backend, inputs, "float32")
    peer = their_logits(backend, root / backend, inputs)
    assert ours.dtype == peer.dtype == np.float32
    assert 0 < np.abs(peer - reference)[tokens].max() < 1e-3  # the peer has these weights indeed
    for measure in (np.max, lambda error: np.sqrt(np.mean(np.square(error)))):
        assert measure(np.abs(ours - reference)[tokens]) <= RATIO * measure(np.abs(peer - reference)[tokens])


def both(changes, tmp_path, head="ForMaskedLM"):
    """Our model and theirs in float64, with the same weights."""
    torch = pytest.importorskip("torch")
    config = tiny_config(**CONFIGS[changes])
    checkpoint.save(random_tensors(config, head), tmp_path, config, head)
    peer = getattr(transformers, f"RobertaPreLayerNorm{head}").from_pretrained(tmp_path, dtype=torch.float64)
    return load("pt", tmp_path, head), peer


# What transformers computes differently on purpose of ours: masks other than 0 and 1 and of four axes.
PEER_INPUTS = [name for name in INPUTS if name not in ("a mask of other numbers", "a mask of four axes")]


@pytest.mark.parametrize("name", PEER_INPUTS)
def test_float64_in_pytorch(name, tmp_path):
    import torch

    ours, peer = both("plain", tmp_path)
    arguments = {key: torch.as_tensor(value) for key, value in with_labels(INPUTS[name]).items()}
    if name == "a mask of booleans":
        arguments["attention_mask"] = arguments["attention_mask"].long()
    compare(ours, peer, arguments)


@pytest.mark.parametrize("changes", [name for name in CONFIGS if name not in ("another pad token",)])
def test_float64_in_pytorch_with_every_config(changes, tmp_path):
    import torch

    ours, peer = both(changes, tmp_path)
    compare(ours, peer, {key: torch.as_tensor(value) for key, value in with_labels(INPUTS["left padding"]).items()})


# What transformers computes differently on purpose of ours: the loss of its causal model is in float32 whatever the
# model is in, and it takes integers for classes even of a regression that asks for values.
@pytest.mark.parametrize("name", HEADS)
def test_float64_in_pytorch_with_every_head(name, tmp_path):
    import torch

    head, changes, inputs = HEADS[name]
    config = tiny_config(**changes)
    checkpoint.save(random_tensors(config, head), tmp_path, config, head)
    peer = getattr(transformers, f"RobertaPreLayerNorm{head}").from_pretrained(tmp_path, dtype=torch.float64)
    arguments = {key: torch.as_tensor(value) for key, value in inputs.items()}
    if changes == {"num_labels": 1}:
        arguments["labels"] = arguments["labels"].double()
    compare(load("pt", tmp_path, head), peer, arguments, 1e-6 if head == "ForCausalLM" else 1e-13)


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
    if mine.loss is None:
        return
    mine.loss.backward()
    their.loss.backward()
    gradients = dict(ours.named_parameters(remove_duplicate=False))
    for key, parameter in peer.named_parameters():
        if parameter.grad is not None:
            np.testing.assert_allclose(gradients[key].grad, parameter.grad, rtol=0, atol=loss_tolerance, err_msg=key)
