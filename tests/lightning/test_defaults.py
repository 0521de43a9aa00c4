"""Torch's default dtype and device, and its compiler: what they may not change in a step or a vote."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from signsgd_lightning import Signum, kernels
from tests.workers import Workers, fresh_workers

from .models import judge, record
from .uses import SIGNUM, backward, net_of, voter


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["native", "NumPy", "tensor operations"])
def test_torchs_default_dtype(default: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters that no compiled loop takes: another dtype, or not row-major."""
    others = {"NumPy": kernels.NumpyKernel(), "tensor operations": kernels.DeviceKernel()}
    if kernel in others:
        monkeypatch.setattr(kernels, "for_device", lambda device: others[kernel])
    for values in (torch.zeros(200, dtype=torch.float64), torch.zeros(20, 10).t(), torch.zeros(200, dtype=torch.half)):
        p = nn.Parameter(values)
        torch.set_default_dtype(default)
        try:
            optimizer = Signum([p], lr=0.125, betas=(0.5, 0.25), verdict_momentum=0.5)
            p.grad = torch.ones_like(p)
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert (p == -0.0625).all()


def _by_default(dtype: torch.dtype, options: dict[str, Any]) -> Any:
    net = net_of().double()
    ddp, optimizer = voter(net, **options)
    (one,) = record(optimizer)
    if dist.get_rank() == 0:
        torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        for t in range(2):
            for k, p in enumerate(net.parameters()):
                random = torch.Generator("cpu").manual_seed(100 * t + 10 * k + dist.get_rank())
                p.grad = (torch.randint(-3, 4, p.shape, generator=random, device="cpu") / 8).double()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    del ddp
    return one


@pytest.mark.multiprocess
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_do_not_reach_a_vote(dtype: torch.dtype, workers: Workers) -> None:
    """Set on one rank alone; and a default device on all."""
    with fresh_workers(2) as own:
        judge(own.run(2, _by_default, dtype, {}), betas=(0.5, 0.5))


@pytest.mark.multiprocess
def test_defaults_do_not_reach_a_vote_between_nodes() -> None:
    with fresh_workers(4) as own:
        ends = own.run(4, _by_default, torch.float64, {"vote_between": "nodes"}, ranks_per_node=2)
    assert len({one.end[0].tobytes() for one in ends}) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(backend: str) -> None:
    ends = []
    for compiled in (False, True):
        net = net_of()
        optimizer = Signum(net.parameters(), **SIGNUM)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for t in range(3):
            backward(net, t, rank=0)
            step()
        ends.append([p.detach().clone() for p in net.parameters()])
        assert optimizer.t == 3
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def _compiled_step() -> Any:
    ddp, optimizer = voter()
    (one,) = record(optimizer)

    def take_step() -> None:
        optimizer.step()

    step = torch.compile(take_step, backend="aot_eager")
    for t in range(3):
        backward(ddp, t)
        step()
    return one


@pytest.mark.multiprocess
def test_a_compiled_step_votes() -> None:
    with fresh_workers(2) as own:
        judge(own.run(2, _compiled_step), betas=(0.5, 0.5))
