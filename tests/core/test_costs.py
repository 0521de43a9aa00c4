"""The cost model: worked examples by hand, the bytes of `traffic`, limits, and what is refused."""

import pytest

from signsgd_core.network.costs import (
    GATHER,
    OURS,
    ROUND,
    SCHEMES,
    Cost,
    break_even,
    by_nodes,
    fastest,
    flat,
    once_in,
    sync_every,
    vote_work,
)
from signsgd_core.network.traffic import local_steps, majority_vote, power_sgd, ring_all_reduce, sign_all_gather
from signsgd_core.wire import BUCKET_SIZE

MILLION = 1_000_000


def test_a_step_by_hand() -> None:
    """Ten seconds of compute, 2 of work, 6 rounds of half a second, 48 million bits at a million a second."""
    cost = flat("DDP fp32", MILLION, 4, latency=0.5, compute=10.0, work=2e-6)
    assert cost == Cost(15.0, 48_000_000)
    assert cost.seconds(1e6) == 63.0


@pytest.mark.parametrize(
    ("scheme", "rounds", "sent"),
    [
        ("DDP fp32", 14, ring_all_reduce(MILLION, 8, 32)),
        ("DDP fp16 hook", 14, ring_all_reduce(MILLION, 8, 16)),
        ("DDP bf16 hook", 14, ring_all_reduce(MILLION, 8, 16)),
        ("PowerSGD rank 1", 42, power_sgd(MILLION, 8, 1)),
        ("PowerSGD rank 4", 42, power_sgd(MILLION, 8, 4)),
        (GATHER, 7, sign_all_gather(MILLION, 8)),
        (OURS, 3, majority_vote(MILLION, 8)),
    ],
)
def test_rounds_and_bits(scheme: str, rounds: int, sent: int) -> None:
    assert flat(scheme, MILLION, 8, latency=1.0) == Cost(rounds, 8 * sent)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_alone_a_worker_only_computes(scheme: str) -> None:
    assert flat(scheme, MILLION, 1, latency=1.0, compute=3.0, work=1.0) == Cost(3.0, 0)


def test_every_message_costs() -> None:
    """A ring's are its rounds; a vote of two buckets tells 7 peers that it agrees, 2 ballots and 2 verdicts."""
    assert flat("DDP fp32", 8, 8, per_message=1.0).fixed == 14
    assert flat(OURS, BUCKET_SIZE, 8, per_message=1.0).fixed == 7 * 3
    assert flat(OURS, BUCKET_SIZE + 1, 8, per_message=1.0, shared=2.0).fixed == 2 * 7 * 5
    assert by_nodes(OURS, 2 * BUCKET_SIZE, 4, 2, 1e30, per_message=1.0).fixed == pytest.approx(2 + 3 * 3)


def test_workers_that_share_cores_work_slower() -> None:
    assert [flat(OURS, 64, 2, work=1.0, shared=shared).fixed for shared in (0.5, 1.0, 4.0)] == [64.0, 64.0, 256.0]


def test_only_a_gather_counts_all_ballots_everywhere() -> None:
    assert [vote_work(OURS, m, 4.0, 0.5, 2.0) for m in (2, 8)] == [6.5, 6.5]
    assert [vote_work(GATHER, m, 4.0, 0.5, 2.0) for m in (2, 8)] == [7.0, 10.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nodes_of_one_rank_are_workers(scheme: str) -> None:
    assert by_nodes(scheme, MILLION, 4, 1, 1.0, 0.5, 9.0, 3.0, 1e-6) == flat(scheme, MILLION, 4, 0.5, 3.0, 1e-6)


def test_nodes_by_hand() -> None:
    """Inside: half of a million numbers there and back, at 32 million bits a second, and 2 rounds; outside: half."""
    inside = by_nodes("DDP fp32", MILLION, 1, 2, 32e6, inner_latency=0.25, compute=3.0)
    assert inside == Cost(3.0 + 1.0 + 0.5, 0)
    both = by_nodes("DDP fp32", MILLION, 4, 2, 32e6, latency=0.5, work=2e-6)
    assert both == Cost(1.0 + 1.0 + 3.0, 48_000_000)


def test_break_even_is_where_both_take_equally_long() -> None:
    vote, mean = Cost(1.5, 1_000), Cost(1.0, 32_000)
    bandwidth = break_even(vote, mean)
    assert bandwidth == break_even(mean, vote) == 62_000
    assert vote.seconds(bandwidth) == pytest.approx(mean.seconds(bandwidth), rel=1e-12)
    assert vote.seconds(bandwidth / 2) < mean.seconds(bandwidth / 2)
    assert vote.seconds(bandwidth * 2) > mean.seconds(bandwidth * 2)


@pytest.mark.parametrize("other", [Cost(2.0, 2_000), Cost(1.0, 2_000), Cost(2.0, 1_000), Cost(1.0, 1_000)])
def test_no_break_even_where_one_is_never_slower(other: Cost) -> None:
    assert break_even(Cost(1.0, 1_000), other) is None


def test_fastest_at_every_bandwidth() -> None:
    """Judged by trying every scheme a little below and above each change, and where the link is very slow or fast."""
    costs = {
        f"{k}": Cost(fixed, bits) for k, (fixed, bits) in enumerate([(9, 10), (4, 40), (5, 20), (1, 900), (8, 39)])
    }
    found = fastest(costs)
    assert [name for _, name in found] == ["0", "2", "1", "3"]
    assert [start for start, _ in found] == sorted(start for start, _ in found)
    edges = [*(start for start, _ in found), float("inf")]
    for k, (start, name) in enumerate(found):
        for bandwidth in (max(start, 1e-6) * 1.001, min(edges[k + 1], 1e6) * 0.999):
            assert min(costs, key=lambda one: costs[one].seconds(bandwidth)) == name


def test_fastest_of_few() -> None:
    assert fastest({"a": Cost(1.0, 5), "b": Cost(2.0, 5)}) == [(0.0, "a")]
    assert fastest({"a": Cost(1.0, 5), "b": Cost(1.0, 5)}) == [(0.0, "a")]
    with pytest.raises(ValueError, match="at least one cost, got none"):
        fastest({})


def test_power_sgd() -> None:
    """Layers of 10 x 10 and 10: of 110 parameters 2·r·10 + 10 numbers go round, 4 bytes each, 2·(M−1)/M times."""
    assert power_sgd(1100, 2, rank=1, width=10) == 1200
    assert power_sgd(1100, 2, rank=2, width=10) == 2000
    assert power_sgd(1100, 1, rank=1, width=10) == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scheme 'pigeon', take one of 'DDP fp32', "):
        flat("pigeon", 1, 2)
    with pytest.raises(ValueError, match="parameters must be 1 or more, got 0"):
        flat(OURS, 0, 2)
    with pytest.raises(ValueError, match="parameters must be 1 or more, got nan"):
        flat(OURS, float("nan"), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        flat(OURS, 1, 0)
    with pytest.raises(ValueError, match="ranks_per_node must be 1 or more, got 0"):
        by_nodes(OURS, 1, 2, 0, 1.0)
    with pytest.raises(ValueError, match="bandwidth must be more than 0 bits per second, got 0.0"):
        flat(OURS, 1, 2).seconds(0.0)
    with pytest.raises(ValueError, match="scheme must be one that votes, .* got 'DDP fp32'"):
        vote_work("DDP fp32", 2, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="sync_every must be a whole number of 1 or more, got 0"):
        once_in(0, Cost(1.0, 8), 1.0)
    with pytest.raises(ValueError, match="compute must be more than 0, got 0.0"):
        sync_every(Cost(1.0, 8), 0.0, 1e6)
    with pytest.raises(ValueError, match="overhead must be more than 0, got -0.1"):
        sync_every(Cost(1.0, 8), 1.0, 1e6, -0.1)


def test_local_steps() -> None:
    """A round is four messages that wait for one another; between rounds there is no exchange."""
    one = flat(ROUND, 10**6, 4, latency=1e-3, compute=0.1, work=1e-8)
    assert one.fixed == pytest.approx(0.1 + 1e-2 + 4e-3)
    assert one.bits == 8 * local_steps(10**6, 4, 1)
    assert once_in(1, one, 0.1) == pytest.approx(one)
    assert once_in(10, one, 0.1) == pytest.approx(Cost(0.1 + 1.4e-3, one.bits / 10))


@pytest.mark.parametrize("bandwidth", [1e5, 1e7, 1e9])
def test_the_advised_round_is_the_shortest_that_costs_little(bandwidth: float) -> None:
    one = flat(ROUND, 10**6, 4, latency=1e-3, compute=0.1)
    every = sync_every(one, 0.1, bandwidth)
    assert once_in(every, one, 0.1).seconds(bandwidth) <= 0.105
    assert every == 1 or once_in(every // 2, one, 0.1).seconds(bandwidth) > 0.105
