"""Sharded models: the ranks that hold one model's shards are one worker; who they are, and how they vote."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..sharding import placement, sharded, sharded_by_name
from ..views import FlatView
from .agreement import Purpose, meet
from .topology import Note, Share, Topology, Verdict
from .transport import Message, PointToPoint


class ShardGroups(NamedTuple):
    """The process groups of a vote between sharded models, on one rank.

    Attributes:
        everyone: all ranks there are.
        counterparts: the ranks with this rank's place in every worker; a rank there is a worker's number.
        inside: the ranks of this rank's worker, a group for each dimension of its mesh.
        order: their numbers, worker by worker, place by place.
    """

    everyone: dist.ProcessGroup
    counterparts: dist.ProcessGroup
    inside: list[dist.ProcessGroup]
    order: list[int]


class Sharded(Topology):
    r"""A worker is the ranks among which one copy of the model is sharded.

    Inside a worker FSDP and tensor parallelism do as ever, in full precision. Each rank votes on its local shards with
    the ranks of the same place in the other workers, one bit a coordinate. A parameter that the worker's mesh does not
    shard, in all its dimensions or in some, has a gradient on each rank: the worker's is their float32 mean, in which a
    rank without one adds 0 and an entry that is not finite counts as 0.

    Args:
        groups: what `find_shards` returned.
    """

    def __init__(self, groups: ShardGroups) -> None:
        self.everyone = PointToPoint(groups.everyone)
        self.workers = PointToPoint(groups.counterparts, groups.everyone)
        self.inside = [PointToPoint(group, groups.everyone) for group in groups.inside]
        self.order = groups.order
        self.ranks_per_worker = len(groups.order) // self.workers.world_size
        self._alike = _ranks(groups.counterparts)  # everyone is all ranks there are, by their own numbers

    def share(self, views: Sequence[FlatView], present: Tensor, bucket_size: int, note: Note | None) -> Share:
        """Return this rank's shards; see `Topology.share`."""
        missing = [self._missing(view.model_parameter) for view in views]
        averaged = torch.tensor([bool(dims) for dims in missing], device="cpu")
        present = torch.where(averaged, self.by_worker(present).bool(), present[self._alike])
        voted = present.any(0).nonzero().flatten().tolist()
        own = {k: views[k] for k in voted}
        for dims in dict.fromkeys(missing[k] for k in voted if missing[k]):
            alike = [k for k in voted if missing[k] == dims]
            means = self._means([views[k] for k in alike], dims, note)
            here = present[self.workers.rank]
            for k, mean in zip(alike, means, strict=True):
                own[k] = replace(views[k], present=bool(here[k]), inverse_scale=None, sent=mean)
        for k in voted:
            views[k].create_state()
        chosen = [k for k in voted if views[k].parameter.numel()]

        def spread(bits: Tensor | None, planes: int) -> list[Verdict]:
            return [] if bits is None else [Verdict([own[k] for k in chosen], bits)]

        return Share([views[k] for k in voted], [own[k] for k in chosen], present[:, chosen], spread)

    def traffic(self) -> tuple[int, float]:
        """Return the bytes to other workers; the seconds are this rank's part of its worker's mean."""
        return self._between_workers(*self.inside)

    def by_worker(self, rows: Tensor) -> Tensor:
        """Return rows of ranks as rows of workers, the sum of each worker's."""
        return super().by_worker(rows[self.order])

    def side_by_side(self, rows: Tensor) -> Tensor:
        """Return a row for each worker: what its ranks have, one behind the other."""
        return rows[self.order].reshape(self.workers.world_size, -1, *rows.shape[2:])

    def rank_of(self, row: int, place: int) -> int:
        """Return the rank of a worker and a place."""
        return self.order[row * self.ranks_per_worker + place]

    def keep_share(self, views: Sequence[FlatView]) -> None:
        """Keep all: state is placed as its parameter is."""

    def _missing(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the dimensions of the worker's mesh that a parameter's has not."""
        meshes = _rank_sets(parameter) if isinstance(parameter, DTensor) else []
        return tuple(k for k, dim in enumerate(self.inside) if _ranks(dim.group) not in meshes)

    def _means(self, views: Sequence[FlatView], dims: Sequence[int], note: Note | None) -> Sequence[Tensor]:
        """Return the mean gradients of views over dimensions of the worker's mesh, flat."""
        rows = []
        for view in views:
            gradient = view.gradient(0, view.parameter.numel()) if view.present else torch.zeros_like(view.x).float()
            if note is not None:
                note(gradient)
            rows.append(torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0))
        row = torch.cat(rows)
        for dim in (self.inside[k] for k in dims):
            row = (dim.gather(row.to(dim.wire(row.device)), Message.MEAN).sum(0) / dim.world_size).to(row.device)
        return torch.split(row, [len(row) for row in rows])


def group_of(mesh: DeviceMesh | None, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the process group of a mesh of one dimension; without a mesh the one that is given.

    Raises:
        ValueError: for both, for a mesh of several dimensions, and on a rank that a mesh has not.
        TypeError: for what is no mesh.
    """
    if mesh is None:
        return process_group
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if process_group is not None:
        raise ValueError("mesh and process_group both say which ranks vote: leave out process_group")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        raise ValueError(
            f"mesh must be the one dimension along which ranks vote, got {mesh.ndim} ({names or 'without names'}): "
            f"pass mesh[{names[0] if names else 'replicate'!r}]"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is none of the mesh's {mesh.mesh.tolist()}: enable the vote on those")
    return mesh.get_group()


def check_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make sure that a model that votes along one dimension of a mesh is sharded along the others.

    Raises:
        ValueError: if it is not, so that ranks beside the mesh would vote apart and drift away.
    """
    if mesh.size() < dist.get_world_size() and not sharded(model.parameters()):
        raise ValueError(
            "mesh is a part of all ranks, and the model is not sharded among the others: call fully_shard(model, "
            "mesh=mesh['shard']) first, leave out mesh for a vote of all ranks, or pass process_group for one of some"
        )


def find_shards(model: nn.Module, group: dist.ProcessGroup) -> ShardGroups | None:
    """Return the groups of a model with DTensors, None for one without; every rank there is must call it.

    Args:
        model: whose parameters' meshes are the worker's, or dimensions of it.
        group: the ranks that hold the same shards.

    Raises:
        ValueError: on all ranks, if a parameter of one is sharded or averaged among the ranks of the group, or meshes
            do not fit each other.
        PeerLostError: if a rank does not answer.
    """
    parameters = sharded(model.parameters())
    world = dist.group.WORLD
    if not parameters or world is None:
        return None
    largest = max((p.device_mesh for p in parameters), key=DeviceMesh.size)
    everyone = PointToPoint(world)
    device = everyone.wire(parameters[0].device)
    problem = _problem(model, largest, _ranks(group))
    refused = meet(everyone, Purpose.ENABLE, device, flag=bool(problem))[:, -1].tolist()
    if any(refused):
        others = f"the mesh of rank {refused.index(1)} does not fit its model, and rank {refused.index(1)} says why"
        raise ValueError(problem or others)
    place = largest.mesh.flatten().tolist().index(everyone.rank)
    pairs = everyone.gather(torch.tensor([dist.get_rank(group), place], device=device), Message.PLACES).tolist()
    if [pairs[rank] for rank in _ranks(group)] != [[k, place] for k in range(dist.get_world_size(group))]:
        raise ValueError(
            f"the ranks {_ranks(group)} that are to vote have the workers and places {pairs}, which is no mesh: build "
            "one by init_device_mesh, and give fully_shard and the vote dimensions of it"
        )
    inside = [dim for dim in largest.get_all_groups() if dist.get_world_size(dim) > 1]
    return ShardGroups(world, group, inside, sorted(range(len(pairs)), key=lambda rank: pairs[rank]))


def _problem(model: nn.Module, largest: DeviceMesh, counterparts: list[int]) -> str:
    """Return why the ranks of a group cannot vote on this rank's shards; nothing if they can.

    Args:
        model: with DTensors.
        largest: of their meshes.
        counterparts: the ranks that are to vote.
    """
    dims = [_ranks(dim) for dim in largest.get_all_groups()]
    for name, p in sharded_by_name(model):
        both = sorted(set(p.device_mesh.mesh.flatten().tolist()) & set(counterparts))
        if both != [dist.get_rank()]:
            return (
                f"the vote is to be among the ranks {counterparts}, and {name}{placement(p)} lies on the ranks {both} "
                "of them, which FSDP shards or averages: make a mesh of two dimensions by init_device_mesh('cuda', (2, "
                "4), mesh_dim_names=('replicate', 'shard')), and take fully_shard(model, mesh=mesh['shard']) and "
                "enable_majority_vote(model, optimizer, mesh=mesh['replicate'])"
            )
        strange = [ranks for ranks in _rank_sets(p) if len(ranks) > 1 and ranks not in dims]
        if strange:
            return (
                f"{name}{placement(p)} is sharded among the ranks {strange[0]}, which are no dimension of the mesh "
                f"{largest.mesh.tolist()} that other parameters have: shard all by dimensions of one mesh"
            )
    ranks, world = len(counterparts) * largest.size(), dist.get_world_size()
    if ranks != world:
        return (
            f"{len(counterparts)} workers of {largest.size()} ranks each are {ranks} ranks, and there are {world}: let "
            "the dimensions of the vote and of the shards be the whole mesh"
        )
    return ""


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _rank_sets(parameter: DTensor) -> list[list[int]]:
    """Return this rank's companions along each dimension of a parameter's mesh."""
    return [_ranks(dim) for dim in parameter.device_mesh.get_all_groups()]
