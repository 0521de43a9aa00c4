"""`Signum(orthogonalize=True)`: every step is the reference's but where rounding decides a ballot, alone and voted."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import signsgd_core as core
from signsgd_lightning import Signum
from signsgd_lightning.polar import polar

from .models import judge, record

TOLERANCE = 1e-3
SHAPES = ((6, 9), (9, 4), (4, 3, 2), (5, 2, 3, 3), (6, 9), (0, 4), (1, 7))
"""Wide, tall, kernels, twice the same, without entries, one row."""

SETTINGS: list[dict[str, Any]] = [
    {"betas": (0.9, 0.95)},
    {"betas": (0.0, 0.0), "zeros": "alternate", "weight_decay": 0.1},
    {"betas": (0.9, 0.9), "zeros": "positive", "verdict_momentum": 0.5},
    {"betas": (0.9, 0.95), "warmup_steps": 2, "zeros": "abstain"},
    {"betas": (0.5, 0.9), "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
]


def gradient(t: int, k: int, shape: Sequence[int], worker: int = 0) -> Tensor:
    """Rank deficient, of any magnitude, at times zero or with an entry that is not finite."""
    random = torch.Generator().manual_seed(1_000 * t + 10 * k + worker)
    g = torch.randn(shape, generator=random) * 10.0 ** (k - 4)
    if t % 3 == 2 and k == 1:
        g.zero_()
    if g.numel() > 20:
        g.view(-1)[t] = (torch.nan, torch.inf)[t % 2]
    return g


def parameters(shapes: Sequence[Sequence[int]] = SHAPES) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def run(optimizer: Signum, steps: int = 6, first: int = 0, worker: int = 0) -> None:
    for t in range(first, first + steps):
        for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = gradient(t, k, p.shape, worker).to(p.dtype)
        optimizer.step()


def undecided(reference: core.Reference) -> float:
    return float(np.concatenate([u.ravel() for u in reference.undecided]).mean())


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_alone(chosen: dict[str, Any]) -> None:
    optimizer = Signum(parameters(), lr=0.0625, orthogonalize=True, **chosen)
    (one,) = record(optimizer)
    run(optimizer)
    reference = judge([one], **chosen, orthogonalize=dict.fromkeys(range(len(SHAPES)), 1), tolerance=TOLERANCE)
    print(f"undecided: {undecided(reference):.2%}")
    assert undecided(reference) < 0.02
    for k, p in enumerate(optimizer.param_groups[0]["params"]):
        if chosen["betas"][0]:
            np.testing.assert_array_equal(optimizer.state[p]["momentum"], reference.momenta[0][k])


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), exponent=st.integers(-40, 35), seed=st.integers(0, 99))
def test_the_polar_factor_is_cores(rows: int, columns: int, exponent: int, seed: int) -> None:
    c = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    c[1] = 0
    c[2, 1::2] *= 2.0**-60  # rows of dead units
    ours = polar(c, core.NS_STEPS, core.NS_COEFFICIENTS).numpy()
    expected = core.polar(c.reshape(3 * rows, columns).double().numpy(), count=3).reshape(ours.shape)
    scale = np.sqrt((expected**2).mean((1, 2), keepdims=True)) + (expected == 0).all((1, 2), keepdims=True)
    assert (np.abs(ours - expected) / scale).max() < TOLERANCE
    assert not ours[1].any()
    assert not ours[2, 1::2].any()


def test_a_fused_projection_steps_as_three() -> None:
    whole = nn.Parameter(torch.randn(12, 8))
    three = [nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    settings: dict[str, Any] = {"lr": 0.5, "betas": (0.9, 0.95), "orthogonalize": True}
    fused, apart = Signum([whole], **settings, matrices=3), Signum(three, **settings)
    for t in range(4):
        whole.grad = gradient(t, 3, whole.shape)
        for p, g in zip(three, whole.grad.chunk(3), strict=True):
            p.grad = g
        fused.step()
        apart.step()
    assert torch.equal(whole, torch.cat([*three]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_types(dtype: torch.dtype) -> None:
    of_type = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    optimizer = Signum(of_type, lr=0.0625, betas=(0.9, 0.95), orthogonalize=True, weight_decay=0.1)
    (one,) = record(optimizer)
    run(optimizer)
    every = dict.fromkeys(range(len(SHAPES)), 1)
    judge([one], betas=(0.9, 0.95), weight_decay=0.1, orthogonalize=every, tolerance=TOLERANCE)


def test_memory_that_lies_oddly() -> None:
    """Column by column, and a gradient that is a slice."""
    steps = []
    for oddly in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 8).t().contiguous().t() if oddly else torch.randn(6, 8))
        optimizer = Signum([p], lr=0.5, betas=(0.5, 0.75), orthogonalize=True)
        for t in range(3):
            wide = torch.randn(6, 16, generator=torch.Generator().manual_seed(t))
            p.grad = wide[:, ::2] if oddly else wide[:, ::2].contiguous()
            optimizer.step()
        steps.append(p.detach().contiguous())
    assert torch.equal(*steps)


def test_maximize_goes_the_other_way() -> None:
    ends = []
    for sign, maximize in ((1, False), (-1, True)):
        p = nn.Parameter(torch.zeros(4, 6))
        optimizer = Signum([p], lr=0.5, betas=(0.5, 0.75), orthogonalize=True, maximize=maximize)
        for t in range(3):
            p.grad = sign * gradient(t, 4, p.shape)
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_a_momentum_of_half_the_size() -> None:
    """It is rounded once, and the ballot is that of the direction before."""
    p, q = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))
    narrow = Signum([p], 0.5, betas=(0.9, 0.95), orthogonalize=True, momentum_dtype=torch.bfloat16)
    plain = Signum([q], 0.5, betas=(0.9, 0.95), orthogonalize=True)
    for optimizer in (narrow, plain):
        run(optimizer, 1)
    assert torch.equal(narrow.state[p]["momentum"], plain.state[q]["momentum"].bfloat16())
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("shapes", "changes", "error"),
    [
        (
            [(4, 4), (4,)],
            {},
            r"parameter 1 of group 0 has the shape \(4,\): put it in a group with orthog",
        ),
        ([(2, 2, 2, 2, 2)], {}, r"takes parameters of 2 to 4 dimensions, parameter 0 of group 0"),
        ([(4, 4)], {"matrices": 3}, r"parameter 0 of group 0 of shape \(4, 4\) is to hold 3 matrices"),
        ([(4, 4)], {"matrices": 1.5}, "matrices must be a whole number of 1 or more, got 1.5"),
        ([(4, 4)], {"ns_steps": 0}, "ns_steps must be a whole number of 1 to 99, got 0"),
        ([(4, 4)], {"ns_coefficients": (1, 2)}, "ns_coefficients must be three finite numbers"),
    ],
)
def test_what_cannot_be(shapes: Any, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Signum(parameters(shapes), orthogonalize=True, **changes)


def test_a_group_that_cannot_be_is_not_added() -> None:
    optimizer = Signum(parameters([(2, 2)]), orthogonalize=True)
    with pytest.raises(ValueError, match="parameter 0 of group 1 has the shape"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


def test_a_setting_that_was_changed_is_looked_at() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = Signum([p])
    optimizer.param_groups[0]["orthogonalize"] = True
    with pytest.raises(ValueError, match="parameter 0 of group 0 has the shape"):
        optimizer.step()
    assert not p.any()


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    one = Signum(parameters(), lr=0.25, betas=(0.9, 0.95), orthogonalize=True)
    run(one, 3)
    other = Signum([nn.Parameter(p.detach().clone()) for p in one.param_groups[0]["params"]], orthogonalize=True)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer in (one, other):
        run(optimizer, 3, first=3)
    for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_a_state_of_an_earlier_version_is_not_orthogonalized() -> None:
    optimizer = Signum(parameters([(2, 2)]))
    state = optimizer.state_dict()
    for name in ("orthogonalize", "matrices", "ns_steps", "ns_coefficients"):
        del state["param_groups"][0][name]
    optimizer.load_state_dict(state)
    run(optimizer, 1)
    assert optimizer.param_groups[0]["orthogonalize"] is False
