"""Sharded models: the ranks that hold one model's shards are one worker; who they are, and how they vote."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import _compat
from ..sharding import placement, sharded
from ..views import FlatView
from .topology import Note, Share, Topology, Verdict
from .transport import Message, PointToPoint


class ShardGroups(NamedTuple):
    """The process groups of a vote between sharded models, on one rank.

    Attributes:
        everyone: all ranks of all workers.
        counterparts: the ranks with this rank's place in every worker; a rank there is a worker's number.
        inside: the ranks of this rank's worker, a group for each dimension of its mesh.
        order: the ranks of `everyone`, worker by worker.
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
        self._own = [groups.order.index(rank) for rank in _ranks_in(groups.counterparts, groups.everyone)]

    def share(self, views: Sequence[FlatView], present: Tensor, bucket_size: int, note: Note | None) -> Share:
        """Return this rank's shards; see `Topology.share`."""
        missing = [self._missing(view.model_parameter) for view in views]
        averaged = torch.tensor([bool(dims) for dims in missing], device="cpu")
        present = torch.where(averaged, self.by_worker(present).bool(), present[self.order][self._own])
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
        return row.split([len(row) for row in rows])


def find_shards(model: nn.Module, group: dist.ProcessGroup) -> ShardGroups | None:
    """Return the groups of a model with DTensors, None for one without; every rank of all workers must call it.

    Args:
        model: whose parameters' meshes are the worker's, or dimensions of it.
        group: the ranks that hold the same shards.

    Raises:
        ValueError: if a parameter is sharded or averaged among the ranks of the group; if meshes do not fit.
        PeerLostError: if a rank does not answer.
    """
    parameters = sharded(model.parameters())
    if not parameters:
        return None
    counterparts = _ranks(group)
    for name, p in model.named_parameters():
        _check_mesh(name, p, counterparts)
    largest = max(parameters, key=lambda p: p.device_mesh.size()).device_mesh
    inside = [dim for dim in largest.get_all_groups() if dist.get_world_size(dim) > 1]
    for name, p in model.named_parameters():
        for ranks in _rank_sets(p) if isinstance(p, DTensor) else ():
            if len(ranks) > 1 and ranks not in map(_ranks, inside):
                raise ValueError(
                    f"{name}{placement(p)} is sharded among the ranks {ranks}, which are no dimension of the mesh of "
                    f"{largest.size()} ranks that other parameters have: shard all by dimensions of one mesh"
                )
    table = torch.tensor([counterparts])
    for dim in inside:  # in the end a row for each place of the worker: who has it in every worker
        everyone = PointToPoint(dim)
        wire = everyone.wire(torch.device(largest.device_type))
        table = everyone.gather(table.to(wire), Message.PLACES).cpu().flatten(0, 1)
    order = _order(table, group)
    return ShardGroups(_everyone(table, group), group, inside, order)


def _everyone(table: Tensor, group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the group of all ranks."""
    world = dist.group.WORLD
    if world is not None and table.numel() == dist.get_world_size():
        return world
    ranks = table.flatten().sort().values.tolist()
    made: dist.ProcessGroup = dist.new_group(ranks, timeout=_compat.timeout(group), use_local_synchronization=True)
    return made


def _order(table: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Return the ranks worker by worker, as numbers among all of them.

    Raises:
        ValueError: if the workers' ranks do not fit each other.
    """
    flat = table.T.flatten().tolist()
    here = table[:, dist.get_rank(group)].tolist()
    if len(set(flat)) != len(flat) or dist.get_rank() not in here:
        raise ValueError(
            f"the replicas' ranks by place are {table.tolist()}, which is no mesh: build one with init_device_mesh on "
            "all ranks, give fully_shard and parallelize_module some of its dimensions and the vote another one"
        )
    return [sorted(flat).index(rank) for rank in flat]


def _check_mesh(name: str, parameter: Tensor, counterparts: list[int]) -> None:
    """Make sure that a parameter is neither sharded nor averaged among the ranks that vote."""
    own = [dist.get_rank()]
    ranks = parameter.device_mesh.mesh.flatten().tolist() if isinstance(parameter, DTensor) else own
    both = sorted(set(ranks) & set(counterparts))
    if both != own:
        raise ValueError(
            f"the vote is to be among the ranks {counterparts}, and {name}{placement(parameter)} lies on the ranks "
            f"{both} of them, which FSDP shards or averages: make a mesh of two dimensions, as init_device_mesh('cuda', "
            "(2, 4), mesh_dim_names=('replicate', 'shard')), and take fully_shard(model, mesh=mesh['shard']) and "
            "enable_majority_vote(model, optimizer, mesh=mesh['replicate'])"
        )


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _ranks_in(group: dist.ProcessGroup, whole: dist.ProcessGroup) -> list[int]:
    """Return the ranks of a group as numbers in another that has all of them."""
    return [dist.get_group_rank(whole, rank) for rank in _ranks(group)]


def _rank_sets(parameter: DTensor) -> list[list[int]]:
    """Return this rank's companions along each dimension of a parameter's mesh."""
    return [_ranks(dim) for dim in parameter.device_mesh.get_all_groups()]
