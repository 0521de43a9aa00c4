"""Nodes: machines whose ranks have fast links among them and are one worker together; who they are, who has what."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import _compat
from ..views import FlatView
from .transport import Message, PointToPoint


class Groups(NamedTuple):
    """The process groups of a vote between nodes, on one rank.

    Attributes:
        everyone: all ranks; node `i` has the ranks ``i·L`` to ``(i+1)·L − 1``, `L` a node.
        inside: the ranks of this rank's node.
        counterparts: the ranks with this rank's place in every node, node 0's first.
    """

    everyone: dist.ProcessGroup
    inside: dist.ProcessGroup
    counterparts: dist.ProcessGroup


def find_nodes(
    group: dist.ProcessGroup, device: torch.device, ranks_per_node: int | None = None, local_rank: int | None = None
) -> Groups:
    """Return the groups, once all ranks are sure to be where they think; every rank must call it.

    Args:
        group: of all ranks.
        device: of the model.
        ranks_per_node: L; None for what torchrun says in ``LOCAL_WORLD_SIZE``.
        local_rank: this rank's place in its node; None for what torchrun says in ``LOCAL_RANK``.

    Raises:
        PeerLostError: if a rank does not answer.
        ValueError: on all ranks, if the nodes have not the same number of ranks, or the ranks are not numbered node by
            node.
    """
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if ranks_per_node is None else ranks_per_node
    place = int(os.environ.get("LOCAL_RANK", -1)) if local_rank is None else local_rank
    everyone = PointToPoint(group)
    row = torch.tensor([size, place, dist.get_world_size() == everyone.world_size], device=everyone.wire(device))
    _check(everyone.gather(row, Message.PLACES).tolist())
    rank, ranks, timeout = everyone.rank, range(everyone.world_size), _compat.timeout(group)
    first = rank - rank % size
    made = [
        dist.new_group(list(members), timeout=timeout, use_local_synchronization=True)
        for members in (ranks[first : first + size], ranks[rank % size :: size])
    ]
    return Groups(group, *made)


class Slice(NamedTuple):
    """Coordinates [first, last) of a parameter that one rank of a node keeps and votes on.

    Attributes:
        number: the parameter's.
        first: the first coordinate.
        last: the one after the last.
    """

    number: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.last - self.first


def cut(views: Sequence[FlatView], ranks: int) -> list[list[Slice]]:
    """Cut the parameters into one share a rank of a node.

    Each parameter group is a long vector of its own, in equal shares: one that is added later moves no momentum. One
    with ``orthogonalize=True`` is shared out in whole matrices, since a polar factor needs all of one: the largest
    first, each to the rank that has least of the group.

    Args:
        views: all parameters of the optimizer, group by group.
        ranks: L.

    Returns:
        The slices of each rank, none of them empty, in the order of the parameters.
    """
    shares: list[list[Slice]] = [[] for _ in range(ranks)]
    for _, members in groupby(enumerate(views), key=lambda member: id(member[1].group)):
        group = [(number, view.parameter.numel()) for number, view in members]
        if views[group[0][0]].group["orthogonalize"]:
            loads = [0] * ranks
            for number, length in sorted(group, key=lambda member: -member[1]):
                k = loads.index(min(loads))
                loads[k] += length
                if length:
                    shares[k].append(Slice(number, 0, length))
            continue
        size, start = -(-sum(length for _, length in group) // ranks), 0
        for number, length in group:
            for k in range(start // size, -(-(start + length) // size)) if length else ():
                shares[k].append(Slice(number, max(k * size - start, 0), min((k + 1) * size - start, length)))
            start += length
    return [sorted(share) for share in shares]


def _check(rows: Sequence[Sequence[int]]) -> None:
    """Make sure of what every rank said: ranks of its node, its place in it, whether the group has all ranks."""
    size = rows[0][0]
    if not all(row[2] for row in rows):
        raise ValueError("vote_between='nodes' needs a model whose process group has all ranks, got some of them")
    if not all(row[0] > 0 and row[1] >= 0 for row in rows):
        raise ValueError(
            "vote_between='nodes' must be told which ranks share a node: start the script with torchrun, or set "
            "LOCAL_WORLD_SIZE and LOCAL_RANK as it does"
        )
    other = next((rank for rank, row in enumerate(rows) if row[0] != size), None)
    if other is not None:
        raise ValueError(
            f"vote_between='nodes' needs as many ranks on every node: rank 0 is on a node of {size}, rank {other} on "
            f"one of {rows[other][0]}"
        )
    other = next((rank for rank, row in enumerate(rows) if row[1] != rank % size), None)
    if other is not None or len(rows) % size:
        rank = len(rows) - 1 if other is None else other
        raise ValueError(
            f"vote_between='nodes' needs ranks that are numbered node by node, {size} a node: of {len(rows)} ranks, "
            f"rank {rank} has the place {rows[rank][1]} in its node"
        )
