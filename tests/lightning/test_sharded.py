"""Votes of sharded models: each rank votes on its local shards with the ranks of the same place."""

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from signsgd_lightning.sharding import local
from tests.workers import Workers

from .models import Record
from .sharded import SIGNUM, backward, enabled, judge_places, records_of

GAIN = 4
"""The number of the parameter that is an ordinary tensor."""


def _train(replicas: int, sharding: dict[str, Any]) -> tuple[Record, list[int], int]:
    model, optimizer = enabled(replicas, sharding, seed=dist.get_rank())
    one = records_of(optimizer)
    for t in range(4):
        backward(model, t)
        optimizer.step()
    assert optimizer.vote is not None
    kept = optimizer.state[next(model.parameters())]["momentum"]
    assert isinstance(kept, DTensor)
    return one, [local(p).numel() for p in model.parameters()], optimizer.vote.topology.workers.sent_bytes


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_sharded_model(replicas: int, workers: Workers) -> None:
    runs = workers.run(2 * replicas, _train, replicas, {})
    judge_places([one for one, *_ in runs], replicas, GAIN, **SIGNUM)
    sizes = runs[1][1]
    assert 0 in sizes, "an empty shard"
    assert runs[0][1] != sizes, "uneven shards"


@pytest.mark.nightly
def test_three_shards(workers: Workers) -> None:
    runs = workers.run(6, _train, 2, {})
    judge_places([one for one, *_ in runs], 2, GAIN, **SIGNUM)
