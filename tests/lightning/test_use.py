"""Use is noted where DDP hides it: gradients thrown away, models compiled first."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers

from .models import Record, judge, record

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "weight_decay": 0.5}


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
