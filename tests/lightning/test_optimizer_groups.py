"""Parameter groups with settings of their own, groups added midway, and learning rates that schedulers set."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from signsgd_lightning import Signum

from .options import (
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

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.75),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 4], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.125, 0.5, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=0.03125, anneal_epochs=4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, gamma=0.5), lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=5)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1),
}


@over_options
def test_each_group_has_its_own_settings(options: Options) -> None:
    """Two groups in one optimizer do what two optimizers do."""
    first, second = parameters(), parameters()
    own = {"lr": 0.25, **{k: v for k, v in options.items() if k != "zeros"}}
    zeros = options.get("zeros")
    together = Signum([{"params": first}, {"params": second, **own}], lr=0.5, betas=(0.5, 0.75), zeros=zeros)
    first_alone = Signum(copies(first), lr=0.5, betas=(0.5, 0.75), zeros=zeros)
    second_alone = Signum(copies(second), **{"betas": (0.5, 0.75), **own}, zeros=zeros)
    for t in range(6):
        take_step(together, t)
        for alone, originals in ((first_alone, first), (second_alone, second)):
            share_gradients(originals, alone)
            alone.step()
    assert_equal(snapshot(together), snapshot(first_alone) + snapshot(second_alone))


@over_options
def test_group_added_midway_starts_like_a_new_optimizer(options: Options) -> None:
    """After an even number of steps: the zero rule counts the optimizer's steps, all else the group's own."""
    late = parameters()
    optimizer, alone = Signum([nn.Parameter(torch.ones(3))], lr=0.1, **options), Signum(copies(late), lr=0.1, **options)
    for t in range(2):
        take_step(optimizer, t)
    optimizer.add_param_group({"params": late})
    for t in range(6):
        take_step(optimizer, t)
        share_gradients(late, alone)
        alone.step()
    assert [group["step"] for group in optimizer.param_groups] == [8, 6]
    assert_equal(snapshot(optimizer)[1:], snapshot(alone))


def test_refused_group_leaves_the_optimizer_as_before() -> None:
    mine = parameters()
    optimizer, untouched = Signum(mine, lr=0.1, zeros="positive"), Signum(copies(mine), lr=0.1, zeros="positive")
    fresh = [nn.Parameter(torch.ones(2))]
    complex_one = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    bad: tuple[tuple[Options, str], ...] = (
        ({"params": fresh, "betas": (2.0, 0.9)}, "betas must lie in [0, 1), got (2.0, 0.9)"),
        ({"params": fresh, "zeros": "abstain"}, "zeros must be the same in all parameter groups, got 'abstain' beside"),
        ({"params": [*fresh, complex_one]}, "parameters must be real floating point, got torch.complex64"),
        ({"params": mine[:1]}, "some parameters appear in more than one parameter group"),
        ({"params": [fresh[0] * 2]}, "can't optimize a non-leaf Tensor"),
    )
    for group, sentence in bad:
        with pytest.raises(ValueError, match=".") as error:
            optimizer.add_param_group(group)
        assert str(error.value).startswith(sentence)
        assert str(optimizer.state_dict()) == str(untouched.state_dict())
    take_step(optimizer, 0)
    take_step(untouched, 0)
    assert_same(optimizer, untouched)


def test_named_parameters_keep_their_names() -> None:
    model = nn.Linear(2, 1)
    optimizer = Signum(model.named_parameters(), lr=0.5)
    take_step(optimizer, 0)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert optimizer.state[model.weight]["momentum"].shape == (1, 2)


@over_options
def test_tensor_lr_is_the_same_as_a_number(options: Options) -> None:
    by_tensor = Signum(parameters(), lr=torch.tensor(0.125), **options)
    by_number = Signum(parameters(), lr=0.125, **options)
    for t in range(4):
        if t == 2:
            by_tensor.param_groups[0]["lr"].fill_(0.5)
            by_number.param_groups[0]["lr"] = 0.5
        take_step(by_tensor, t)
        take_step(by_number, t)
    assert_same(by_tensor, by_number)


def scheduled(
    optimizer: Optimizer, p: nn.Parameter, make: Callable[[Optimizer], Any]
) -> tuple[list[float], list[float]]:
    """The learning rate and how far a parameter with gradient 1 moved, of each of 8 steps."""
    scheduler = make(optimizer)
    lrs, moves = [], []
    for _ in range(8):
        before = p.item()
        p.grad = torch.ones_like(p)
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        moves.append(before - p.item())
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)  # a metric that never improves
        else:
            scheduler.step()
    return lrs, moves


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_rate_takes_effect(make: Callable[[Optimizer], Any], tensor: bool) -> None:
    p, q = nn.Parameter(torch.zeros((), dtype=torch.float64)), nn.Parameter(torch.zeros((), dtype=torch.float64))
    lr = torch.tensor(0.25, dtype=torch.float64) if tensor else 0.25
    lrs, moves = scheduled(Signum([p], lr=lr, betas=(0.0, 0.0)), p, make)
    assert moves == pytest.approx(lrs, rel=1e-12)
    assert len(set(lrs)) > 1
    assert lrs == pytest.approx(scheduled(torch.optim.SGD([q], lr=0.25), q, make)[0], rel=1e-12)


def test_scheduler_keeps_the_groups_apart() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [q], "lr": 0.5}]
    optimizer = Signum(groups, lr=0.25, betas=(0.0, 0.0))
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5**t])
    for _ in range(3):
        p.grad, q.grad = torch.ones(2), -torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert p.tolist() == [-0.75, -0.75]
    assert q.tolist() == [0.875, 0.875]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=12, base_momentum=0.1, max_momentum=0.9),
        lambda o: lr_scheduler.CyclicLR(o, 0.125, 0.5, step_size_up=3, base_momentum=0.1, max_momentum=0.9),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_cycled_momentum_is_beta1(make: Callable[[Optimizer], LRScheduler]) -> None:
    """These schedulers cycle the first of an optimizer's `betas` unless told not to: the ballot follows."""
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = Signum([p], betas=(0.9, 0.5))
    scheduler, group, seen = make(optimizer), optimizer.param_groups[0], set()
    m, x = 0.0, 0.0
    for g in (4.0, -2.0, 1.0, -0.5, 0.75, -3.0, 2.0, -0.25, 1.5, -1.25):
        beta1, beta2 = group["betas"]
        seen.add(beta1)
        x -= group["lr"] * math.copysign(1, beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        p.grad = torch.full_like(p, g)
        optimizer.step()
        scheduler.step()
        assert p.item() == pytest.approx(x, rel=1e-12)
    assert len(seen) > 3
    assert beta2 == 0.5
