"""Nodes: machines whose ranks have fast links among them and are one worker together; who they are, their shards."""

import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from .agreement import Purpose, agree
from .peers import Message, Peers
from .segments import Segment

VoteBetween = Literal["ranks", "nodes"]
"""Who is a worker: every rank, or all ranks of a node together."""


class Nodes(NamedTuple):
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
) -> Nodes:
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
    peers = Peers(group)
    row = torch.tensor([size, place, dist.get_world_size() == peers.world_size])
    _check(peers.gather(row.to(peers.wire(device)), Message.PLACES).tolist())
    rank, ranks, timeout = peers.rank, range(peers.world_size), _timeout(group)
    first = rank - rank % size
    made = [
        dist.new_group(list(members), timeout=timeout, use_local_synchronization=True)
        for members in (ranks[first : first + size], ranks[rank % size :: size])
    ]
    return Nodes(group, *made)


def agree_on_voters(group: dist.ProcessGroup, device: torch.device, vote_between: str, optimizers: int) -> None:
    """Make sure that all ranks want votes of the same workers, on as many optimizers.

    Args:
        group: of all ranks.
        device: of the model.
        vote_between: what this rank wants.
        optimizers: how many it has.

    Raises:
        PeerLostError: if a rank does not answer.
        RuntimeError: on all ranks, if they do not.
        ValueError: if they are neither ranks nor nodes.
    """
    check_voters(vote_between)
    peers = Peers(group)
    lines, device = [f"vote_between={vote_between!r}", f"optimizers: {optimizers}"], peers.wire(device)
    agree(peers, lines, torch.ones(0, dtype=torch.bool), device, Purpose.ENABLE)


def check_voters(vote_between: str) -> None:
    """Make sure that the workers are ranks or nodes.

    Raises:
        ValueError: if not.
    """
    if vote_between not in ("ranks", "nodes"):
        raise ValueError(
            f"vote_between must be 'ranks' (each is a worker) or 'nodes' (those of a machine are one), got "
            f"{vote_between!r}"
        )


class Piece(NamedTuple):
    """Some coordinates of a parameter: those that are in one rank's shard.

    Attributes:
        number: the parameter's.
        first: its first coordinate that is the piece's.
        last: the one after the last.
    """

    number: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """How many coordinates."""
        return self.last - self.first


def cut(segments: Sequence[Segment], ranks: int) -> list[list[Piece]]:
    """Cut the parameters into one shard a rank of a node.

    Each parameter group is a long vector of its own, in equal shards: one that is added later moves no momentum.

    Args:
        segments: all parameters of the optimizer, group by group.
        ranks: L.

    Returns:
        The pieces of each rank, none of them empty, in the order of the parameters.
    """
    shards: list[list[Piece]] = [[] for _ in range(ranks)]
    for _, members in groupby(enumerate(segments), key=lambda member: id(member[1].group)):
        group = [(number, segment.parameter.numel()) for number, segment in members]
        share, start = -(-sum(length for _, length in group) // ranks), 0
        for number, length in group:
            for k in range(start // share, -(-(start + length) // share)) if length else ():
                shards[k].append(Piece(number, max(k * share - start, 0), min((k + 1) * share - start, length)))
            start += length
    return shards


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


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """Return how long the group waits for a lost rank; torch has no public way to ask."""
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout
