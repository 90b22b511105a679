"""Weights in the order of the processor's kernel: the same numbers, and never stale ones."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from roberta_pln.pt import RobertaPreLayerNormForCausalLM
from roberta_pln.pt.packed import is_faster, packed
from tests.contract import random_ids, tiny_config

IDS = torch.from_numpy(random_ids())
ROWS = 8


def decoder(dtype=torch.float32):
    torch.manual_seed(0)
    return RobertaPreLayerNormForCausalLM(tiny_config(is_decoder=True)).to(dtype).eval()


def logits(model, rows=None):
    with torch.inference_mode():
        if rows is None:
            return model(IDS).logits
        with packed(model, rows):
            return model(IDS).logits


def some(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


pytestmark = pytest.mark.skipif(
    not is_faster(torch.nn.Linear(4, 4), ROWS), reason="PyTorch has no such kernel for this processor"
)


def test_the_numbers_are_those_of_the_usual_kernel():
    model = decoder()
    plain, fast = logits(model), logits(model, ROWS)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)  # float32: sums of 64 products in another order
    assert not any("forward" in vars(module) for module in some(model))
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: setattr(weight, "data", weight.data * 2),
        lambda weight: weight.copy_(weight * 2),
    ],
)
def test_a_weight_that_changes_is_packed_anew(change):
    model = decoder()
    logits(model, ROWS)
    with torch.no_grad():
        change(model.roberta_prelayernorm.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(logits(model, ROWS), logits(model), rtol=0, atol=1e-5)


def test_a_resized_table_is_packed_anew():
    model = decoder()
    logits(model, ROWS)
    model.resize_token_embeddings(120)
    assert logits(model, ROWS).shape[-1] == 120


def test_models_are_copied_and_saved_as_before(tmp_path):
    model = decoder()
    expected = logits(model, ROWS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ROWS), expected)
    assert model.state_dict().keys() == decoder().state_dict().keys()


def test_it_is_used_where_it_is_faster():
    assert not any(is_faster(module, 3) for module in some(decoder()))
    assert all(is_faster(module, 4) for module in some(decoder()))
    assert not any(is_faster(module, ROWS) for module in some(decoder(torch.float64)))
    assert not any(is_faster(module, ROWS) for module in some(decoder(torch.float16)))


def test_generate_gives_the_same_text():
    model = decoder()
    found = [model.generate(IDS, max_new_tokens=4, num_beams=4, compiled=compiled) for compiled in (False, True)]
    np.testing.assert_array_equal(*found)
