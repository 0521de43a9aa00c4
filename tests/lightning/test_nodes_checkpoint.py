"""Checkpoints of a vote between nodes hold every node's momentum, and resume as nodes, as ranks and without a vote."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import signsgd_core as core
from signsgd_lightning import MajorityVoteStrategy, Signum, enable_majority_vote, gather_state, scatter_state
from signsgd_lightning.checkpoint.loading import OTHERS
from signsgd_lightning.vote.nodes import cut
from tests.workers import Workers

from .models import Array, Net, trainer
from .test_checkpoint import FEWER, SETTINGS, Scheduled, _momenta, _same

Layout = tuple[int, int | None]
"""Ranks, and ranks per node; None where every rank votes."""


def _train(
    folder: str, local: int | None, signum: Any, settings: Any, epochs: int, resume: str | None = None, **more: Any
) -> tuple[list[Array], list[Array | None]]:
    """Train, save at every epoch, and return this rank's parameters and momenta."""
    model = Scheduled(**signum)
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    nodes: Any = {"devices": local, "num_nodes": dist.get_world_size() // local} if local else {}
    strategy = MajorityVoteStrategy(vote_between="nodes" if local else "ranks", **more)
    run = trainer(
        max_epochs=epochs, enable_checkpointing=True, callbacks=[save], strategy=strategy, **nodes, **settings
    )
    run.fit(model, ckpt_path=resume)
    return [p.detach().float().numpy().copy() for p in model.parameters()], _momenta(run.optimizers[0])


def _run(workers: Workers, layout: Layout, folder: Path, *settings: Any, **more: Any) -> list[Any]:
    ranks, local = layout
    return workers.run(ranks, partial(_train, **more), str(folder), local, *settings, ranks_per_node=local)


def _whole(ends: list[Any], layout: Layout) -> Array:
    """Every worker's momenta as one long vector each, put together from its ranks' shards."""
    local = layout[1] or 1
    flat = [np.concatenate([m.reshape(-1) for m in momenta if m is not None]) for _, momenta in ends]
    return np.stack([np.concatenate(flat[first : first + local]) for first in range(0, len(flat), local)])


@pytest.mark.parametrize("name", FEWER)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path, workers: Workers) -> None:
    signum, settings = SETTINGS[name]
    straight = _run(workers, (4, 2), tmp_path / "a", signum, settings, 4)
    _run(workers, (4, 2), tmp_path / "b", signum, settings, 2)
    resumed = _run(workers, (4, 2), tmp_path / "c", signum, settings, 4, str(tmp_path / "b" / "epoch=1.ckpt"))
    for ours, theirs in zip(straight, resumed, strict=True):
        assert _same(ours, theirs)
    if signum.get("betas") != (0.0, 0.0):
        first, second = _whole(straight, (4, 2))
        assert not np.array_equal(first, second), "nodes that had the same data prove nothing"


def test_the_file_holds_whole_momenta_of_nodes_and_opens_without_us(tmp_path: Path, workers: Workers) -> None:
    ends = _run(workers, (6, 2), tmp_path, {}, {}, 1)
    (state,) = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]
    model = Net.load_from_checkpoint(tmp_path / "epoch=0.ckpt", map_location="cpu")
    for key, p in enumerate(model.parameters()):
        assert state["state"][key]["momentum"].shape == p.shape
        assert state[OTHERS]["momentum"][key].shape == (2, *p.shape)
    rows = [
        torch.cat([state["state"][key]["momentum"][None], others]) for key, others in state[OTHERS]["momentum"].items()
    ]
    np.testing.assert_array_equal(torch.cat([row.flatten(1) for row in rows], 1), _whole(ends, (6, 2)))
    optimizer = Signum(model.parameters())
    with pytest.warns(UserWarning, match="rank 0's was loaded"):
        optimizer.load_state_dict(state)
    optimizer.step()


LAYOUTS: list[tuple[Layout, Layout]] = [
    ((6, 2), (4, 2)), ((4, 2), (6, 2)), ((4, 2), (6, 3)), ((4, 2), (2, 2)), ((2, 2), (4, 2)),
    ((4, 2), (4, None)), ((4, 2), (3, None)), ((4, 2), (1, None)), ((3, None), (4, 2)), ((1, None), (6, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), LAYOUTS)
def test_other_nodes_and_ranks(old: Layout, new: Layout, tmp_path: Path, workers: Workers) -> None:
    before = _run(workers, old, tmp_path, {}, {}, 1)
    after = _run(workers, new, tmp_path / "unused", {}, {}, 1, str(tmp_path / "epoch=0.ckpt"))
    expected = core.redistribute(_whole(before, old), new[0] // (new[1] or 1))
    np.testing.assert_array_equal(_whole(after, new), expected)


def test_a_sharded_checkpoint_of_ranks(tmp_path: Path, workers: Workers) -> None:
    before = _run(workers, (3, None), tmp_path, {}, {}, 1, state_dict_type="sharded")
    assert (tmp_path / "epoch=0.ckpt").is_dir()
    after = _run(workers, (4, 2), tmp_path / "unused", {}, {}, 1, str(tmp_path / "epoch=0.ckpt"))
    np.testing.assert_array_equal(_whole(after, (4, 2)), core.redistribute(_whole(before, (3, None)), 2))


def _by_hand(ordinary: bool) -> tuple[Any, Any, str]:
    """One vote of nodes without Lightning; then its own state, or that of rank 0, on every rank."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 5))
    optimizer = Signum(model.parameters(), betas=(0.5, 0.5))
    enable_majority_vote(model, optimizer, vote_between="nodes")
    for p in model.parameters():
        p.grad = torch.full(p.shape, float(dist.get_rank() + 1))
    optimizer.step()
    before = _momenta(optimizer)
    states: list[Any] = [optimizer.state_dict() if ordinary else gather_state(optimizer)]
    dist.broadcast_object_list(states, 0)
    if not ordinary:
        scatter_state(optimizer, states[0])
        return before, _momenta(optimizer), ""
    optimizer.load_state_dict(states[0])
    parameters = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(p, q) for p, q in zip(parameters, model.parameters(), strict=True))
        return before, None, str(error)
    return before, None, ""


def test_gathered_and_scattered_by_hand(workers: Workers) -> None:
    for before, after, _ in workers.run(4, _by_hand, False, ranks_per_node=2):
        assert _same([[m for m in before if m is not None]], [[m for m in after if m is not None]])


def test_another_ranks_shard_is_refused(workers: Workers) -> None:
    """Rank 0 holds 10 of the 15 weights; rank 1 the others, and the biases."""
    ends = workers.run(4, _by_hand, True, ranks_per_node=2, group_timeout=5.0)
    assert [sum(m.size for m in before if m is not None) for before, _, _ in ends] == [10, 10] * 2
    for rank in (1, 3):
        assert ends[rank][2] == (
            "the momentum of a parameter of shape (5, 3) must have 5 coordinates on this rank, or all 15, got 10: load "
            "what gather_state returned, by scatter_state, rather than the state_dict() of another rank"
        )


def test_a_shard_is_refused_without_a_vote() -> None:
    p = torch.ones(5, 3, requires_grad=True)
    p.grad = torch.ones(5, 3)
    optimizer = Signum([p], betas=(0.5, 0.5))
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["momentum"] = torch.zeros(10)
    optimizer.load_state_dict(state)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"of a parameter of shape \(5, 3\) must have its shape, got \(10,\)"):
        optimizer.step()
    assert torch.equal(p, before)


def test_every_coordinate_has_one_owner() -> None:
    parameters = [torch.ones(shape, requires_grad=True) for shape in ((5, 3), (), (0, 2), (7,))]
    optimizer = Signum([{"params": parameters[:2]}, {"params": parameters[2:]}])
    for ranks in (1, 2, 3, 30):
        shards = cut(optimizer.views(), ranks)
        assert len(shards) == ranks
        owned = [(k, i) for k, p in enumerate(parameters) for i in range(p.numel())]
        assert sorted((k, i) for shard in shards for k, a, b in shard for i in range(a, b)) == owned
        for first, last in ((0, 2), (2, 4)):
            sizes = [sum(piece.size for piece in shard if first <= piece.number < last) for shard in shards]
            assert max(sizes) == -(-sum(p.numel() for p in parameters[first:last]) // ranks)
