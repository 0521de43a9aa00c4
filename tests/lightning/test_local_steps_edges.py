"""Between rounds, and where one ends without a vote: other code moves parameters, a state is loaded, a round fails."""

import contextlib
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from signsgd_lightning import (
    RanksDifferError,
    Signum,
    enable_local_steps,
    enable_majority_vote,
    gather_state,
    scatter_state,
)
from tests.workers import Workers


def _line(dtype: torch.dtype = torch.float32, value: float = 1.0) -> Any:
    """Two weights."""
    net = nn.Linear(2, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        net.weight.fill_(value)
    return net


def _step(optimizer: Any, gradient: list[float]) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.tensor([gradient], dtype=p.dtype)
    optimizer.step()


def _own() -> float:
    return float(dist.get_rank())


class Behind:
    """Holds an optimizer and moves parameters behind its step, as Lookahead does; each rank elsewhere."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(_own())


def _moved_apart(kind: str) -> tuple[str, list[float]]:
    """Move parameters, or add some, that are not the same on all ranks; return the error, and where all end then."""
    net = _line()
    inner = torch.optim.SGD(net.parameters(), lr=0.5)
    optimizer: Any = Behind(inner) if kind == "a wrapper" else inner
    enable_local_steps(net, inner, sync_every=1)
    said, last = "", net.weight
    try:
        _step(optimizer, [1.0, 1.0])
        if kind == "a new group":
            last = nn.Parameter(torch.full((1, 2), _own()))
            inner.add_param_group({"params": [last]})
        elif kind == "one rank" and dist.get_rank() == 1:
            last.data[0, 0] += 1
        _step(optimizer, [1.0, 1.0])
    except RanksDifferError as error:
        said = str(error)
    with torch.no_grad():
        last.fill_(2.0)  # what the error asks for
    _step(inner, [1.0, -1.0])
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
    net = _line(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    local = enable_local_steps(net, optimizer, sync_every=1)
    sent = [local.vote.topology.everyone.sent_bytes]
    for t in range(4):
        if t == 3:
            net.weight.data.copy_(torch.tensor([[7.0, -3.0]]))
            optimizer.param_groups[0]["lr"] = 0.0
        _step(optimizer, [1.0 + _own(), 1.0])
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
    old, new = _line(), _line(value=2.0)
    optimizer = torch.optim.SGD(old.parameters(), lr=1.0)
    local = enable_local_steps(nn.ModuleList([old, new]), optimizer, sync_every=3)
    _step(optimizer, [1.0, 1.0])
    optimizer.add_param_group({"params": list(new.parameters())})
    for _ in range(2):
        _step(optimizer, [1.0, 1.0 + _own()])
    assert not local.is_open
    return old.weight.tolist()[0], new.weight.tolist()[0]


def test_a_group_that_is_added_within_a_round_takes_part_from_its_first_step_on(workers: Workers) -> None:
    """Two ranks: magnitudes are means over the tensor, and the median of the ranks' is their mean."""
    first, second = (3 + 3 + 3 + 5) / 4, (2 + 2 + 2 + 4) / 4
    assert workers.run(2, _added) == [([1 - first] * 2, [2 - second] * 2)] * 2


def _loaded() -> list[list[float]]:
    """Load what was saved at the start into the middle of the third round; then after it, optimizer first."""
    net = _line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    local = enable_local_steps(net, optimizer, sync_every=3)
    holder: Any = Behind(optimizer)
    box = [{"net": {"weight": net.weight.detach().clone()}, "optimizer": gather_state(holder)}]
    dist.broadcast_object_list(box)
    _step(optimizer, [1.0, 2.0])
    local.close_round()
    ends: list[list[float]] = [[box[0]["optimizer"]["local_steps"]["rounds"]]]  # seen through what holds it
    for first in (0, 1):
        _step(optimizer, [3.0 + _own(), 3.0])
        if first == 0:
            net.load_state_dict(box[0]["net"])
        scatter_state(optimizer, box[0]["optimizer"])
        if first == 1:
            net.load_state_dict(box[0]["net"])
        ends.append([float(local.steps), float(local.is_open), *net.weight.tolist()[0]])
        local.close_round()
        ends.append(net.weight.tolist()[0])
    _step(optimizer, [1.0, -1.0])
    local.close_round()
    return [*ends, net.weight.tolist()[0]]


def test_a_state_that_is_loaded_ends_the_open_round(workers: Workers) -> None:
    for ends in workers.run(2, _loaded):
        assert ends == [[0], *[[0.0, 0.0, 1.0, 1.0], [1.0, 1.0]] * 2, [0.5, 1.5]]


def _grown() -> tuple[str, list[float], list[float]]:
    """A cache grows on rank 1 alone, so that the round fails."""
    net = _line(value=10.0)
    net.register_buffer("cache", torch.zeros(4), persistent=False)
    net.register_buffer("mean", torch.zeros(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    enable_local_steps(net, optimizer, sync_every=2)
    _step(optimizer, [1.0, -3.0])
    net.mean += 1
    net.cache = torch.zeros(4 + dist.get_rank())
    try:
        _step(optimizer, [1.0, -3.0])
    except RuntimeError as error:
        return str(error), net.weight.tolist()[0], net.mean.tolist()
    return "", [], []


def _wide() -> list[float]:
    """Round float64 statistics, which are the same on all ranks but for the last, beside narrower ones."""
    net = _line()
    net.register_buffer("wide", torch.zeros(3, dtype=torch.float64))
    net.register_buffer("short", torch.zeros(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    local = enable_local_steps(net, optimizer, sync_every=2)
    net.wide.copy_(torch.tensor([1 + 1e-10, 123456789.0, 1e-10 * _own()], dtype=torch.float64))
    net.short.fill_(1.0 + _own())
    _step(optimizer, [1.0, 1.0])
    local.close_round()
    return [*net.wide.tolist(), *net.short.tolist()]


def _buffers() -> tuple[Any, list[float]]:
    return _grown(), _wide()


def test_buffers(workers: Workers) -> None:
    for (said, weight, mean), wide in workers.run(2, _buffers):
        assert "rank 0 has «buffer cache: shape (4,), torch.float32» where rank 1 has «buffer cache: shape (5,)" in said
        assert (weight, mean) == ([10.0, 10.0], [0.0, 0.0]), "they are as the round began"
        assert wide == [1 + 1e-10, 123456789.0, 0.5e-10, 1.5]


def _signum(votes: bool) -> tuple[Any, Signum]:
    """Return two parameters, of which the second one's momentum is rank 1's alone, and what steps on them."""
    net = nn.ParameterList([torch.ones(2), torch.ones(1)])
    optimizer = Signum(net.parameters(), lr=0.125, betas=(0.5, 0.5))
    if votes:
        enable_majority_vote(net, optimizer)
    else:
        enable_local_steps(net, optimizer, sync_every=1)
    return net, optimizer


def _crosses(from_vote: bool) -> tuple[list[Any], list[Any], list[str]]:
    """Return the momenta under one way to train, and those that the other goes on with."""
    (net, optimizer), said = _signum(from_vote), list[str]()
    net[0].grad = torch.tensor([1.0, -3.0]) * (1 + _own())
    net[1].grad = torch.ones(1) if dist.get_rank() == 1 else None
    optimizer.step()
    box = [gather_state(optimizer)]
    dist.broadcast_object_list(box)
    then, other = _signum(not from_vote)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scatter_state(other, box[0])
        said += [str(warning.message) for warning in caught]
        caught.clear()
        other.load_state_dict(box[0])  # as torch does it
        said += [str(warning.message) for warning in caught][:1]
    own = [optimizer.state.get(p, {}).get("momentum", torch.zeros(1)).tolist() for p in net]
    scatter_state(other, box[0])
    return own, [other.state[p]["momentum"].tolist() for p in then], said


def _both_ways() -> list[Any]:
    return [_crosses(True), _crosses(False)]


def test_a_momentum_goes_from_a_vote_to_local_steps_and_back(workers: Workers) -> None:
    for rank, ways in enumerate(workers.run(2, _both_ways)):
        for own, then, said in ways:
            assert own == [[0.5 * (1 + rank), -1.5 * (1 + rank)], [0.5 * rank]]
            assert then == own
            assert [words[:46] for words in said] == ["this state holds the momenta of several ranks,"], (
                "torch's own way"
            )


def _two_models() -> str:
    """Two models of one structure, each with rounds of its own; rank 1 takes a step of the first less."""
    first, second = _line(), _line()
    both = [torch.optim.SGD(net.parameters(), lr=1.0) for net in (first, second)]
    rounds = [enable_local_steps(net, sgd, sync_every=2) for net, sgd in zip((first, second), both, strict=True)]
    try:
        for t in range(4):
            for k, sgd in enumerate(both):
                if (k, t, dist.get_rank()) != (0, 1, 1):
                    _step(sgd, [1.0, -1.0])
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
    net = _line(value=8.0)
    local: Any = enable_local_steps(net, sgd := torch.optim.SGD(net.parameters(), lr=1.0), sync_every=1)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    if dist.get_rank() == 1:
        local._commit = fail
    with contextlib.suppress(KeyboardInterrupt):
        _step(sgd, [1.0, 1.0])
    return [net.weight.flatten().tolist(), local.is_open]


def test_a_failure_behind_the_vote_leaves_no_displacements(workers: Workers) -> None:
    assert workers.run(2, _interrupted) == [[[7.0, 7.0], False], [[8.0, 8.0], False]]


def _evaluated() -> Any:
    """Close a round in inference mode; the next one, outside of it, writes to its momenta."""
    net = _line(value=8.0)
    local = enable_local_steps(net, sgd := torch.optim.SGD(net.parameters(), lr=1.0), outer_momentum=0.5)
    for evaluates in (True, False):
        _step(sgd, [1.0, 1.0])
        with torch.inference_mode(evaluates):
            local.close_round()
    return net.weight.flatten().tolist()


def test_a_round_may_close_in_inference_mode(workers: Workers) -> None:
    """With steps of 1 and μ = 0.5 the first round goes 1.5 far, the second 1 + 0.5·1.5."""
    assert workers.run(2, _evaluated) == [[4.75, 4.75]] * 2


def _lie_of_another_shape() -> str:
    net = _line()
    adversaries = {1: lambda delta: np.ones(10, np.float32)}
    local = enable_local_steps(net, sgd := torch.optim.SGD(net.parameters(), lr=1.0), adversaries=adversaries)
    _step(sgd, [1.0, 1.0])
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
    net = _line()
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
