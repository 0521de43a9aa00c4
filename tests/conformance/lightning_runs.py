"""A Lightning Trainer with `strategy="majority_vote"`, whose backward pass computes the gradients of the case."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.lightning.models import trainer

from .cases import STEPS, Case, Trajectory
from .torch_runs import signum


class _Given(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.given = case, case.gradients()
        self.x = nn.ParameterList([torch.from_numpy(x) for x in case.parameters()])
        self.trajectory: Trajectory = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        mine = self.given[index][dist.get_rank()]
        used = [(x * torch.from_numpy(g)).sum() for x, g in zip(self.x, mine, strict=True) if g is not None]
        return torch.stack(used).sum()  # the gradient of every x that is used is its g

    def on_train_batch_end(self, *_: Any) -> None:
        self.trajectory.append([x.detach().numpy().copy() for x in self.x])

    def configure_optimizers(self) -> Any:
        return signum(list(self.x), self.case)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(STEPS * dist.get_world_size(), 1)))


def fit(cases: Sequence[Case]) -> list[Trajectory]:
    trajectories = []
    for case in cases:
        strategy = "majority_vote_find_unused_parameters_true" if case.absent else "majority_vote"
        model = _Given(case)
        trainer(strategy=strategy).fit(model)
        trajectories.append(model.trajectory)
    return trajectories
