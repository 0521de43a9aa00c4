"""An entry that is added to the table of the state is gathered, handed out, sharded and inherited with the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import signsgd_core as core
from signsgd_lightning import Signum, enable_majority_vote, gather_state, scatter_state, state
from signsgd_lightning.checkpoint.sharded import load_shards, save_shards
from signsgd_lightning.state import Entry
from signsgd_lightning.vote.topology import Flat
from tests.workers import Workers

from .models import small_net

NAME = "residual"


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Another rule than the momentum's."""
    return rows.amax(0)


def _voter(**options: Any) -> tuple[DistributedDataParallel, Signum]:
    """Of signSGD, of which nothing else is private; the table has one entry more."""
    if not any(entry.name == NAME for entry in state.ENTRIES):
        state.ENTRIES.append(
            Entry(NAME, private=True, dtype=lambda _: torch.float64, needed=lambda _: True, inherit=_largest)
        )
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    optimizer = Signum(model.parameters(), lr=0.125, betas=(0.0, 0.0))
    enable_majority_vote(model, optimizer, **options)
    return model, optimizer


def _step(model: DistributedDataParallel, optimizer: Signum) -> None:
    """Take a step, in which every worker writes numbers of its own into the new entry."""
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    for p in model.parameters():
        entries = optimizer.state[p]
        if optimizer.vote is not None and isinstance(optimizer.vote.topology, Flat):
            entries[NAME] = torch.zeros_like(p, dtype=torch.float64)
        if NAME in entries:  # of a rank of a node its shard, where it has any of the parameter
            length = entries[NAME].numel()
            entries[NAME].view(-1).copy_(torch.arange(length) + 1000.0 * (1 + dist.get_rank()))


def _values(optimizer: Signum) -> list[Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][NAME].numpy().copy() for p in parameters if NAME in optimizer.state[p]]


def _save(folder: str, kind: str) -> list[Any]:
    """Take a step, save by all ranks, and return this rank's values."""
    try:
        model, optimizer = _voter(**({"vote_between": "nodes"} if kind == "nodes" else {}))
        _step(model, optimizer)
        if kind == "sharded":
            save_shards({"optimizer_states": [optimizer.state_dict()]}, f"{folder}/shards")
        else:
            gathered = gather_state(optimizer)
            if dist.get_rank() == 0:
                torch.save(gathered, f"{folder}/state.pt")
        return _values(optimizer)
    finally:
        state.ENTRIES[:] = [entry for entry in state.ENTRIES if entry.name != NAME]


def _load(folder: str, kind: str) -> list[Any]:
    """Load on every rank, and return this rank's values, float64."""
    try:
        model, optimizer = _voter()
        if kind == "sharded":
            rank, ranks = dist.get_rank(), dist.get_world_size()
            loaded = load_shards(f"{folder}/shards", torch.load, rank, ranks, momenta=True)
            optimizer.load_state_dict(loaded["optimizer_states"][0])
        else:
            scatter_state(optimizer, torch.load(f"{folder}/state.pt", weights_only=True))
        assert all(optimizer.state[p][NAME].dtype is torch.float64 for p in model.parameters())
        return _values(optimizer)
    finally:
        state.ENTRIES[:] = [entry for entry in state.ENTRIES if entry.name != NAME]


@pytest.mark.parametrize("kind", ["gathered", "sharded", "nodes"])
@pytest.mark.parametrize("new", [2, 3, 4])
def test_an_added_entry_is_carried(kind: str, new: int, tmp_path: Path, workers: Workers) -> None:
    """Saved by three workers, or by two nodes of two ranks, it is there for any number of workers, by its own rule."""
    ranks, local = (4, 2) if kind == "nodes" else (3, None)
    saved = workers.run(ranks, _save, str(tmp_path), kind, ranks_per_node=local)
    if kind == "nodes":  # a node's state is in shards on its ranks
        flat = [np.concatenate([v.reshape(-1) for v in values]) for values in saved]
        old = np.stack([np.concatenate(flat[:2]), np.concatenate(flat[2:])])
    else:
        old = np.stack([np.concatenate([v.reshape(-1) for v in values]) for values in saved])
    assert len(np.unique(old[:, 0])) == len(old), "workers that hold the same prove nothing"
    for worker, values in enumerate(workers.run(new, _load, str(tmp_path), kind)):
        expected = old[list(core.predecessors(worker, new, len(old)))].max(axis=0)
        np.testing.assert_array_equal(np.concatenate([v.reshape(-1) for v in values]), expected)
