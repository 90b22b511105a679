"""A model copied, pickled, in another type, on another device."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from roberta_pln import schema
from roberta_pln.backends import BACKENDS
from roberta_pln.pt import RobertaPreLayerNormForMaskedLM
from tests.contract import random_checkpoint, random_ids, tiny_config

IDS = torch.from_numpy(random_ids())


def made(head: str):
    torch.manual_seed(0)
    return BACKENDS["pt"].model_class(head)(tiny_config()).eval()


def answer(model) -> torch.Tensor:
    ids = IDS[:, None] if model.head == "ForMultipleChoice" else IDS
    with torch.no_grad():
        return model(ids)[0]


def saved_and_loaded(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("head", schema.HEADS)
def test_copies(head, way):
    """They compute the same, share nothing with the original, and keep their ties."""
    model = made(head)
    copied = COPIES[way](model)
    assert torch.equal(answer(copied), answer(model))
    assert copied.num_parameters() == sum(value.numel() for value in copied.parameters())
    before = answer(model)
    with torch.no_grad():
        for value in copied.parameters():
            value.add_(1)
    assert torch.equal(answer(model), before)
    copied.config.output_attentions = True
    assert not model.config.output_attentions


TYPES = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "to": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "there and back": (lambda model: model.double().float(), torch.float32),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("head", schema.HEADS)
def test_types(head, name):
    change, dtype = TYPES[name]
    model = made(head)
    expected = answer(model)
    changed = answer(change(model))
    assert model.dtype == changed.dtype == dtype
    # Float32 and float64 differ by float32's roundings; half precision by a few of its own spacings of 0.008 near 1.
    torch.testing.assert_close(changed.float(), expected, rtol=0, atol=max(2e-6, 8 * torch.finfo(dtype).eps))


def test_onto_a_device(tmp_path):
    """Loaded there, moved there; the device without memory stands for any."""
    path = random_checkpoint(tmp_path, tiny_config(), "ForMaskedLM")
    for device in ("cpu", torch.device("cpu")):
        assert RobertaPreLayerNormForMaskedLM.from_pretrained(path, device=device).device == torch.device("cpu")
    loaded = RobertaPreLayerNormForMaskedLM.from_pretrained(path, device="meta")
    assert {value.device.type for value in loaded.parameters()} == {"meta"}
    assert loaded(torch.zeros((2, 5), dtype=torch.long, device="meta")).logits.shape == (2, 5, 99)
    with torch.device("meta"):
        assert RobertaPreLayerNormForMaskedLM(tiny_config()).device.type == "meta"


def test_autocast():
    model = made("ForMaskedLM")
    with torch.autocast("cpu", torch.bfloat16):
        record = model(IDS, labels=IDS)
    assert record.logits.dtype == torch.bfloat16
    assert record.loss.dtype == torch.float32
    record.loss.backward()
    assert {value.grad.dtype for value in model.parameters() if value.grad is not None} == {torch.float32}
