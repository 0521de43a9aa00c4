"""Mistakes with sharded models: each ends in a sentence with the thing, its value and the remedy, on every rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_local_steps, enable_majority_vote, gather_state, scatter_state
from tests.workers import Workers

from .sharded import backward, enabled, mesh_of, net, shard


def _world() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))


def _signum(model: nn.Module) -> Signum:
    return Signum(model.parameters())


def _shard_dimension() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, _signum(model), mesh=mesh["shard"])


def _no_mesh() -> None:
    model = shard(net(), mesh_of(2)["shard"])
    enable_majority_vote(model, _signum(model))


def _hybrid() -> None:
    """FSDP is shown both dimensions, so it averages over the replicas."""
    mesh = mesh_of(2)
    model = shard(net(), mesh)
    enable_majority_vote(model, _signum(model), mesh=mesh["replicate"])


def _whole_mesh() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, _signum(model), mesh=mesh)


def _no_device_mesh() -> None:
    model = shard(net(), mesh_of(2)["shard"])
    enable_majority_vote(model, _signum(model), mesh="replicate")  # type: ignore[arg-type]


def _mesh_and_group() -> None:
    mesh = mesh_of(2)
    enable_majority_vote(net(), _signum(net()), mesh=mesh["replicate"], process_group=mesh.get_group("replicate"))


def _another_optimizer() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, torch.optim.AdamW(model.parameters()), mesh=mesh["replicate"])  # type: ignore[arg-type]


def _optimizer_before_sharding() -> None:
    mesh, model = mesh_of(2), net()
    optimizer = _signum(model)
    shard(model, mesh["shard"])
    enable_majority_vote(model, optimizer, mesh=mesh["replicate"])


def _signmuon() -> None:
    model = shard(net(), mesh_of(2)["shard"])
    Signum([model[0].weight], orthogonalize=True)


def _overlap() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, _signum(model), mesh=mesh["replicate"], overlap=True)


def _nodes() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, _signum(model), mesh=mesh["replicate"], vote_between="nodes")


def _partial() -> None:
    Signum([nn.Parameter(DTensor.from_local(torch.ones(4), _world(), [Partial()]))])


def _gather() -> None:
    gather_state(enabled(2, {})[1])


def _scatter() -> None:
    optimizer = enabled(2, {})[1]
    scatter_state(optimizer, optimizer.state_dict())


def _local_steps() -> None:
    model = shard(net(), mesh_of(2)["shard"])
    enable_local_steps(model, torch.optim.AdamW(model.parameters()))


def _fsdp1() -> None:
    model = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    enable_majority_vote(model, _signum(model))


def _ddp_and_mesh() -> None:
    mesh = mesh_of(2)
    model = DistributedDataParallel(net())
    enable_majority_vote(model, _signum(model), mesh=mesh["replicate"])


def _settings_differ() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, Signum(model.parameters(), lr=0.1 + (dist.get_rank() == 3)), mesh=mesh["replicate"])


def _unsharded() -> None:
    """Ranks beside the mesh would vote apart."""
    model = net()
    enable_majority_vote(model, _signum(model), mesh=mesh_of(2)["replicate"])


def _sharded_later() -> None:
    """The optimizer steps on parameters that no longer are the model's."""
    model = net()
    optimizer = _signum(model)
    enable_majority_vote(model, optimizer)
    backward(shard(model, mesh_of(2)["shard"]), 0)
    optimizer.step()


def _two_meshes() -> None:
    """One layer lies along the ranks of a worker, another across them."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "other"))
    model = net()
    fully_shard(model[0], mesh=mesh["shard"])
    fully_shard(model[2], mesh=mesh["other"])
    enable_majority_vote(model, _signum(model), mesh=mesh["replicate"])


MISTAKES: dict[Callable[[], None], list[str]] = {
    _shard_dimension: ["0.weight, S(0) over 'shard' lies on the ranks [0, 1] of them", "mesh=mesh['replicate']"],
    _no_mesh: ["among the ranks [0, 1, 2, 3], and 0.weight", "mesh=mesh['replicate']"],
    _hybrid: ["R over 'replicate', S(0) over 'shard' lies on the ranks [0, 2]", "fully_shard(model, mesh=mesh['shard'"],
    _whole_mesh: ["got 2 (('replicate', 'shard')): pass mesh['replicate']"],
    _no_device_mesh: ["mesh must be a torch.distributed.device_mesh.DeviceMesh, got str"],
    _mesh_and_group: ["leave out process_group"],
    _another_optimizer: ["needs signsgd_lightning.Signum, optimizer 0 is AdamW: replace it"],
    _optimizer_before_sharding: ["optimizer 0 holds parameters that are not the model's: 6, the first of shape (5, 4)"],
    _signmuon: ["orthogonalize=True (SignMuon) needs whole tensors, and parameter 0 of group 0 is cut", "S(0) over"],
    _overlap: ["overlap=True excludes sharded parameters: leave out either"],
    _nodes: ["vote_between='nodes' excludes sharded parameters"],
    _partial: ["parameter 0 of group 0 is a DTensor placed as P(sum) over 'shard'", "redistribute it as Shard or Repl"],
    _gather: ["gather_state takes ordinary tensors, and parameter 0 is a DTensor", "torch.distributed.checkpoint"],
    _scatter: ["scatter_state takes ordinary tensors, and parameter 0 is a DTensor", "torch.distributed.checkpoint"],
    _local_steps: ["the vote on local steps of optimizer 0 takes ordinary tensors", "leave the model unsharded"],
    _fsdp1: ["is wrapped in FullyShardedDataParallel", "take fully_shard(model, mesh=mesh['shard'])"],
    _ddp_and_mesh: ["process_group, or mesh, must be that of the DDP model: leave it out"],
    _unsharded: ["mesh is a part of all ranks, and the model is not sharded among the others: call fully_shard("],
    _sharded_later: ["no rank has a gradient for 0.weight", "shard the model first, then make the optimizer"],
    _settings_differ: ["rank 0 has «group 0: lr=0.1» where rank 3 has «group 0: lr=1.1»"],
}


def _said(name: str) -> str:
    try:
        globals()[name]()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__[1:])
def test_mistakes(mistake: Callable[[], None], workers: Workers) -> None:
    said = workers.run(4, _said, mistake.__name__)
    for part in MISTAKES[mistake]:
        assert part in said[0], said[0]
    assert "nothing" not in said


def _replicated() -> list[list[float]]:
    """Replicated tensors are whole on every rank, so SignMuon takes them."""
    values = []
    for p in (torch.eye(3), DTensor.from_local(torch.eye(3), _world(), [Replicate()])):
        parameter = nn.Parameter(p)
        optimizer = Signum([parameter], lr=0.5, orthogonalize=True, betas=(0.5, 0.5))
        parameter.grad = parameter.detach() * 2
        optimizer.step()
        whole: Any = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        values.append(whole.detach().flatten().tolist())
    return values


def test_signmuon_of_replicated_tensors(workers: Workers) -> None:
    for plain, replicated in workers.run(2, _replicated):
        assert plain == replicated
        assert plain != torch.eye(3).flatten().tolist()


def test_meshes_that_do_not_fit_each_other(workers: Workers) -> None:
    said = workers.run(8, _said, "_two_meshes")
    assert "2.weight, S(0) over 'other' is sharded among the ranks [0, 1], which are no dimension" in said[0]
    assert all("shard all by dimensions of one mesh" in one for one in said)


def _meshes_differ() -> None:
    mesh = mesh_of(2)
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, _signum(model), mesh=mesh["shard" if dist.get_rank() == 1 else "replicate"])


def test_one_rank_with_another_mesh(workers: Workers) -> None:
    said = workers.run(4, _said, "_meshes_differ")
    assert "0.weight, S(0) over 'shard' lies on the ranks [0, 1]" in said.pop(1)
    assert said == ["the mesh of rank 1 does not fit its model, and rank 1 says why"] * 3


def _part_of_the_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("stage", "replicate", "shard"))
    model = shard(net(), mesh["shard"])
    enable_majority_vote(model, _signum(model), mesh=mesh["replicate"])


def test_other_ranks_beside_the_mesh(workers: Workers) -> None:
    for said in workers.run(8, _said, "_part_of_the_ranks"):
        assert "2 workers of 2 ranks each are 4 ranks, and there are 8" in said
