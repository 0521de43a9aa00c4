"""Sharded models that train by votes on real ranks, and the judge that replays every place's local shards."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from signsgd_lightning import Signum, enable_majority_vote

from .models import Record, _mean, judge, record

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "weight_decay": 0.5, "verdict_momentum": 0.25}


class Gain(nn.Module):
    """A parameter that nobody shards."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Any) -> Any:
        return x * self.gain


def net() -> Any:
    """Five rows and one over two ranks are cut unevenly, and one of the shards is empty."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Gain(), nn.Linear(3, 1))


def mesh_of(replicas: int) -> DeviceMesh:
    size = dist.get_world_size() // replicas
    return init_device_mesh("cpu", (replicas, size), mesh_dim_names=("replicate", "shard"))


def shard(model: Any, mesh: DeviceMesh, plain: bool = True, **options: Any) -> Any:
    """Shard all but the gain, which stays an ordinary tensor on every rank where it is to be `plain`."""
    ignored = {model[3].gain} if plain else set()
    for k in (0, 2, 4):
        fully_shard(model[k], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, ignored_params=ignored, **options)


def batch(t: int) -> Any:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))


def enabled(replicas: int, sharding: dict[str, Any], seed: int = 0, **settings: Any) -> tuple[Any, Signum]:
    torch.manual_seed(seed)
    mesh = mesh_of(replicas)
    model = shard(net(), mesh["shard"], **sharding)
    optimizer = Signum(model.parameters(), lr=0.0625, **(settings or SIGNUM))
    enable_majority_vote(model, optimizer, mesh=mesh["replicate"])
    return model, optimizer


def backward(model: Any, t: int) -> None:
    model.zero_grad()
    x = batch(t)
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()


def judge_places(ranks: Sequence[Record], replicas: int, plain: int = -1, **settings: Any) -> None:
    """Demand what `judge` does of the ranks of every place; a plain parameter has its worker's mean gradient."""
    size = len(ranks) // replicas
    for worker in () if plain < 0 else range(replicas):
        members = ranks[worker * size : (worker + 1) * size]
        for t in range(len(members[0].gradients)):
            mean = _mean([one.gradients[t][plain] for one in members])
            for one in members:
                one.gradients[t][plain] = mean
                assert one.parameters[t][plain].tobytes() == ranks[0].parameters[t][plain].tobytes()
    for place in range(size):
        judge([replace(one) for one in ranks[place::size]], **settings)


def records_of(optimizer: Signum) -> Record:
    return record(optimizer)[0]
