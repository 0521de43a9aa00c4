"""How long a step takes under each way to exchange gradients: a model of latency and bandwidth.

A step is its parts one after the other, ``compute + shared·(work·d + messages·per_message) + rounds·latency +
bits/bandwidth``. It leaves out:
an exchange that overlaps the backward pass or its own packing (so it is too slow for whoever overlaps); congestion,
lost packets and a network's inner limits; stragglers; what a packet's header takes; caches (work per parameter is the
same at any size). `traffic` owns the bytes. The latency-bandwidth model is Hockney's; the ring's rounds are those of
Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..settings import check_count
from ..wire import BUCKET_SIZE
from . import traffic

OURS, GATHER = "majority vote (ours)", "1-bit all-gather"

Bytes = Callable[[int, int], int]


class Scheme(NamedTuple):
    """A way to exchange: its `traffic` by `(parameters, workers)`, its `rounds` by `workers`, its messages.

    A round is a message that waits for the one before: one latency each. `messages` is how many a worker sends, by
    `(parameters, workers)`; one a round where it is None.
    """

    traffic: Bytes
    rounds: Callable[[int], int]
    messages: Callable[[int, int], int] | None = None


def _vote_messages(parameters: int, workers: int) -> int:
    """Return how many a worker sends: to every other one a header, and in each bucket ballots and verdicts."""
    return (workers - 1) * (1 + 2 * -(-parameters // BUCKET_SIZE))


def _all_reduces(count: int) -> Callable[[int], int]:
    return lambda workers: 2 * (workers - 1) * count


SCHEMES: Mapping[str, Scheme] = {
    "DDP fp32": Scheme(lambda d, m: traffic.ring_all_reduce(d, m, 32), _all_reduces(1)),
    "DDP fp16 hook": Scheme(lambda d, m: traffic.ring_all_reduce(d, m, 16), _all_reduces(1)),
    "DDP bf16 hook": Scheme(lambda d, m: traffic.ring_all_reduce(d, m, 16), _all_reduces(1)),
    "PowerSGD rank 1": Scheme(lambda d, m: traffic.power_sgd(d, m, 1), _all_reduces(3)),  # vectors, P and Q
    "PowerSGD rank 4": Scheme(lambda d, m: traffic.power_sgd(d, m, 4), _all_reduces(3)),
    GATHER: Scheme(traffic.sign_all_gather, lambda m: m - 1),
    OURS: Scheme(traffic.majority_vote, lambda m: 3 * (m > 1), _vote_messages),  # agreement, ballots, verdicts
}
"""Every way to exchange gradients, by the name it has in the benchmarks' tables."""

ROUND = "a round of local steps"
_KNOWN: Mapping[str, Scheme] = {
    **SCHEMES,
    ROUND: Scheme(
        lambda d, m: int(traffic.local_steps(d, m, 1)),
        lambda m: 4 * (m > 1),  # agreement, ballots, verdicts, magnitudes
        lambda d, m: _vote_messages(d, m) + m - 1,
    ),
}


class Cost(NamedTuple):
    """One step: `fixed` seconds whatever the bandwidth, and `bits` that the slowest link carries."""

    fixed: float
    bits: float

    def seconds(self, bandwidth: float) -> float:
        """Return ``fixed + bits/bandwidth``.

        Args:
            bandwidth: of the link, each way, in bits per second.

        Raises:
            ValueError: unless it is more than 0.
        """
        if not bandwidth > 0:
            raise ValueError(f"bandwidth must be more than 0 bits per second, got {bandwidth!r}")
        return self.fixed + self.bits / bandwidth


def vote_work(scheme: str, workers: int, cast: float, tally: float, apply: float) -> float:
    """Return the seconds per parameter of a vote: each worker counts `M` ballots of ``1/M`` of it, or of all of it.

    ``cast + tally + apply`` sharded, ``cast + M·tally + apply`` where every worker counts everything.

    Args:
        scheme: one of the two that vote.
        workers: `M`.
        cast: seconds per parameter for momentum and ballot.
        tally: seconds per coordinate of one ballot.
        apply: seconds per parameter for the update.

    Raises:
        ValueError: for a scheme that does not vote.

    Example:
        >>> vote_work(OURS, 4, cast=2.0, tally=0.5, apply=1.0), vote_work(GATHER, 4, 2.0, 0.5, 1.0)
        (3.5, 5.0)
    """
    if scheme not in (OURS, GATHER):
        raise ValueError(f"scheme must be one that votes, {OURS!r} or {GATHER!r}, got {scheme!r}")
    return cast + apply + tally * (workers if scheme == GATHER else 1)


def flat(
    scheme: str,
    parameters: int,
    workers: int,
    latency: float = 0.0,
    compute: float = 0.0,
    work: float = 0.0,
    shared: float = 1.0,
    per_message: float = 0.0,
) -> Cost:
    """Return the cost of a step where every worker has a link of its own.

    ``fixed = compute + max(1, shared)·(work·d + messages(d, M)·per_message) + rounds(M)·latency``, and
    ``bits = 8·bytes(d, M)`` of the busiest.

    Args:
        scheme: a name in `SCHEMES`, or `ROUND`.
        parameters: `d`.
        workers: `M`.
        latency: seconds of one message one way, software included.
        compute: seconds of the step without exchange, as it is on the shared cores.
        work: seconds per parameter that one worker alone takes to make and read its messages; negative where that
            spares it something of `compute`, as a vote spares the optimizer.
        shared: workers of one machine per core; below 1 each has one to itself.
        per_message: seconds that the software of one worker alone takes for each message, whatever its length.

    Raises:
        ValueError: for an unknown scheme, or sizes below 1.

    Example:
        >>> cost = flat("DDP fp32", 1_000_000, workers=4, latency=1e-3, compute=0.1)
        >>> round(cost.fixed, 3), cost.bits, round(cost.seconds(1e9), 3)
        (0.106, 48000000, 0.154)
    """
    if scheme not in _KNOWN:
        raise ValueError(f"unknown scheme {scheme!r}, take one of {', '.join(map(repr, _KNOWN))}")
    for name, value in (("parameters", parameters), ("workers", workers)):
        if not value >= 1:
            raise ValueError(f"{name} must be 1 or more, got {value!r}")
    sent, rounds, messages = _KNOWN[scheme]
    count = messages(parameters, workers) if messages else rounds(workers)
    own = (work * parameters if workers > 1 else 0.0) + count * per_message
    fixed = compute + max(1.0, shared) * own + rounds(workers) * latency
    return Cost(fixed, 8 * sent(parameters, workers))


def once_in(sync_every: int, round_cost: Cost, compute: float) -> Cost:
    """Return the cost of a step where one of `sync_every` closes a round of local steps.

    ``fixed = compute + (fixed of a round − compute)/H``, and ``bits = bits of a round/H``.

    Args:
        sync_every: `H`.
        round_cost: of a step that closes a round, ``flat(ROUND, …)``.
        compute: seconds of a step without exchange.

    Raises:
        ValueError: if `sync_every` is no whole number of 1 or more.

    Example:
        >>> once_in(4, Cost(fixed=3.0, bits=800), compute=1.0)
        Cost(fixed=1.5, bits=200.0)
    """
    check_count("sync_every", sync_every, 1)
    return Cost(compute + (round_cost.fixed - compute) / sync_every, round_cost.bits / sync_every)


def sync_every(round_cost: Cost, compute: float, bandwidth: float, overhead: float = 0.05) -> int:
    """Return the least power of two of steps between votes with which rounds cost no more than a share of a step.

    Args:
        round_cost: of a step that closes a round, ``flat(ROUND, …)``.
        compute: seconds of a step without exchange, more than 0.
        bandwidth: bits per second.
        overhead: the share, more than 0.

    Raises:
        ValueError: unless `compute`, `bandwidth` and `overhead` are more than 0.

    Example:
        >>> sync_every(Cost(fixed=1.0, bits=8e6), compute=1.0, bandwidth=1e7)
        16
    """
    for name, value in (("compute", compute), ("overhead", overhead)):
        if not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value!r}")
    spent = round_cost.seconds(bandwidth) - compute
    return 1 << max(0, math.ceil(math.log2(max(spent, 1e-12) / (overhead * compute))))


def by_nodes(
    scheme: str,
    parameters: int,
    nodes: int,
    ranks_per_node: int,
    inner_bandwidth: float,
    latency: float = 0.0,
    inner_latency: float = 0.0,
    compute: float = 0.0,
    work: float = 0.0,
    per_message: float = 0.0,
) -> Cost:
    """Return the cost of a step where the ranks of a node average in fp32 and only nodes use the scheme.

    ``fixed = ring(d, r, 32 bits)/inner_bandwidth + 2(r−1)·inner_latency + flat(d/r parameters, nodes).fixed`` and
    ``bits = r·flat(d/r parameters, nodes).bits``: each of the `r` ranks exchanges its share of the parameters with its
    counterparts, and all go through the node's one link.

    Args:
        scheme: between the nodes, a name in `SCHEMES`.
        parameters: `d`.
        nodes: how many; `M` is ``nodes·r``.
        ranks_per_node: `r`.
        inner_bandwidth: bits per second of each rank inside its node.
        latency: as in `flat`, between nodes.
        inner_latency: the same inside a node.
        compute: as in `flat`.
        work: as in `flat`; a core for every rank.
        per_message: as in `flat`, inside a node, too.

    Returns:
        The cost; its bandwidth is that of a node's link.

    Raises:
        ValueError: as `flat`, or if `ranks_per_node` is below 1.

    Example:
        >>> one, two = (by_nodes(OURS, 10**6, 4, ranks, inner_bandwidth=1e12).bits for ranks in (1, 2))
        >>> round(two / one, 3)
        1.001
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node must be 1 or more, got {ranks_per_node!r}")
    ring = flat("DDP fp32", parameters, ranks_per_node, inner_latency, per_message=per_message)
    outer = flat(scheme, -(-parameters // ranks_per_node), nodes, latency, compute, work, per_message=per_message)
    return Cost(ring.seconds(inner_bandwidth) + outer.fixed, ranks_per_node * outer.bits)


def break_even(one: Cost, other: Cost) -> float | None:
    """Return the bandwidth, in bits per second, at which two schemes take equally long.

    ``(bits₁ − bits₂)/(fixed₂ − fixed₁)``; below it the one with fewer bits is faster, above it the other.

    Returns:
        The bandwidth, or None if one of them is faster at every bandwidth.

    Example:
        >>> break_even(Cost(fixed=1.0, bits=1000), Cost(fixed=2.0, bits=200))
        800.0
    """
    more, later = one.bits - other.bits, other.fixed - one.fixed
    return more / later if more * later > 0 else None


def fastest(costs: Mapping[str, Cost]) -> list[tuple[float, str]]:
    """Return which scheme is fastest at which bandwidth.

    Args:
        costs: name -> cost; of two that are always equal the first counts.

    Returns:
        (bandwidth in bits per second from which it is the fastest, name), slowest link first; the first is from 0.

    Raises:
        ValueError: without any cost.

    Example:
        >>> fastest({"few bits": Cost(1.5, 1_000), "many": Cost(1.0, 32_000)})
        [(0.0, 'few bits'), (62000.0, 'many')]
    """
    if not costs:
        raise ValueError("fastest needs at least one cost, got none")
    names = list(costs)
    best = min(names, key=lambda name: (costs[name].bits, costs[name].fixed))
    found = [(0.0, best)]
    while quicker := [name for name in names if costs[name].fixed < costs[best].fixed]:
        now = costs[best]
        crossings = {name: break_even(now, costs[name]) or 0.0 for name in quicker}  # all of them have more bits
        best = min(quicker, key=lambda name: (crossings[name], costs[name].fixed))
        found.append((crossings[best], best))
    return found
