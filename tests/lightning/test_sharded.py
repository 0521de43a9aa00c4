"""Votes of sharded models: each rank votes on its local shards with the ranks of the same place."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from signsgd_lightning import RanksDifferError, Signum, enable_majority_vote
from signsgd_lightning.sharding import local
from signsgd_lightning.vote.verification import Verification
from tests.workers import Workers

from .models import Record, judge
from .sharded import SIGNUM, backward, batch, enabled, judge_places, net, records_of, shard

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


def _mixed_precision(replicas: int) -> Record:
    return _train(replicas, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)})[0]


def test_bf16_inside_the_worker(workers: Workers) -> None:
    judge_places(workers.run(4, _mixed_precision, 2), 2, GAIN, **SIGNUM)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.out = (
            nn.LayerNorm(4),
            nn.Linear(4, 6),
            nn.Linear(6, 4),
            nn.Linear(4, 1),
        )

    def forward(self, x: Any) -> Any:
        return self.out(self.down(self.up(self.norm(x)).relu()))


PLAN = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()}


def _tensor_parallel(fsdp: bool) -> Record:
    """Cut matrices by columns and rows and a norm's batch by sequence; with `fsdp` also by FSDP, in a third dimension.

    The last layer is FSDP's alone, or an ordinary one.
    """
    names = ("replicate", "shard", "tensor") if fsdp else ("replicate", "tensor")
    mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
    torch.manual_seed(0)
    model = parallelize_module(_Block(), mesh["tensor"], PLAN)
    if fsdp:
        fully_shard(model, mesh=mesh["shard"])
    optimizer = Signum(model.parameters(), lr=0.0625, **SIGNUM)
    enable_majority_vote(model, optimizer, mesh=mesh["replicate"], verify_every_n_steps=1)
    one = records_of(optimizer)
    for t in range(3):
        optimizer.zero_grad()
        data = dist.get_rank() // 2  # ranks of a tensor-parallel group have one batch
        x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(100 * t + data))
        model(x).square().sum().backward()
        optimizer.step()
    return one


def test_tensor_parallel(workers: Workers) -> None:
    judge_places(workers.run(4, _tensor_parallel, False), 2, **SIGNUM)


@pytest.mark.nightly
def test_tensor_parallel_and_fsdp(workers: Workers) -> None:
    judge_places(workers.run(8, _tensor_parallel, True), 2, **SIGNUM)


def _alone(mesh_dim: str) -> tuple[Record, int]:
    """Step without a vote on shards among all ranks, then on a replicated and a partial sum's gradient."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(mesh_dim,))
    model = shard(net(), mesh)
    optimizer = Signum(model.parameters(), lr=0.0625, **SIGNUM)
    one = records_of(optimizer)
    for t in range(3):
        backward(model, t)
        optimizer.step()
    return one, sum(len(entries) for entries in optimizer.state.values())


def test_without_a_vote_every_rank_steps_on_its_shards(workers: Workers) -> None:
    for one, entries in workers.run(3, _alone, "shard"):
        judge([one], **SIGNUM)
        assert entries == 2 * 7, "also of empty shards"


def _partial_gradient() -> tuple[list[float], list[float]]:
    """A replicated parameter whose gradient is a sum over ranks that nobody has taken yet."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    p = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Replicate()]))
    optimizer = Signum([p], lr=0.5, betas=(0.5, 0.5))
    own = torch.tensor([[1.0, -3.0, 0.0], [-2.0, 1.0, 0.0]])[dist.get_rank()]
    p.grad = DTensor.from_local(own, mesh, [Partial()])
    optimizer.step()
    return local(p.detach()).tolist(), local(optimizer.state[p]["momentum"]).tolist()


def test_a_gradient_that_is_a_partial_sum(workers: Workers) -> None:
    assert workers.run(2, _partial_gradient) == [([0.5, 0.5, 0.0], [-0.5, -1.0, 0.0])] * 2


def _scaled(replicas: int) -> Record:
    """Gradients that a scaler has multiplied; one rank's overflow costs it its own evidence."""
    model, optimizer = enabled(replicas, {"plain": False})  # torch's scaler takes DTensors or others, not both
    one = records_of(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for t in range(3):
        model.zero_grad()
        x = batch(t)
        scaler.scale((model(x) - x.sum(1, keepdim=True)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    one.gradients = [[None if g is None else g / 64 for g in step] for step in one.gradients]
    return one


def test_a_gradient_scaler(workers: Workers) -> None:
    judge_places(workers.run(4, _scaled, 2), 2, **SIGNUM)


def _unused(replicas: int) -> Record:
    """Worker 1 has no gradients for the first layer, rank 0 none for the gain."""
    model, optimizer = enabled(replicas, {})
    one = records_of(optimizer)
    for t in range(3):
        backward(model, t)
        if dist.get_rank() >= 2:
            model[0].weight.grad = model[0].bias.grad = None
        if dist.get_rank() == 0:
            model[3].gain.grad = None
        optimizer.step()
    return one


def test_a_worker_abstains(workers: Workers) -> None:
    judge_places(workers.run(4, _unused, 2), 2, GAIN, **SIGNUM)


def _drifts(replicas: int) -> tuple[list[int], str]:
    """The shards of one rank change behind the vote's back."""
    model, optimizer = enabled(replicas, {})
    assert optimizer.vote is not None
    optimizer.vote.observers.append(Verification(1))
    backward(model, 0)
    optimizer.step()
    if dist.get_rank() == 3:
        local(model[2].weight.detach()).add_(1)
    backward(model, 1)
    try:
        optimizer.step()
    except RanksDifferError as error:
        return error.ranks, str(error)
    return [], ""


def test_a_rank_that_drifts_is_named(workers: Workers) -> None:
    for ranks, message in workers.run(6, _drifts, 3):
        assert ranks == [3]
        assert message.startswith("after step 1 rank 3 differs from the other ranks in 2.weight")
