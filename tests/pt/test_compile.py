"""Every head under PyTorch's compilers and function transforms."""

import pytest

torch = pytest.importorskip("torch")

from roberta_pln import schema
from roberta_pln.backends import BACKENDS
from roberta_pln.pt import RobertaPreLayerNormForCausalLM, RobertaPreLayerNormModel
from roberta_pln.pt.encoder import Cache
from tests.contract import HEADS, INPUTS, random_ids, tiny_config, with_labels

IDS = torch.from_numpy(random_ids())
CASES = {head: ({}, with_labels(INPUTS["right padding"])) for head in ("Model", "ForMaskedLM")}
CASES["Model"][1].pop("labels")
CASES |= {head: (changes, inputs) for head, changes, inputs in reversed(HEADS.values())}
CASES |= {"ForCausalLM": HEADS["causal, with an encoder"][1:]}


def made(head: str):
    """A model of a head with its inputs."""
    torch.manual_seed(0)
    changes, inputs = CASES[head]
    model = BACKENDS["pt"].model_class(head)(tiny_config(**changes)).double().eval()
    return model, {name: torch.as_tensor(value) for name, value in inputs.items()}


def same(left, right) -> None:
    """Two records hold the same, but for the order of sums in float64."""
    assert type(left) is type(right)
    expected = dict(right.named_arrays())
    for name, value in left.named_arrays():
        torch.testing.assert_close(value, expected.pop(name), rtol=0, atol=1e-13)
    assert not expected


def test_every_head_is_here():
    assert set(CASES) == set(schema.HEADS)


@pytest.mark.parametrize("head", schema.HEADS)
def test_compiled_without_graph_breaks(head):
    """Forward and backward, traced and differentiated ahead of time; without the slow C++ compiler behind."""
    model, inputs = made(head)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    record = compiled(**inputs)
    same(record, model(**inputs))
    first = next(iter(record.named_arrays()))[1]
    first.sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    next(iter(model(**inputs).named_arrays()))[1].sum().backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(gradients[name], value.grad, rtol=1e-11, atol=1e-13)


def test_compiled_by_the_default_compiler():
    model, inputs = made("ForMaskedLM")
    torch._dynamo.reset()
    same(torch.compile(model, fullgraph=True)(**inputs), model(**inputs))


def test_compiled_with_a_cache():
    model = RobertaPreLayerNormForCausalLM(tiny_config(is_decoder=True)).double().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = compiled(IDS[:, :6])
    assert type(first.past_key_values) is Cache
    assert first.past_key_values.get_seq_length() == 6
    same(compiled(IDS[:, 6:], past_key_values=first.past_key_values), model(IDS[:, 6:], past_key_values=first[1]))


@pytest.mark.parametrize("head", schema.HEADS)
def test_exported(head):
    """As one graph of free batch and length, which answers for other sizes as the model does."""
    model, inputs = made(head)
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    free = {0: torch.export.Dim("batch"), inputs["input_ids"].ndim - 1: torch.export.Dim("length", max=38)}
    shapes = dict.fromkeys(inputs, free)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        for rows, length in ((2, 5), (1, 38)):
            other = {name: value[:1].expand(rows, *value.shape[1:]) for name, value in inputs.items()}
            other = {name: torch.cat([value] * 4, dim=-1)[..., :length] for name, value in other.items()}
            same(exported(**other), model(**other))


@pytest.mark.parametrize("head", schema.HEADS)
def test_functional_call(head):
    """With other parameters than the model's own, under `grad`."""
    model, inputs = made(head)
    parameters = {name: value.detach() * 1.5 for name, value in model.named_parameters()}

    def total(values):
        return torch.func.functional_call(model, values, (), inputs)[0].sum()

    gradients = torch.func.grad(total)(parameters)
    with torch.no_grad():
        for value in model.parameters():
            value *= 1.5
    model(**inputs)[0].sum().backward()
    for name, value in model.named_parameters():
        expected = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-11, atol=1e-13)


def test_a_cache_has_what_users_of_transformers_call():
    model = RobertaPreLayerNormModel(tiny_config(is_decoder=True)).eval()
    past = model(IDS).past_key_values
    assert past.get_seq_length() == 11
    assert [[part is None for part in layer] for layer in past.to_legacy_cache()] == [[False, False, True, True]] * 2
    again = model(IDS[:, :1], past_key_values=past.to_legacy_cache())
    assert again.past_key_values.get_seq_length() == 12
    assert Cache().get_seq_length() == 0


def test_a_cache_of_transformers_is_refused():
    """It would have to be changed in place."""
    transformers = pytest.importorskip("transformers")
    model = RobertaPreLayerNormModel(tiny_config(is_decoder=True))
    with pytest.raises(
        ValueError, match="got DynamicCache; a cache of transformers becomes one by its to_legacy_cache"
    ):
        model(IDS, past_key_values=transformers.DynamicCache())
