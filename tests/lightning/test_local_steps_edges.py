"""Between rounds, and where one ends without a vote: other code moves parameters, or a round fails."""

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from signsgd_lightning import RanksDifferError, enable_local_steps
from tests.lightning.two_weights import Behind, line, step
from tests.workers import Workers


def _moved_apart(kind: str) -> tuple[str, list[float]]:
    """Move parameters, or add some, that are not the same on all ranks; return the error, and where all end then."""
    net = line()
    inner = torch.optim.SGD(net.parameters(), lr=0.5)
    optimizer: Any = Behind(inner) if kind == "a wrapper" else inner
    enable_local_steps(net, inner, sync_every=1)
    said, last = "", net.weight
    try:
        step(optimizer, [1.0, 1.0])
        if kind == "a new group":
            last = nn.Parameter(torch.full((1, 2), float(dist.get_rank())))
            inner.add_param_group({"params": [last]})
        elif kind == "one rank" and dist.get_rank() == 1:
            last.data[0, 0] += 1
        step(optimizer, [1.0, 1.0])
    except RanksDifferError as error:
        said = str(error)
    with torch.no_grad():
        last.fill_(2.0)  # what the error asks for
    step(inner, [1.0, -1.0])
    return said, last.tolist()[0]


def _apart() -> list[tuple[str, list[float]]]:
    return [_moved_apart(kind) for kind in ("a new group", "a wrapper", "one rank")]


def test_ranks_that_other_code_moves_apart_are_told(workers: Workers) -> None:
    """And ballots that were under way are none of the next round's."""
    runs = workers.run(3, _apart)
    who = "when the round began rank{} in {}, or in its verdict momentum: other code than the opti"
    for told in runs:
        assert [said[: len(who) + 99].split("mizers")[0] for said, _ in told] == [
            who.format("s 0, 1, 2 differ from one another", "a parameter"),
            who.format("s 0, 1, 2 differ from one another", "weight"),
            who.format(" 1 differs from the other ranks", "weight"),
        ]
        assert [end for _, end in told] == [[1.5, 2.5]] * 3


def _alike(dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """Four rounds, of which other code moves parameters before the last, through `.data`; return what each sent."""
    net = line(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    local = enable_local_steps(net, optimizer, sync_every=1)
    sent = [local.vote.topology.everyone.sent_bytes]
    for t in range(4):
        if t == 3:
            net.weight.data.copy_(torch.tensor([[7.0, -3.0]]))
            optimizer.param_groups[0]["lr"] = 0.0
        step(optimizer, [1.0 + dist.get_rank(), 1.0])
        sent.append(local.vote.topology.everyone.sent_bytes)
    return np.diff(sent).tolist(), net.weight.tolist()[0]


def _alikes() -> list[tuple[list[int], list[float]]]:
    return [_alike(torch.float32), _alike(torch.bfloat16)]


def test_parameters_that_all_ranks_move_alike_are_where_the_round_begins(workers: Workers) -> None:
    for runs in workers.run(2, _alikes):
        for sent, end in runs:
            assert end == [7.0, -3.0], "nobody took a step of a length"
            header, present, row, ballots = 32, 1, 4 * (1 + 1), 2 * 8
            assert sent == [
                header + header + row + ballots,  # the first round compares values
                header + row + ballots,
                header + row + ballots,
                header + present + row + header,  # and so does one that begins elsewhere
            ]


def _added() -> tuple[list[float], list[float]]:
    """Add a layer to the optimizer in the middle of a round, on all ranks."""
    old, new = line(), line(value=2.0)
    optimizer = torch.optim.SGD(old.parameters(), lr=1.0)
    local = enable_local_steps(nn.ModuleList([old, new]), optimizer, sync_every=3)
    step(optimizer, [1.0, 1.0])
    optimizer.add_param_group({"params": list(new.parameters())})
    for _ in range(2):
        step(optimizer, [1.0, 1.0 + dist.get_rank()])
    assert not local.is_open
    return old.weight.tolist()[0], new.weight.tolist()[0]


def test_a_group_that_is_added_within_a_round_takes_part_from_its_first_step_on(workers: Workers) -> None:
    """Two ranks: magnitudes are means over the tensor, and the median of the ranks' is their mean."""
    first, second = (3 + 3 + 3 + 5) / 4, (2 + 2 + 2 + 4) / 4
    assert workers.run(2, _added) == [([1 - first] * 2, [2 - second] * 2)] * 2


def _grown() -> tuple[str, list[float], list[float]]:
    """A cache grows on rank 1 alone, so that the round fails."""
    net = line(value=10.0)
    net.register_buffer("cache", torch.zeros(4), persistent=False)
    net.register_buffer("mean", torch.zeros(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    enable_local_steps(net, optimizer, sync_every=2)
    step(optimizer, [1.0, -3.0])
    net.mean += 1
    net.cache = torch.zeros(4 + dist.get_rank())
    try:
        step(optimizer, [1.0, -3.0])
    except RuntimeError as error:
        return str(error), net.weight.tolist()[0], net.mean.tolist()
    return "", [], []


def _wide() -> list[float]:
    """Round float64 statistics, which are the same on all ranks but for the last, beside narrower ones."""
    net = line()
    net.register_buffer("wide", torch.zeros(3, dtype=torch.float64))
    net.register_buffer("short", torch.zeros(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    local = enable_local_steps(net, optimizer, sync_every=2)
    net.wide.copy_(torch.tensor([1 + 1e-10, 123456789.0, 1e-10 * dist.get_rank()], dtype=torch.float64))
    net.short.fill_(1.0 + dist.get_rank())
    step(optimizer, [1.0, 1.0])
    local.close_round()
    return [*net.wide.tolist(), *net.short.tolist()]


def _buffers() -> tuple[Any, list[float]]:
    return _grown(), _wide()


def test_buffers(workers: Workers) -> None:
    for (said, weight, mean), wide in workers.run(2, _buffers):
        assert "rank 0 has «buffer cache: shape (4,), torch.float32» where rank 1 has «buffer cache: shape (5,)" in said
        assert (weight, mean) == ([10.0, 10.0], [0.0, 0.0]), "they are as the round began"
        assert wide == [1 + 1e-10, 123456789.0, 0.5e-10, 1.5]


def _two_models() -> str:
    """Two models of one structure, each with rounds of its own; rank 1 takes a step of the first less."""
    first, second = line(), line()
    both = [torch.optim.SGD(net.parameters(), lr=1.0) for net in (first, second)]
    rounds = [enable_local_steps(net, sgd, sync_every=2) for net, sgd in zip((first, second), both, strict=True)]
    try:
        for t in range(4):
            for k, sgd in enumerate(both):
                if (k, t, dist.get_rank()) != (0, 1, 1):
                    step(sgd, [1.0, -1.0])
        for local in rounds:
            local.close_round()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_rounds_of_two_models_are_told_apart(workers: Workers) -> None:
    first, second = workers.run(2, _two_models, group_timeout=10)
    assert first == second
    numbers = re.findall(r"«local steps of model (\d+)", first)
    assert len(set(numbers)) == 2, first


def _interrupted() -> list[Any]:
    """Close a round whose commit fails on rank 1, as by an interrupt; return where that leaves parameters."""
    net = line(value=8.0)
    local: Any = enable_local_steps(net, sgd := torch.optim.SGD(net.parameters(), lr=1.0), sync_every=1)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    if dist.get_rank() == 1:
        local.outer.take = fail
    with contextlib.suppress(KeyboardInterrupt):
        step(sgd, [1.0, 1.0])
    return [net.weight.flatten().tolist(), local.is_open]


def test_a_failure_behind_the_vote_leaves_no_displacements(workers: Workers) -> None:
    assert workers.run(2, _interrupted) == [[[7.0, 7.0], False], [[8.0, 8.0], False]]


def _evaluated() -> Any:
    """Close a round in inference mode; the next one, outside of it, writes to its momenta."""
    net = line(value=8.0)
    local = enable_local_steps(net, sgd := torch.optim.SGD(net.parameters(), lr=1.0), outer_momentum=0.5)
    for evaluates in (True, False):
        step(sgd, [1.0, 1.0])
        with torch.inference_mode(evaluates):
            local.close_round()
    return net.weight.flatten().tolist()


def test_a_round_may_close_in_inference_mode(workers: Workers) -> None:
    """With steps of 1 and μ = 0.5 the first round goes 1.5 far, the second 1 + 0.5·1.5."""
    assert workers.run(2, _evaluated) == [[4.75, 4.75]] * 2


def _lie_of_another_shape() -> str:
    net = line()
    adversaries = {1: lambda delta: np.ones(10, np.float32)}
    local = enable_local_steps(net, sgd := torch.optim.SGD(net.parameters(), lr=1.0), adversaries=adversaries)
    step(sgd, [1.0, 1.0])
    try:
        local.close_round()
    except ValueError as error:
        return str(error)
    except RuntimeError:
        return "the other failed"
    return "nothing"


def test_an_adversary_of_another_shape_is_refused(workers: Workers) -> None:
    honest, liar = workers.run(2, _lie_of_another_shape, group_timeout=5)
    assert "(10,)" in liar
    assert honest == "the other failed"


def _counts(sizes: tuple[int, int]) -> str:
    """Take local steps with a buffer of a size of this rank's own; 0 is none."""
    net = line()
    if size := sizes[dist.get_rank()]:
        net.register_buffer("seen", torch.zeros(size, dtype=torch.int64))
    try:
        enable_local_steps(net, torch.optim.SGD(net.parameters(), lr=1.0))
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("sizes", [(1, 0), (2, 3)])
def test_buffers_of_whole_numbers_must_be_the_same(sizes: tuple[int, int], workers: Workers) -> None:
    for said in workers.run(2, _counts, sizes, group_timeout=5):
        assert "«buffer seen: shape" in said
        assert "the ranks disagree" in said
