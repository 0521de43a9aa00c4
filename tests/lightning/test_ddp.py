"""`enable_majority_vote` in plain `DistributedDataParallel` scripts: two lines, and no Lightning."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers

from .models import Record, judge, record, small_net

DYADIC: dict[str, Any] = {"betas": (0.5, 0.5), "weight_decay": 0.5}


def _build(net: Callable[[], nn.Module] = small_net, ddp: dict[str, Any] | None = None, **signum: Any) -> Any:
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(net(), **(ddp or {}))
    optimizer = Signum(model.parameters(), lr=0.0625, **signum)
    enable_majority_vote(model, optimizer)
    return model, optimizer, record(optimizer)


def _loss(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    x = torch.randn(4, 4, generator=generator)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def _train(**signum: Any) -> list[Record]:
    model, optimizer, records = _build(**signum)
    for t in range(5):
        optimizer.zero_grad()
        _loss(model, t).backward()
        optimizer.step()
    return list(records)


@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_loop(ranks: int, workers: Workers) -> None:
    judge([run[0] for run in workers.run(ranks, _train)])


def _alone() -> tuple[Any, list[Record]]:
    model, optimizer, records = _build(**DYADIC)
    _loss(model, 0).backward()
    optimizer.step()
    return optimizer.vote, records


def test_one_rank_has_nobody_to_vote_with(workers: Workers) -> None:
    exchange, records = workers.run(1, _alone)[0]
    assert exchange is None
    judge(records, **DYADIC)


def _closure() -> list[Record]:
    model, optimizer, records = _build(**DYADIC)

    def closure(t: int) -> Any:
        optimizer.zero_grad()
        loss = _loss(model, t)
        loss.backward()
        return loss

    assert all(optimizer.step(lambda t=t: closure(t)).requires_grad for t in range(3))
    return list(records)


def test_closure(workers: Workers) -> None:
    judge([run[0] for run in workers.run(2, _closure)], **DYADIC)


def _no_sync() -> tuple[list[np.ndarray], list[Record]]:
    model, optimizer, records = _build(**DYADIC)
    sums = []
    for t in range(3):
        optimizer.zero_grad()
        own = [torch.autograd.grad(_loss(model.module, k), model.module[0].bias)[0] for k in (t, t + 9)]
        sums.append((own[0] + own[1]).numpy())
        with model.no_sync():
            _loss(model, t).backward()
        _loss(model, t + 9).backward()
        optimizer.step()
    return sums, records


def test_accumulation_under_no_sync(workers: Workers) -> None:
    ranks = workers.run(2, _no_sync)
    for sums, (one,) in ranks:
        np.testing.assert_array_equal([step[1] for step in one.gradients], sums)
    judge([records[0] for _, records in ranks], **DYADIC)


def _hooked() -> list[Record]:
    model, optimizer, records = _build(**DYADIC)
    if dist.get_rank() == 1:
        model.module[2].weight.register_hook(lambda g: -g)
    for t in range(3):
        optimizer.zero_grad()
        _loss(model, 7 * t).backward()
        optimizer.step()
    return list(records)


def test_a_gradient_hook_concerns_its_own_rank(workers: Workers) -> None:
    hooked = workers.run(2, _hooked)
    judge([run[0] for run in hooked], **DYADIC)


def _by_turns() -> list[Record]:
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    layers = [model.module[0], model.module[2]]
    optimizers = [Signum(layer.parameters(), lr=0.125 / (k + 1), **DYADIC) for k, layer in enumerate(layers)]
    enable_majority_vote(model, *optimizers)
    records = [record(optimizer)[0] for optimizer in optimizers]
    for t in range(4):
        model.zero_grad()
        _loss(model, t).backward()
        optimizers[1].step()
        if t % 2:
            optimizers[0].step()
    return records


def test_two_optimizers(workers: Workers) -> None:
    ranks = workers.run(2, _by_turns)
    for k, steps in ((0, 2), (1, 4)):
        judge([records[k] for records in ranks], **DYADIC)
        assert len(ranks[0][k].parameters) == steps


def _scaled(unscale: bool) -> tuple[list[float], list[Record]]:
    """Rank 1's gradient overflows at step 1, in one layer; scales are its own."""
    model, optimizer, records = _build(**DYADIC)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale(_loss(model, t)).backward()
        if (t, dist.get_rank()) == (1, 1):
            model.module[0].weight.grad[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scales.append(1.0 if unscale else scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    for step, scale in zip(records[0].gradients, scales, strict=True):
        step[:] = [None if g is None else g / np.float32(scale) for g in step]
    return [*scales, scaler.get_scale()], records


@pytest.mark.parametrize("unscale", [False, True])
def test_a_rank_whose_gradients_overflow_goes_on_voting(unscale: bool, workers: Workers) -> None:
    ranks = workers.run(2, _scaled, unscale)
    judge([records[0] for _, records in ranks], **DYADIC)
    assert [scales[-1] for scales, _ in ranks] == [1024.0, 512.0]
    assert len(ranks[0][1][0].parameters) == 4


def _in_a_group() -> list[Record]:
    group = dist.new_group([1, 2])
    return [] if dist.get_rank() == 0 else _train(ddp={"process_group": group}, **DYADIC)


def test_the_models_process_group_votes(workers: Workers) -> None:
    nobody, *ranks = workers.run(3, _in_a_group)
    assert nobody == []
    judge([records[0] for records in ranks], **DYADIC)


class _Branches(nn.Module):
    """Uses its second layer only where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.use = nn.Linear(4, 1), nn.Linear(4, 1), True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y + self.second(x) if self.use else y


def _branches() -> list[Record]:
    """Rank 0 lacks the second layer at step 1; everyone lacks it at step 2."""
    model, optimizer, records = _build(_Branches, {"find_unused_parameters": True}, **DYADIC)
    for t in range(4):
        optimizer.zero_grad()
        model.module.use = (t, dist.get_rank()) not in ((1, 0), (2, 0), (2, 1))
        _loss(model, t).backward()
        optimizer.step()
        if not model.module.use:
            records[0].gradients[-1][2:] = [None, None]
    return list(records)


def test_layers_that_are_not_used(workers: Workers) -> None:
    ranks = workers.run(2, _branches)
    judge([records[0] for records in ranks], **DYADIC)


class _Strided(nn.Module):
    """Parameters whose memory is not in row-major order: transposed, and channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(4, 8).t())
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.linear(x, self.transposed).view(-1, 2, 2, 2)
        return self.conv(y).flatten(1).sum(1, keepdim=True)


def _strided() -> list[Record]:
    return _train(net=_Strided, **DYADIC)


def test_parameters_in_other_memory_layouts(workers: Workers) -> None:
    judge([run[0] for run in workers.run(2, _strided)], **DYADIC)


def _compiled() -> list[Record]:
    model, optimizer, records = _build(**DYADIC)
    compiled = torch.compile(model, backend="eager")
    for t in range(3):
        optimizer.zero_grad()
        _loss(compiled, t).backward()
        optimizer.step()
    torch.compiler.reset()
    return list(records)


def test_compiled_ddp(workers: Workers) -> None:
    judge([run[0] for run in workers.run(2, _compiled)], **DYADIC)
