"""A gradient scaler on every rank, in Lightning's 16-mixed and by hand: an overflow is its own rank's affair."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from signsgd_core import Reference
from signsgd_lightning import Signum, enable_majority_vote
from tests.lightning.models import Array, Given, array, trainer
from tests.workers import Workers

from .conftest import Fault

RANKS, STEPS, INTERVAL, SCALE = 3, 8, 2, 2.0**10
OVERFLOWS = {(1, 0): np.inf, (2, 1): -np.inf, (3, 1): np.nan, (3, 2): np.inf, (6, 0): np.nan}
"""(step, rank) -> what one entry of its gradient becomes."""
OVERFLOW = "a scaled gradient overflows on a rank: it costs its votes, nobody's step"

SETTINGS: dict[str, dict[str, Any]] = {
    "signum": {"betas": (0.5, 0.5)},
    "lion": {"betas": (0.5, 0.75), "weight_decay": 0.25},
    "verdict momentum, abstain": {"betas": (0.0, 0.0), "verdict_momentum": 0.5, "zeros": "abstain"},
}


def _gradients() -> list[list[list[Array]]]:
    """Eighths for two tensors, `gradients[step][rank][tensor]`, with the overflows in the first one's middle."""
    draw = np.random.default_rng(3)
    gradients = [
        [[(draw.integers(-8, 9, shape) / 8).astype(np.float32) for shape in ((5,), (3, 2))] for _ in range(RANKS)]
        for _ in range(STEPS)
    ]
    for (step, rank), value in OVERFLOWS.items():
        gradients[step][rank][0][2] = value
    return gradients


def _scales(rank: int, start: float = SCALE) -> list[float]:
    """The scale after each step: halved by an overflow, doubled after `INTERVAL` good steps."""
    scales, scale, good = [], start, 0
    for step in range(STEPS):
        good = 0 if (step, rank) in OVERFLOWS else good + 1
        scale = scale / 2 if good == 0 else scale * 2 if good == INTERVAL else scale
        good %= INTERVAL
        scales.append(scale)
    return scales


def _assert_reference(ranks: list[list[list[Array]]], gradients: Any, **settings: Any) -> None:
    """Demand `ranks[rank][step][tensor]` to be the same bits on all ranks and what the specification says."""
    reference = Reference([np.ones(g.shape, np.float32) for g in gradients[0][0]], RANKS, 0.25, **settings)
    for step, given in enumerate(gradients):
        reference.step(given)
        for parameters in ranks:
            for ours, expected in zip(parameters[step], reference.parameters, strict=True):
                np.testing.assert_array_equal(ours, expected, strict=True)
                assert ours.tobytes() == expected.tobytes()


class _Scaled(Given):
    """Keeps parameters and scale after each step."""

    def __init__(self, gradients: Any, **signum: Any) -> None:
        super().__init__(gradients, **signum)
        self.seen: list[tuple[list[Array], float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        plugin: Any = self.trainer.precision_plugin
        self.seen.append(([array(x) for x in self.x], plugin.scaler.get_scale()))


def _fit(model: type[_Scaled], gradients: Any, settings: dict[str, Any], scale: float = SCALE) -> tuple[Any, Any, int]:
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=INTERVAL)
    module = model(gradients, **settings)
    run = trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    run.fit(module)
    optimizer: Any = run.optimizers[0]
    return [x for x, _ in module.seen], [scale for _, scale in module.seen], optimizer.t


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_overflow_lowers_its_own_ranks_scale_and_nobody_skips(
    settings: dict[str, Any], workers: Workers, fault: Fault
) -> None:
    with fault(OVERFLOW, len(OVERFLOWS)):
        runs = workers.run(RANKS, _fit, _Scaled, _gradients(), settings)
        for rank, (_, scales, steps) in enumerate(runs):
            assert scales == _scales(rank)
            assert steps == STEPS
        _assert_reference([parameters for parameters, _, _ in runs], _gradients(), **settings)
    assert len({tuple(scales) for _, scales, _ in runs}) == RANKS
    assert all(scales[-1] >= min(scales) * 2 for _, scales, _ in runs), "no scale recovered"


class _Half(_Scaled):
    """Its gradients pass through float16, where what is beyond 65504 overflows."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        mine = self.given[index][dist.get_rank()]
        products = [(x.half() * torch.from_numpy(g).half()).sum() for x, g in zip(self.x, mine, strict=True)]
        assert torch.get_autocast_dtype("cpu") == torch.float16
        return torch.stack(products).sum().float()


def test_a_scale_too_large_for_float16_falls_until_the_gradient_fits(workers: Workers) -> None:
    """The gradient 8 of rank 1 overflows at 2¹⁴ and 2¹³, and fits at 2¹²; those of the others fit from the start."""
    gradients = [[[np.array([0.5, -0.25, 1.0], np.float32)] for _ in range(RANKS)] for _ in range(4)]
    for given in gradients:
        given[1][0][:] = [8.0, 0.125, -1.0]
    runs = workers.run(RANKS, _fit, _Half, gradients, SETTINGS["signum"], 2.0**14)
    others = [2.0**14, 2.0**15, 2.0**15, 2.0**16]
    assert [scales for _, scales, _ in runs] == [others, [2.0**13, 2.0**12, 2.0**12, 2.0**13], others]
    for given in gradients[:2]:
        given[1][0][0] = np.inf
    _assert_reference([parameters for parameters, _, _ in runs], gradients, **SETTINGS["signum"])


class _Net(nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.ones(shape) for shape in shapes])

    def forward(self, given: list[Array]) -> Tensor:
        return torch.stack([(x * torch.from_numpy(g)).sum() for x, g in zip(self.x, given, strict=True)]).sum()


def _by_hand(gradients: Any, settings: dict[str, Any]) -> tuple[Any, Any, int]:
    """The loop of a plain DDP script with a gradient scaler."""
    model = DistributedDataParallel(_Net([g.shape for g in gradients[0][0]]))
    optimizer = Signum(model.parameters(), lr=0.25, **settings)
    enable_majority_vote(model, optimizer)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=INTERVAL)
    seen, scales = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(model(gradients[step][dist.get_rank()])).backward()
        if step % 3 == 2:
            scaler.unscale_(optimizer)  # as before clipping
        scaler.step(optimizer)
        scaler.update()
        seen.append([array(x) for x in model.module.x])
        scales.append(scaler.get_scale())
    return seen, scales, optimizer.t


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_plain_ddp(settings: dict[str, Any], workers: Workers, fault: Fault) -> None:
    with fault(OVERFLOW, len(OVERFLOWS)):
        runs = workers.run(RANKS, _by_hand, _gradients(), settings)
        for rank, (_, scales, steps) in enumerate(runs):
            assert scales == _scales(rank)
            assert steps == STEPS
        _assert_reference([parameters for parameters, _, _ in runs], _gradients(), **settings)
