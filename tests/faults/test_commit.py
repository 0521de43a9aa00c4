"""Prepare, then commit: a rank lost at any point of a step leaves what is the same on all as it was, bit for bit."""

import os
import signal
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import PeerLostError, Signum, enable_local_steps, enable_majority_vote
from signsgd_lightning.local_steps.rounds import find_local_steps
from signsgd_lightning.vote import failures
from signsgd_lightning.vote.transport import PointToPoint
from tests.tiers import nightly_where
from tests.votes import set_bucket_size
from tests.workers import fresh_workers

from .conftest import Fault

pytestmark = pytest.mark.multiprocess

GOOD_STEPS = 2
KINDS: dict[str, tuple[int, dict[str, Any], int]] = {
    "flat": (3, {}, 1 + 2 * 2),  # the header; ballots and verdicts of two buckets
    "nodes": (4, {"vote_between": "nodes"}, 1 + 3 + 2 * 2 + 1),  # three of the node's mean, one of its verdicts
    "overlap": (3, {"overlap": True}, 1 + 2 * 2),
    "local steps": (3, {}, 1 + 2 * 2 + 2),  # magnitudes and buffers
}
"""Ranks, options, and how often a rank swaps bytes with others in a step."""

Snapshot = list[bytes]


def _net(second: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), second, nn.Linear(20, 20), nn.Linear(20, 1))


def _build(kind: str) -> tuple[nn.Module, Any, Signum]:
    """Return a model, what steps on it, and what has the vote."""
    if kind == "local steps":
        model = _net(nn.BatchNorm1d(20))
        inner = torch.optim.AdamW(model.parameters(), lr=0.125)
        outer = enable_local_steps(model, inner, sync_every=2, outer_momentum=0.5).outer.optimizer
        set_bucket_size(outer, 256)
        return model, inner, outer
    ddp = DistributedDataParallel(_net(nn.Tanh()))
    optimizer = Signum(ddp.parameters(), lr=0.125, betas=(0.5, 0.5), verdict_momentum=0.5, weight_decay=0.5)
    enable_majority_vote(ddp, optimizer, **KINDS[kind][1])
    set_bucket_size(optimizer, 256)
    return ddp, optimizer, optimizer


def _replicated(model: nn.Module, voter: Signum) -> Snapshot:
    """What is the same on all ranks: parameters and buffers, verdict or outer momenta, the step counter."""
    names = ("verdict_momentum", "outer_momentum")
    momenta = [entries[name] for entries in voter.state.values() for name in names if name in entries]
    tensors: list[Tensor] = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point()), *momenta]
    return [str(voter.t).encode(), *(t.detach().numpy().tobytes() for t in tensors)]


def _step(model: nn.Module, optimizer: Any, t: int) -> None:
    """Take a step, or those of a round."""
    for k in range(2 if find_local_steps(optimizer) else 1):
        optimizer.zero_grad()
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(100 * t + 10 * k + dist.get_rank()))
        model(x).square().mean().backward()
        optimizer.step()


def _lose(kind: str, victim: int, swap: int, after: bool, number: int) -> tuple[list[Snapshot], bool, int]:
    """Lose the victim at its `swap`-th swap of the third step; return snapshots, whether it erred, and how many swaps.

    Of the snapshots the last is after the error; a rank that had all verdicts by then errs one step later.
    """
    failures._GRACE = timedelta(seconds=0.1)  # who is named does not matter here
    model, optimizer, voter = _build(kind)
    for t in range(GOOD_STEPS):
        _step(model, optimizer, t)
    usual, count = PointToPoint.swap, 0

    def swap_or_die(self: PointToPoint, *args: Any) -> Any:
        nonlocal count
        count += 1
        if dist.get_rank() == victim and count == swap + 1 and not after:
            os.kill(os.getpid(), number)
        wait = usual(self, *args)
        if dist.get_rank() == victim and count == swap + 1:
            os.kill(os.getpid(), number)
        return wait

    PointToPoint.swap = swap_or_die  # type: ignore[assignment,method-assign]
    snapshots = [_replicated(model, voter)]
    try:
        for t in range(GOOD_STEPS, GOOD_STEPS + 3):
            _step(model, optimizer, t)
            snapshots.append(_replicated(model, voter))
    except PeerLostError:
        snapshots.append(_replicated(model, voter))
        return snapshots, True, count
    finally:
        PointToPoint.swap = usual  # type: ignore[method-assign]
    return snapshots, False, count // 3


def _undisturbed(kind: str) -> list[Snapshot]:
    ranks, _, swaps = KINDS[kind]
    with fresh_workers(ranks) as workers:
        ends = workers.run(ranks, _lose, kind, -1, 0, False, 0, ranks_per_node=2 if kind == "nodes" else None)
    for snapshots, erred, count in ends:
        assert (erred, count) == (False, swaps), "another number of swaps: adapt KINDS"
        assert snapshots == ends[0][0]
    return ends[0][0]  # type: ignore[no-any-return]


def _judge(kind: str, right: list[Snapshot], victim: int, swap: int, after: bool, number: int) -> None:
    ranks = KINDS[kind][0]
    with fresh_workers(ranks) as workers:
        arguments = (kind, victim, swap, after, number)
        node = 2 if kind == "nodes" else None
        ends = workers.run(ranks, _lose, *arguments, lost=(victim,), group_timeout=4.0, timeout=40, ranks_per_node=node)
    for rank, end in enumerate(ends):
        if rank != victim:
            snapshots, erred, _ = end
            # Whom it names is tested in tests/lightning/test_peers.py, with all of the grace.
            assert erred, f"rank {rank} trained on"
            assert snapshots[-1] == snapshots[-2], f"rank {rank} was left between two steps"
            assert snapshots[:-1] == right[: len(snapshots) - 1]
            assert len(snapshots) <= 3  # it errs in this step, or in the next


@pytest.mark.parametrize("kind", nightly_where(lambda kind: kind == "overlap", KINDS))
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["before", "after"])
def test_killed_at_every_point(after: bool, kind: str, fault: Fault) -> None:
    """Before the victim sends, or as soon as it has sent."""
    ranks, _, swaps = KINDS[kind]
    right = _undisturbed(kind)
    with fault(f"a rank is killed at a point of a step, {kind}: the others are as before it", swaps):
        for swap in range(swaps):
            _judge(kind, right, (swap + after) % ranks, swap, after, signal.SIGKILL)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_in_the_midst(kind: str, fault: Fault) -> None:
    _, _, swaps = KINDS[kind]
    with fault(f"a rank hangs within a step, {kind}: the others are as before it"):
        _judge(kind, _undisturbed(kind), 1, swaps // 2, False, signal.SIGSTOP)
