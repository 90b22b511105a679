"""Dropout."""

import math

import pytest

torch = pytest.importorskip("torch")

from roberta_pln.pt.layers import Dropout

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


@pytest.mark.parametrize(("last", "zeros"), [(-(2**63), 6553), (0, 6553), (2**62 - 2**30, 6553), (2**62 + 2**30, 6554)])
def test_the_rate_is_exact(last, zeros, monkeypatch):
    """A call has a multiple of 2**-16; that above 6553.25 of them a quarter of the time."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(torch, "randint", lambda *_: torch.cat([every, torch.tensor([last])]))
    dropped = Dropout(6553.25 / 2**16)(torch.ones(2**16))
    assert (dropped == 0).sum() == zeros


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
