"""Dropout; and what the backward pass computes anew: the same functions with the same derivatives."""

import math
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from roberta_pln.pt import attention, layers
from roberta_pln.pt.activations import ACTIVATIONS
from roberta_pln.pt.attention import InTurns
from roberta_pln.pt.layers import Dropout, Linear, dense_after

SIZE = 400_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 2**-8, 0.999, 1e-4])
def test_a_share_of_the_elements_is_zero(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(SIZE, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    zeros = (y == 0).double().mean().item()
    assert abs(zeros - p) < 5 * math.sqrt(p * (1 - p) / SIZE)  # five standard deviations
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))  # PyTorch's tolerance of the dtype
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    ("last", "zeros"), [(0, 6553), (2**62, 6553), (2**63 + 2**62 - 2**30, 6553), (2**63 + 2**62, 6554)]
)
def test_the_rate_is_exact(last, zeros):
    """A call has a multiple of 2**-16; that above 6553.25 of them a quarter of the time."""
    every = np.append(np.arange(2**16, dtype=np.uint16).view(np.uint64), np.uint64(last))
    generator = Mock(integers=Mock(return_value=every))
    kept = Dropout(6553.25 / 2**16).draw(torch.Size([2**16]), generator)
    assert (kept == 0).sum() == zeros
    assert (kept == 1).sum() == 2**16 - zeros
    assert generator.integers.call_args.kwargs["size"] == len(every)


def test_elements_are_decided_on_by_themselves():
    """None of those that come from one number, or are neighbours, follows another."""
    torch.manual_seed(0)
    zeros = (Dropout(0.5)(torch.ones(SIZE)) == 0).double()
    for distance in range(1, 9):
        both = (zeros[distance:] * zeros[:-distance]).mean().item()
        assert abs(both - 0.25) < 5 * 0.5 / math.sqrt(SIZE)


def test_the_seed_decides():
    ones = torch.ones(33)
    drawn = [(torch.manual_seed(seed), Dropout(0.5)(ones))[1] for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 7)])
def test_every_shape(shape):
    x = torch.randn(shape)
    assert Dropout(0.25)(x).shape == x.shape


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1e-9, 1.0), (1.0, 0.0)])
def test_rates_at_the_ends(p, expected):
    assert (Dropout(p)(torch.ones(1000)) == expected).all()


def test_nothing_is_dropped_outside_of_training():
    x = torch.randn(9)
    assert Dropout(0.5).eval()(x) is x


def test_each_example_has_its_own_under_vmap():
    torch.manual_seed(0)
    dropout = Dropout(0.5)
    different = torch.vmap(dropout, randomness="different")(torch.ones(2, 100))
    assert not torch.equal(different[0], different[1])
    same = torch.vmap(dropout, randomness="same")(torch.ones(2, 100))
    assert torch.equal(same[0], same[1])


# ------------------------------------------------------------- products of 16 bits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_the_processor_lacks(dtype, bias, monkeypatch):
    """Those of float32, rounded; and gradients."""
    torch.manual_seed(0)
    dense = Linear(64, 7, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    wide = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double() if bias else None)
    monkeypatch.setattr(layers, "EMULATED", frozenset([dtype]))
    y = dense(x)
    assert y.dtype == dtype
    # half a spacing, and what sums of 64 numbers of float32 are off may make it a whole one
    torch.testing.assert_close(y.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)
    monkeypatch.setattr(nn.Linear, "forward", Mock(side_effect=AssertionError("the slow way")))
    dense(x).sum().backward()
    expected = dense.weight.detach().double().sum(0).expand_as(x)
    torch.testing.assert_close(x.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)  # see above
    with pytest.raises(AssertionError, match="the slow way"):
        dense.float()(x.detach().float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 3, 64), (3, 5, 2, 64)])
def test_bfloat16_outside_of_training(shape, bias):
    """Whichever kernel it is, one rounding; and what needs PyTorch's own has it."""
    torch.manual_seed(0)
    dense = Linear(64, 7, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    wide = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double() if bias else None)
    with torch.no_grad():
        for layout in (x, x.transpose(0, -2).contiguous().transpose(0, -2) if x.ndim > 1 else x):
            # half a spacing, and what sums of 64 numbers of float32 are off may make it a whole one
            torch.testing.assert_close(dense(layout).double(), wide, rtol=torch.finfo(x.dtype).eps, atol=1e-6)


def test_who_has_the_kernel_of_compiled_code(monkeypatch):
    monkeypatch.setattr(layers, "EMULATED", frozenset())
    weight, x = nn.Parameter(torch.randn(7, 6).bfloat16()), torch.randn(3, 6).bfloat16()
    assert not layers.is_fused(x, weight)  # it has no gradient
    with torch.no_grad():
        assert layers.is_fused(x, weight)
        assert not layers.is_fused(x.float(), weight.float())
        assert not layers.is_fused(x[:, :5], weight)
        assert not layers.is_fused(x.to("meta"), weight)
        with torch.autocast("cpu", torch.float16):
            assert not layers.is_fused(x, weight)
        torch.vmap(lambda row: pytest.fail("its derivatives") if layers.is_fused(row, weight) else row)(x)
        monkeypatch.setattr(layers, "EMULATED", frozenset([torch.bfloat16]))
        assert not layers.is_fused(x, weight)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        Linear(6, 7, dtype=torch.bfloat16)(x[:, :5])


# ------------------------------------------------------------- what is computed anew


def before_and_layers(name):
    """Layers that take (..., 6), what may come before them, and an input for that."""
    torch.manual_seed(0)
    before = nn.LayerNorm(6, dtype=torch.float64) if name == "norm" else ACTIVATIONS[name]
    if name == "norm":
        nn.init.normal_(before.weight)
        nn.init.normal_(before.bias)
    x = torch.randn(2, 3, 12 if name == "glu" else 6, dtype=torch.float64, requires_grad=True)
    return before, [nn.Linear(6, size, dtype=torch.float64) for size in (5, 4)], x


def plain(before, x, *layers):
    return tuple(layer(before(x)) for layer in layers)


def is_kept(found):
    return "DenseAfter" not in type(found[0].grad_fn).__name__


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["norm", *ACTIVATIONS])
def test_dense_layers_behind_something(name, count):
    """Values, gradients, and their gradients."""
    before, layers, x = before_and_layers(name)
    layers = layers[:count]
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    inputs += before.parameters() if name == "norm" else ()
    found = []
    for run in (dense_after, plain):
        values = run(before, x, *layers)
        total = sum(y.sin().sum() for y in values)
        gradients = torch.autograd.grad(total, inputs, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
        once = torch.autograd.grad(sum(y.sin().sum() for y in run(before, x, *layers)), inputs)
        found.append([*values, *once, *gradients, *again])
    assert not is_kept(dense_after(before, x, *layers))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)  # some hundred roundings of 1e-16


def test_what_is_not_used_gets_no_gradient():
    before, layers, x = before_and_layers("norm")
    dense_after(before, x, *layers)[0].sum().backward()
    assert (layers[0].weight.grad != 0).all()
    assert (layers[1].weight.grad == 0).all()


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    before, (dense, _), x = before_and_layers("gelu")
    tensors = {"x": x, "weight": dense.weight, "bias": dense.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    dense_after(before, x, dense)[0].sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == {trained}


@pytest.mark.parametrize("watched", [0, 1, 2])
def test_hooks_see_their_layers(watched):
    """Then nothing is computed anew."""
    before, layers, x = before_and_layers("norm")
    hook = Mock(return_value=None)
    (before, *layers)[watched].register_forward_hook(hook)
    found = dense_after(before, x, *layers)
    assert hook.call_count == 1
    assert all(map(torch.equal, found, plain(before, x, *layers)))
    assert is_kept(found)


def test_a_change_of_what_is_computed_anew_is_noticed():
    before, (dense, _), x = before_and_layers("gelu")
    inner = x * 1
    (y,) = dense_after(before, inner, dense)
    assert not is_kept([y])
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("texts", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_texts_that_take_turns(rate, texts, monkeypatch):
    """Derivatives of first and second order, by differences; both passes drop the same."""
    heads, length = 2, 4
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", texts * heads * length**2)
    torch.manual_seed(1)
    inputs = [torch.randn(3, heads, length, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, 1, 1, length, dtype=torch.float64)
    dropout = Dropout(rate) if rate else None

    def run(*inputs):
        torch.manual_seed(2)
        return InTurns.apply(*inputs, bias, dropout)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert not torch.equal(run(*inputs), InTurns.apply(*inputs, bias, None)) or not rate


def test_no_texts_take_one_turn():
    empty = torch.zeros(0, 2, 3, 4, requires_grad=True)
    context = InTurns.apply(empty, empty, empty, None, Dropout(0.5))
    context.sum().backward()
    assert context.shape == empty.grad.shape == empty.shape


def test_texts_that_take_turns_are_dropped_from_apart(monkeypatch):
    """Each turn draws anew, at the rate, and what stays is scaled."""
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", 1)
    torch.manual_seed(0)
    query = torch.zeros(4, 1, 100, 100)
    value = torch.eye(100).expand(4, 1, 100, 100)  # so that the context is the probabilities
    found = InTurns.apply(query.requires_grad_(), query, value, None, Dropout(0.25)) * 100
    torch.testing.assert_close(found.detach().unique(), torch.tensor([0, 1 / 0.75]))  # PyTorch's tolerance of float32
    assert abs((found == 0).double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40_000)
    assert not any(torch.equal(found[0] == 0, other == 0) for other in found[1:])
