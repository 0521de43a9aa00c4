"""Process groups of other kinds, one that is gone, and errors that travel between processes."""

import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import PeerLostError, RanksDifferError, Signum, enable_majority_vote
from signsgd_lightning.checkpoint.sharded import load_shards, save_shards
from tests.workers import Workers, free_port, fresh_workers

from .uses import SIGNUM, backward, error_of, net_of, voter


def _of_kind(backend: str | None, options: dict[str, Any], folder: str, port: int) -> list[bytes]:
    """Train in a process group made in another way, and save shards in it."""
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)  # at the old one a rank may still meet the store that is being closed
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    ddp, optimizer = voter(**options)
    for t in range(2):
        backward(ddp, t)
        optimizer.step()
    if not options:
        save_shards({"optimizer_states": [optimizer.state_dict()]}, f"{folder}/shards")
        load_shards(f"{folder}/shards", torch.load, dist.get_rank(), dist.get_world_size(), momenta=True)
    return [p.detach().numpy().tobytes() for p in ddp.parameters()]


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
@pytest.mark.parametrize("options", [{}, {"vote_between": "nodes"}], ids=["ranks", "nodes"])
def test_backends_of_other_names(backend: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    with fresh_workers(4) as own:
        ends = own.run(4, _of_kind, backend, options, str(tmp_path), free_port(), ranks_per_node=2)
    assert len({tuple(end) for end in ends}) == 1


def _by_file(path: str) -> tuple[int | None, str]:
    """Meet over a file; lose rank 2."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    limit = timedelta(seconds=4)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3, timeout=limit)
    ddp, optimizer = voter()
    for t in range(3):
        backward(ddp, t)
        if (t, rank) == (2, 2):
            os._exit(7)
        try:
            optimizer.step()
        except PeerLostError as error:
            return error.rank, str(error)
    return None, ""


@pytest.mark.multiprocess
def test_a_lost_rank_is_named_over_a_file(tmp_path: Path) -> None:
    with fresh_workers(3) as own:
        ends = own.run(3, _by_file, str(tmp_path / "store"), lost=(2,), group_timeout=4, timeout=60)
    for lost, told in ends[:2]:
        assert lost == 2, told


def _in_a_subgroup() -> tuple[int | None, str]:
    """Ranks 1 and 2 vote; 2 is lost, which is rank 1 of the group."""
    group = dist.new_group([1, 2], timeout=timedelta(seconds=4))
    rank = dist.get_rank()
    if rank == 0:
        return None, ""
    ddp = DistributedDataParallel(net_of(), process_group=group)
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer)
    backward(ddp, 0)
    if rank == 2:
        os._exit(7)
    try:
        optimizer.step()
    except PeerLostError as error:
        return error.rank, str(error)
    return None, "no error"


@pytest.mark.multiprocess
def test_a_lost_rank_of_a_subgroup_has_its_global_number() -> None:
    with fresh_workers(3) as own:
        ends = own.run(3, _in_a_subgroup, lost=(2,), timeout=60)
    lost, told = ends[1]
    assert lost == 2
    assert told.startswith("rank 2 stopped answering")


@pytest.mark.parametrize("error", [PeerLostError("gone", 3), RanksDifferError("differ", [1], 5, "net.weight")])
def test_errors_travel_between_processes(error: RuntimeError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.__dict__ == error.__dict__


def _group_gone() -> str:
    group = dist.new_group([0, 1])
    ddp = DistributedDataParallel(net_of(), process_group=group)
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer)
    backward(ddp, 0)
    dist.destroy_process_group(group)
    return error_of(optimizer.step)


def test_a_group_that_was_destroyed(workers: Workers) -> None:
    for told in workers.run(2, _group_gone):
        assert "process group" in told
        assert "destroyed" in told
