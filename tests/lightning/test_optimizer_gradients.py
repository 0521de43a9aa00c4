"""What `Signum` makes of gradients and parameters of every kind: missing, zero, not finite, scaled, laid out oddly."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from signsgd_lightning import Signum, kernels

from .options import (
    DTYPES,
    OPTIONS,
    Options,
    assert_equal,
    assert_same,
    copies,
    name,
    parameters,
    share_gradients,
    snapshot,
    take_step,
)

over_options = pytest.mark.parametrize("options", OPTIONS, ids=name)

LAYOUTS = ("contiguous", "transposed", "channels last", "every other")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, shape (a, b, c, d), in another place in memory."""
    if layout == "transposed":
        return values.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "every other":
        return torch.stack([values, torch.full_like(values, 99.0)], dim=-1)[..., 0]
    return values.clone()


@pytest.mark.parametrize(("layout", "gradient_layout"), list(product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[6]], ids=name)
def test_memory_layout_changes_nothing(
    options: Options, layout: str, gradient_layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more coordinates than are worked on at a time."""
    monkeypatch.setattr(kernels.NumpyKernel, "TILE", 100)
    torch.manual_seed(0)
    values = torch.randn(4, 5, 6, 7)
    plain, odd = nn.Parameter(values.clone()), nn.Parameter(laid_out(values, layout))
    strides = odd.stride()
    on_plain, on_odd = Signum([plain], lr=0.125, **options), Signum([odd], lr=0.125, **options)
    for _ in range(3):
        plain.grad = torch.randn_like(plain)
        odd.grad = laid_out(plain.grad, gradient_layout)
        on_plain.step()
        on_odd.step()
    assert_same(on_plain, on_odd)
    assert odd.stride() == strides
    assert (plain != values).all()


def test_parameter_of_several_tiles_is_stepped_whole() -> None:
    p = nn.Parameter(torch.zeros(2 * kernels.NumpyKernel.TILE + 3))
    p.grad = torch.linspace(-1, 1, p.numel()).sin()
    Signum([p], lr=0.5, betas=(0.5, 0.25), verdict_momentum=0.5).step()
    assert torch.equal(p, -0.25 * p.grad.sign())


def test_view_of_a_larger_tensor_leaves_the_rest_alone() -> None:
    whole = torch.zeros(6)
    p = nn.Parameter(whole[1::2])
    p.grad = torch.tensor([1.0, -1.0, 0.0])
    Signum([p], lr=0.5, weight_decay=0.25).step()
    assert whole.tolist() == [0.0, -0.5, 0.0, 0.5, 0.0, 0.0]


@over_options
def test_parameter_without_a_gradient_is_untouched(options: Options) -> None:
    mine = parameters()
    optimizer, others = Signum(mine, lr=0.1, **options), Signum(copies(mine[1:]), lr=0.1, **options)
    first = mine[0].detach().clone()
    for t in range(3):
        take_step(others, t)
        share_gradients([nn.Parameter(torch.ones(5, 3)), *others.param_groups[0]["params"]], optimizer)
        optimizer.step()
    assert torch.equal(mine[0], first)
    assert mine[0] not in optimizer.state
    assert mine[0].grad is None
    assert optimizer.t == 3
    assert_equal(snapshot(optimizer)[1:], snapshot(others))


@over_options
def test_gradients_are_never_modified(options: Options) -> None:
    mine = parameters()
    optimizer = Signum(mine, **options)
    for t in range(3):
        wild = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1e-40]).roll(t)
        mine[1].grad = wild.clone()
        mine[2].grad = torch.tensor(-2.0)
        kept = mine[2].grad
        optimizer.step()
        assert torch.equal(mine[1].grad.view(torch.int32), wild.view(torch.int32))
        assert mine[2].grad is kept
        assert kept.item() == -2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_options
def test_entries_that_are_not_finite_count_as_zero(options: Options, dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.0], dtype=dtype)
    odd, clean = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    on_odd, on_clean = Signum([odd], lr=0.25, **options), Signum([clean], lr=0.25, **options)
    nan, inf = float("nan"), float("inf")
    for gradient in ([1.0, -1.0, 2.0, -2.0, 0.0], [nan, inf, -inf, -0.5, 0.0], [nan, 3.0, -inf, inf, nan]):
        odd.grad = torch.tensor(gradient, dtype=dtype)
        clean.grad = torch.nan_to_num(odd.grad, nan=0.0, posinf=0.0, neginf=0.0)
        on_odd.step()
        on_clean.step()
        assert_same(on_odd, on_clean)
    assert odd.isfinite().all()


@pytest.mark.parametrize(
    ("zeros", "path"),
    [
        (None, [1.0, 1.0, 1.0, 1.0]),
        ("abstain", [1.0, 1.0, 1.0, 1.0]),
        ("alternate", [0.75, 1.0, 0.75, 1.0]),
        ("positive", [0.75, 0.5, 0.25, 0.0]),
    ],
)
@pytest.mark.parametrize("options", [{"betas": (0.0, 0.0)}, {}, {"betas": (0.9, 0.99)}], ids=name)
def test_zero_gradients_drift_only_by_the_rule(zeros: str | None, path: list[float], options: Options) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Signum([p], lr=0.25, zeros=zeros, **options)  # type: ignore[arg-type]
    for expected in path:
        p.grad = torch.tensor([0.0, -0.0, 0.0])
        optimizer.step()
        assert p.tolist() == [expected] * 3


def test_negative_zeros_and_the_smallest_numbers_have_their_sign() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([-0.0, 1e-45, -1e-45, 3e38])
    Signum([p], lr=1.0, betas=(0.0, 0.0)).step()
    assert p.tolist() == [0.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_update_is_as_exact_as_the_parameters_dtype(gamma: float, dtype: torch.dtype) -> None:
    """Half types are rounded once, at the end; float64 is not squeezed through float32."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(1000, dtype=torch.float64).to(dtype))
    optimizer = Signum([p], lr=0.0123, betas=(0.0, 0.0), verdict_momentum=gamma, weight_decay=0.3)
    for _ in range(3):
        x = p.detach().to(torch.float64, copy=True)
        p.grad = torch.randn(1000, dtype=torch.float64).to(dtype)
        optimizer.step()
        u = optimizer.state[p]["verdict_momentum"].double() if gamma else p.grad.double().sign()
        expected = (x - 0.0123 * (u + 0.3 * x)).to(dtype)
        eps = torch.finfo(dtype).eps if dtype.itemsize > 2 else 0.0
        torch.testing.assert_close(p.detach(), expected, rtol=eps, atol=eps)


def test_sparse_gradient_is_refused_before_anything_changed() -> None:
    dense, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    groups: list[dict[str, Any]] = [{"params": [dense]}, {"params": embedding.parameters()}]
    optimizer = Signum(groups, verdict_momentum=0.5)
    before = copies((dense, embedding.weight))
    torch.autograd.backward(dense.sum() + embedding(torch.tensor([1, 2])).sum())
    with pytest.raises(RuntimeError, match=".") as error:
        optimizer.step()
    assert str(error.value) == (
        "Signum does not support sparse gradients: a coordinate without an entry would still have to vote. "
        "Build the embedding with sparse=False."
    )
    assert torch.equal(dense, before[0])
    assert torch.equal(embedding.weight, before[1])
    assert not optimizer.state
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]


@over_options
def test_scaled_gradients_are_unscaled_before_the_momentum(options: Options) -> None:
    mine = parameters()
    plain, scaled = Signum(copies(mine), lr=0.1, **options), Signum(mine, lr=0.1, **options)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for t in range(5):
        take_step(plain, t)
        for p, q in zip(mine, plain.param_groups[0]["params"], strict=True):
            p.grad = scaler.scale(q.grad)
        kept = [p.grad for p in mine]
        if t == 3:
            scaler.unscale_(scaled)  # as before clipping: it must not be unscaled twice
        scaler.step(scaled)
        scaler.update()
        assert all(p.grad is g for p, g in zip(mine, kept, strict=True))
        assert_same(plain, scaled)
    assert scaler.get_scale() == 2.0**12
    assert not hasattr(scaled, "grad_scale")


@pytest.mark.parametrize("unscaled_first", [False, True])
def test_overflow_skips_no_step_costs_only_its_entry_and_lowers_the_scale(unscaled_first: bool) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer, scaler = Signum([p], lr=0.25, betas=(0.5, 0.5)), GradScaler("cpu", init_scale=64.0)
    for gradient in ([1.0, -1.0, 0.0], [float("inf"), 2.0, float("nan")]):
        p.grad = scaler.scale(torch.tensor(gradient))
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.t == 2
    assert optimizer.state[p]["momentum"].tolist() == [0.25, 0.75, 0.0]
    assert p.tolist() == [-0.5, 0.0, 0.0]
    assert scaler.get_scale() == 32.0


def test_half_gradients_are_unscaled_in_float32() -> None:
    """What a gradient scaler is for: entries too small for float16 count."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer, scaler = Signum([p], lr=0.25, betas=(0.5, 0.5)), GradScaler("cpu", init_scale=2.0**16)
    torch.autograd.backward(scaler.scale(p.float() @ torch.tensor([2.0**-30, -(2.0**-26)])))
    scaler.step(optimizer)
    assert optimizer.state[p]["momentum"].tolist() == [2.0**-31, -(2.0**-27)]
    assert p.tolist() == [-0.25, 0.25]
