"""NaN, ±Inf and huge values at random places: parameters and momenta stay finite, ranks alike, every one is counted."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from signsgd_lightning import Signum, VoteMonitor
from tests.lightning.models import trainer
from tests.workers import Workers

from .conftest import Fault

RANKS = 3
SIZES = {torch.float32: 67, torch.bfloat16: 33, torch.float16: 21, torch.float64: 9}
HUGE = {torch.float32: 3.4e38, torch.bfloat16: 3.3e38, torch.float16: 6.5e4, torch.float64: 1e308}
"""Finite in their own dtype; the last one is beyond float32's range and counts as infinite."""


def gradient(step: int, rank: int, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """Normal numbers, with strange ones at random places; now and then nothing but these."""
    draw = np.random.default_rng([step, rank, SIZES[dtype]])
    values = draw.standard_normal(SIZES[dtype])
    strange = np.array([np.nan, np.inf, -np.inf, HUGE[dtype], -HUGE[dtype]])
    where = draw.random(SIZES[dtype]) < draw.choice([0.0, 0.02, 0.2, 1.0], p=[0.4, 0.4, 0.15, 0.05])
    values[where] = draw.choice(strange, where.sum())
    return values


class Fuzzed(LightningModule):
    """A parameter of each dtype, whose gradients are those of `gradient`."""

    def __init__(self, steps: int, **signum: Any) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.zeros(size, dtype=dtype) for dtype, size in SIZES.items()])
        self.steps, self.signum = steps, signum
        self.injected = 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        """A loss whose gradient with respect to each parameter is the given one."""
        terms = []
        for x in self.x:
            g = torch.from_numpy(gradient(index, dist.get_rank(), x.dtype)).to(x.dtype)
            self.injected += int((~g.float().isfinite()).sum())
            terms.append((x * g).sum().float())
        return torch.stack(terms).sum()

    def configure_optimizers(self) -> Any:
        return Signum(self.parameters(), lr=1e-3, **self.signum)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(self.steps * RANKS, 1)))


def _fuzz(steps: int, settings: dict[str, Any]) -> tuple[int, float, list[bytes], bool]:
    model, monitor = Fuzzed(steps, **settings), VoteMonitor()
    run = trainer(callbacks=[monitor], log_every_n_steps=steps // 10)
    run.fit(model)
    assert run.global_step == steps
    optimizer: Any = run.optimizers[0]
    state = [value for x in model.x for value in optimizer.state[x].values()]
    finite = all(bool(value.isfinite().all()) for value in [*model.x, *state])
    parameters = [x.detach().view(torch.uint8).numpy().tobytes() for x in model.x]
    return model.injected, float(run.callback_metrics["vote/nonfinite"]), parameters, finite


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="Signum"),
        pytest.param({"betas": (0.9, 0.99), "weight_decay": 0.1}, id="Lion", marks=pytest.mark.nightly),
        pytest.param({"betas": (0.0, 0.0), "verdict_momentum": 0.8}, id="verdict momentum", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_nonfinite_gradients(steps: int, settings: dict[str, Any], workers: Workers, fault: Fault) -> None:
    with fault(f"gradients with NaN, ±Inf and huge entries, {RANKS} ranks, steps", steps):
        ranks = workers.run(RANKS, _fuzz, steps, settings, timeout=1500)
        assert sum(injected for injected, *_ in ranks) > steps
        for _, counted, parameters, finite in ranks:
            assert counted == sum(injected for injected, *_ in ranks)
            assert parameters == ranks[0][2]
            assert finite
