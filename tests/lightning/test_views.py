"""All parameters as one long vector: every coordinate once, in order, however it is cut."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from signsgd_lightning.views import FlatView, cover, lay_out

GROUP: dict[str, Any] = {
    "lr": 0.5,
    "betas": (0.5, 0.5),
    "weight_decay": 0.0,
    "verdict_momentum": 0.0,
    "warmup_steps": 0,
    "maximize": False,
    "orthogonalize": False,
    "step": 0,
}

sizes_of_tensors = st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 64, 101]), max_size=12)


def views_of(sizes: list[int]) -> list[FlatView]:
    return [FlatView(torch.empty(size), GROUP, {}, present=True) for size in sizes]


@given(sizes_of_tensors)
@settings(deadline=None)
def test_lay_out_puts_one_after_the_other(sizes: list[int]) -> None:
    views = views_of(sizes)
    assert lay_out(views) == sum(sizes)
    assert [view.start for view in views] == [sum(sizes[:k]) for k in range(len(sizes))]
    assert [view.stop for view in views] == [sum(sizes[: k + 1]) for k in range(len(sizes))]


@given(sizes_of_tensors, st.integers(1, 200))
@settings(deadline=None)
def test_blocks_cover_every_coordinate_once_in_order(sizes: list[int], block: int) -> None:
    views = views_of(sizes)
    length = lay_out(views)
    covered = []
    for lo in range(0, length, block):
        for view, a, b in cover(views, lo, min(lo + block, length)):
            assert 0 <= a < b <= view.parameter.numel()
            assert lo <= view.start + a
            covered += [(id(view), coordinate) for coordinate in range(a, b)]
    assert covered == [(id(view), k) for view in views for k in range(view.parameter.numel())]


@given(sizes_of_tensors, st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None)
def test_any_cut_is_covered(sizes: list[int], lo: int, hi: int) -> None:
    views = views_of(sizes)
    length = lay_out(views)
    covered = [view.start + k for view, a, b in cover(views, lo, hi) for k in range(a, b)]
    assert covered == list(range(lo, min(hi, length)))


def test_no_parameters_at_all() -> None:
    assert lay_out([]) == 0
    assert list(cover([], 0, 8)) == []


@pytest.mark.parametrize("lengths", [(12,), (5, 7), (1, 4, 4, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_segment_in_pieces_is_the_segment_at_once(transposed: bool, lengths: tuple[int, ...]) -> None:
    """Coordinates are counted row by row, also where the parameter lies in memory column by column."""
    x, g = torch.arange(12.0).view(3, 4), torch.arange(-6.0, 6.0).view(3, 4)
    p = nn.Parameter(x.t().contiguous().t() if transposed else x.clone())
    p.grad = g
    view = FlatView(p, GROUP, defaultdict(dict), present=True)
    lo = 0
    with torch.no_grad():
        for length in lengths:
            c = view.directions(lo, lo + length)
            assert c.tolist() == (g.view(-1)[lo : lo + length] / 2).tolist()
            assert view.gradient(lo, lo + length).tolist() == g.view(-1)[lo : lo + length].tolist()
            view.apply(lo, lo + length, c.sign())
            lo += length
        view.finish()
    assert p.tolist() == (x - 0.5 * g.sign()).tolist()
    assert view.state[p]["momentum"].tolist() == (g / 2).tolist()


def test_directions_take_the_scale_off_and_leave_the_gradient() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([8.0, float("inf"), float("nan")])
    view = FlatView(p, {**GROUP, "maximize": True}, defaultdict(dict), present=True, inverse_scale=torch.tensor(0.25))
    assert view.directions(0, 3).tolist() == [-1.0, 0.0, 0.0]
    assert view.gradient(0, 3).isfinite().tolist() == [True, False, False]
    assert p.grad[0].item() == 8.0
