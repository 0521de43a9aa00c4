"""Values that ranks do not have in common, from the start or loaded later: named before they vote."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers

from .uses import SIGNUM, backward, error_of, net_of


def _different_values(kind: str) -> tuple[str, int]:
    rank = dist.get_rank()
    net = net_of(rank)
    if kind == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["0.weight"])  # type: ignore[no-untyped-call]
    ddp = DistributedDataParallel(net, init_sync=kind != "init_sync=False")
    settings = {**SIGNUM, "verdict_momentum": 0.5} if kind == "lost" else SIGNUM
    optimizer = Signum(ddp.parameters(), **settings)
    enable_majority_vote(ddp, optimizer)
    if kind == "loaded" and rank == 0:
        net.load_state_dict(net_of(7).state_dict())
    net[0].head = head = nn.Linear(4, 1)  # that the model does not call
    with torch.no_grad():
        head.weight.fill_(float(rank))
    for t in range(2):
        backward(ddp, t)
        if kind == "head" and t == 1:
            optimizer.add_param_group({"params": head.parameters()})
        if kind == "lost" and t == 1 and rank == 0:
            optimizer.state.clear()
        told = error_of(optimizer.step)
        if told != "no error":
            return told, optimizer.t
    return "no error", optimizer.t


@pytest.mark.parametrize("kind", ["init_sync=False", "ignored", "loaded", "head", "lost"])
def test_ranks_that_start_from_other_values_are_told_before_they_vote(kind: str, workers: Workers) -> None:
    name = "0.head.weight" if kind == "head" else "0.weight"
    for told, steps in workers.run(3, _different_values, kind, group_timeout=10):
        if kind == "lost":
            assert "torch.float32» where rank 1 has «0.weight: shape (6, 4), torch.float32, verdict_momentum»" in told
        else:
            who = "rank 0 differs from the other ranks" if kind == "loaded" else "ranks 0, 1, 2 differ from one another"
            when = "before step 1" if kind == "head" else "before the first vote"
            assert told.startswith(f"RanksDifferError: {when} {who} in {name}"), told
        assert steps == (kind in ("head", "lost"))


def _loaded_apart() -> tuple[str, int]:
    """Load a state whose verdict momentum is another on rank 1, where the parameters are the same."""
    ddp = DistributedDataParallel(net_of())
    optimizer = Signum(ddp.parameters(), lr=0.125, betas=(0.0, 0.0), verdict_momentum=0.5)
    enable_majority_vote(ddp, optimizer)
    backward(ddp, 0)
    optimizer.step()
    state = optimizer.state_dict()
    if dist.get_rank() == 1:
        state["state"][0]["verdict_momentum"] = state["state"][0]["verdict_momentum"] + 0.25
    optimizer.load_state_dict(state)
    return error_of(optimizer.step), optimizer.t


def test_values_that_were_loaded_are_compared_verdict_momenta_too(workers: Workers) -> None:
    for told, steps in workers.run(3, _loaded_apart):
        assert told.startswith("RanksDifferError: before step 1 rank 1 differs from the other ranks in 0.weight")
        assert steps == 1


def _loaded_alone() -> str:
    ddp = DistributedDataParallel(net_of())
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer)
    backward(ddp, 0)
    optimizer.step()
    if dist.get_rank() == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    return error_of(optimizer.step)


def test_a_state_that_one_rank_alone_loads_is_named(workers: Workers) -> None:
    first, second = (f"{what} loaded or added since the last vote" for what in ("a state or parameter", "nothing"))
    for told in workers.run(2, _loaded_alone):
        assert f"rank 0 has «{first}» where rank 1 has «{second}»" in told
