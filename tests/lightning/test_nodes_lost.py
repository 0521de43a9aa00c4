"""A rank that is lost in a vote between nodes is named by its global rank, also by those that never talk to it."""

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import PeerLostError, Signum, enable_majority_vote
from tests.workers import fresh_workers

pytestmark = pytest.mark.multiprocess


def _fail(group: str, victim: int, number: signal.Signals) -> tuple[int | None, str]:
    """Lose the victim as it is about to swap, in its node or with its counterparts; return what the others saw."""
    model = DistributedDataParallel(nn.Linear(3000, 1, bias=False))
    optimizer = Signum(model.parameters(), lr=0.1)
    enable_majority_vote(model, optimizer, vote_between="nodes")
    peers = getattr(optimizer.vote.topology, group)  # type: ignore[union-attr]
    swap = peers.swap

    def swap_or_die(*args: Any) -> Any:
        if optimizer.t == 2 and dist.get_rank() == victim:
            os.kill(os.getpid(), number)
        return swap(*args)

    peers.swap = swap_or_die
    try:
        for _ in range(3):
            model(torch.ones(1, 3000)).sum().backward()
            optimizer.step()
    except PeerLostError as error:
        return error.rank, str(error)
    return None, "the steps went through"


@pytest.mark.parametrize(("group", "victim", "number"), [("inside", 3, signal.SIGKILL), ("workers", 2, signal.SIGSTOP)])
def test_lost_rank_is_named(group: str, victim: int, number: signal.Signals) -> None:
    with fresh_workers(4) as workers:
        ends = workers.run(
            4, _fail, group, victim, number, lost=(victim,), group_timeout=4.0, timeout=40, ranks_per_node=2
        )
    for rank, end in enumerate(ends):
        if rank != victim:
            assert end[0] == victim, f"rank {rank}: {end[1]}"
