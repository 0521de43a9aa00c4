"""Use is noted where DDP hides it: parameters frozen at first, added midway, gradients thrown away."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers

from .models import Net, Record, fit, judge, record

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "weight_decay": 0.5}
UNUSED = "majority_vote_find_unused_parameters_true"


def _half_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    net[0].requires_grad_(False)
    return net


class _Thawing(Net):
    """The first layer, frozen from the start, is freed at step 2; the optimizer has it all along."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.net[0].requires_grad_(index >= 2)


def test_unfreezing_midway_with_find_unused_parameters(workers: Workers) -> None:
    runs = workers.run(2, fit, partial(_Thawing, _half_frozen, **SIGNUM), {"strategy": UNUSED})
    judge([run[0] for run in runs], **SIGNUM)
    one = runs[0][0]
    assert [x.tobytes() for x in one.start[:2]] == [x.tobytes() for x in one.parameters[1][:2]]
    assert one.parameters[1][0].tobytes() != one.parameters[2][0].tobytes()


class _Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.125)


class _Head(Net):
    def configure_optimizers(self) -> Any:
        optimizer = Signum([p for p in self.parameters() if p.requires_grad], **self.signum)
        self.records = record(optimizer)
        return optimizer


def test_a_group_added_midway_with_find_unused_parameters(workers: Workers) -> None:
    settings: dict[str, Any] = {"strategy": UNUSED, "callbacks": [_Finetuning()], "max_epochs": 2}
    runs = workers.run(2, fit, partial(_Head, samples=16, **SIGNUM), settings)
    for k in range(2):
        judge([run[k] for run in runs], **SIGNUM)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.use = nn.Linear(4, 32), nn.Linear(4, 32), True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        return y + self.second(x) if self.use else y


def _discarded() -> list[Record]:
    """Step 1 is discarded (a loss spike, say) by zero_grad; at the next, rank 0 does not use the second layer."""
    torch.manual_seed(0)
    model = DistributedDataParallel(_Branches(), find_unused_parameters=True)
    optimizer = Signum(model.parameters(), lr=0.25, **SIGNUM)
    enable_majority_vote(model, optimizer)
    records = record(optimizer)
    for t in range(3):
        model.module.use = (t, dist.get_rank()) != (2, 0)
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))
        model(x).square().sum().backward()
        if t != 1:
            optimizer.step()
        optimizer.zero_grad()
    return records


def test_a_discarded_step_is_not_remembered_as_use(workers: Workers) -> None:
    ranks = workers.run(2, _discarded)
    ranks[0][0].gradients[1][2:] = [None, None]
    judge([records[0] for records in ranks], **SIGNUM)


def _compiled_first() -> str:
    model: Any = torch.compile(DistributedDataParallel(nn.Linear(4, 1)), backend="eager")
    try:
        enable_majority_vote(model, Signum(model.parameters()))
    except TypeError as error:
        return str(error)
    return "no error"


def test_compiled_before_the_vote_is_enabled(workers: Workers) -> None:
    for message in workers.run(2, _compiled_first):
        assert message == "no error" or "torch.compile" in message
