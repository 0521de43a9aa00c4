"""Gradients, settings and sizes that change between or within steps: followed, or refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers, fresh_workers

from .uses import backward, error_of, net_of, voter


def _changed(how: str) -> str:
    ddp, optimizer = voter(overlap=True)
    p = ddp.module[0].weight
    if how == "a hook registered later":
        p.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(-1)].clear())  # it must return None
    backward(ddp, 0)
    assert p.grad is not None
    if how == ".data":
        p.grad.data.mul_(-1)
    if how == "NumPy":
        p.grad.numpy()[...] *= -1
    if how == "replaced":
        p.grad = -p.grad
    return error_of(optimizer.step)


@pytest.mark.parametrize("how", [".data", "NumPy", "replaced", "a hook registered later", "not at all"])
def test_overlap_notices_gradients_that_changed(how: str, workers: Workers) -> None:
    for told in workers.run(2, _changed, how):
        if how == "not at all":
            assert told == "no error"
        else:
            assert told.startswith("RuntimeError: the gradient of 0.weight was changed between backward() and step()")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("momentum_dtype", torch.float16, "momentum_dtype must be None, which is float32, or torch.bfloat16, got"),
        ("betas", (1.5, 1.5), r"betas must lie in \[0, 1\), got \(1.5, 1.5\)"),
        ("betas", 0.9, r"betas must be a pair of numbers such as \(0.9, 0.9\), got 0.9"),
        ("lr", float("nan"), "lr must be 0 or more and finite, got nan"),
        ("verdict_momentum", 2.0, r"verdict_momentum must lie in \[0, 1\), got 2.0"),
        ("weight_decay", None, "weight_decay must be 0 or more and finite, got None"),
        ("warmup_steps", "never", "warmup_steps must be 'auto' or a whole number of 0 or more, got 'never'"),
    ],
)
def test_settings_are_checked_when_they_change(name: str, value: Any, told: str) -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = Signum([p])
    p.grad = torch.ones(5)
    optimizer.step()
    before, good = p.detach().clone(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=told):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.t == 1
    optimizer.param_groups[0][name] = good
    optimizer.step()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer, **cycle: OneCycleLR(optimizer, 0.1, total_steps=10, **cycle),
        lambda optimizer, **cycle: CyclicLR(optimizer, 0.01, 0.1, **cycle),
    ],
)
def test_a_schedule_may_not_turn_no_momentum_into_one(schedule: Any) -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = Signum([p], lr=0.1, betas=(0.0, 0.0), verdict_momentum=0.8)
    schedule(optimizer)
    with pytest.raises(ValueError, match=r"betas were \(0.0, 0.0\) and are .* cycle_momentum=False"):
        optimizer.step()
    other = Signum([p], lr=0.1, betas=(0.0, 0.0), verdict_momentum=0.8)
    schedule(other, cycle_momentum=False)
    other.step()
    cycled = Signum([p], lr=0.1)
    schedule(cycled)
    cycled.step()
    assert 0.8 <= cycled.param_groups[0]["betas"][0] <= 0.95


def test_equal_settings_in_other_spellings_are_equal(workers: Workers) -> None:
    assert workers.run(2, _spelled) == ["no error"] * 2


def _spelled() -> str:
    ddp = DistributedDataParallel(net_of())
    spelled: dict[str, Any] = {"lr": 0.125, "weight_decay": 0.0, "betas": (0.5, 0.5), "verdict_momentum": 0.0}
    if dist.get_rank() == 1:
        spelled = {"lr": np.float64(0.125), "weight_decay": 0, "betas": [0.5, 0.5], "verdict_momentum": 0}
    optimizer = Signum(ddp.parameters(), **spelled)

    def train() -> None:
        enable_majority_vote(ddp, optimizer)
        backward(ddp, 0)
        optimizer.step()

    return error_of(train)


def test_gradients_of_another_size_are_refused() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    p.data = torch.ones(500, 30)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 must have its shape \(500, 30\), got \(4, 3\)"):
        Signum([p]).step()
    q = nn.Parameter(torch.ones(4, 3))
    q.grad = torch.ones(4, 3)
    q.grad.data = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"must have its shape \(4, 3\), got \(1,\)"):
        Signum([q]).step()


def _lying() -> str:
    ddp, optimizer = voter(adversaries={1: lambda g: g[:1]})
    backward(ddp, 0)
    return error_of(optimizer.step)


@pytest.mark.multiprocess
def test_an_adversary_of_another_shape_is_refused() -> None:
    with fresh_workers(2) as own:
        told = own.run(2, _lying, group_timeout=4)
    assert told[1].startswith(
        "ValueError: an adversary must return a gradient of the shape (6, 4) that it got, not (1, 4"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_tiny_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="must be real floating point of 2 bytes or more, got torch.float8"):
        Signum([nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)])


def test_no_parameters(workers: Workers) -> None:
    assert (
        workers.run(2, _without_parameters)
        == ["ValueError: optimizer 0 has no parameters to vote on: leave it out"] * 2
    )


def _without_parameters() -> str:
    ddp = DistributedDataParallel(net_of())
    return error_of(lambda: enable_majority_vote(ddp, Signum([{"params": []}])))


def test_a_scalers_factor_does_not_outlive_a_step_that_failed() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer, scaler = Signum([p], lr=0.25, betas=(0.5, 0.5)), torch.amp.GradScaler("cpu", init_scale=256.0)
    p.grad = scaler.scale(torch.ones(3))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["momentum"].tolist() == [0.5] * 3
