"""A training that only a fault ends, with everything between its steps that talks: buffers, metrics, epochs' ends."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn

from signsgd_lightning import MajorityVoteStrategy
from tests.lightning.models import Net, trainer

FIRST_STEPS = 5
"""Taken before the fault, so that all connections are made."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 1))


class Talkative(Net):
    """Synchronises a metric at every step and at the end of every epoch."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


class Started(Callback):
    """Makes a file on one rank once the run is under way."""

    def __init__(self, rank: int, path: Path) -> None:
        self.rank, self.path = rank, path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if dist.get_rank() == self.rank and trainer.global_step == FIRST_STEPS:
            self.path.touch()


def train(victim: int, started: Path, ranks_per_node: int | None = None) -> tuple[str, float]:
    """Train until something fails; return its words and the time, of a clock that all processes share.

    Args:
        victim: the rank that makes the file `started`.
        started: once the run is under way.
        ranks_per_node: where nodes vote; None where ranks do.
    """
    nodes: dict[str, Any] = {}
    if ranks_per_node:
        strategy = MajorityVoteStrategy(vote_between="nodes")
        size = dist.get_world_size() // ranks_per_node
        nodes = {"devices": ranks_per_node, "num_nodes": size, "strategy": strategy}
    try:
        trainer(max_epochs=-1, callbacks=[Started(victim, started)], **nodes).fit(Talkative(net, batch_size=2))
    except RuntimeError as error:
        return str(error), time.monotonic()
    return "nothing failed", time.monotonic()
