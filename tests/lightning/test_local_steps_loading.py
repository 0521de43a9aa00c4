"""A state is loaded under local steps: within a round, into other groups, from a vote and back."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from signsgd_lightning import Signum, enable_local_steps, enable_majority_vote, gather_state, scatter_state
from tests.lightning.two_weights import Behind, line, step
from tests.workers import Workers


def _resumed() -> list[list[float]]:
    """Add a group to the first of two optimizers, and resume with all groups there from the start."""
    nets = [line() for _ in range(3)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=1.0) for net in nets[:2]]
    local = enable_local_steps(nn.ModuleList(nets), *optimizers, sync_every=1, outer_momentum=0.5)
    optimizers[0].add_param_group({"params": list(nets[2].parameters())})
    for k, net in enumerate(nets, start=1):
        net.weight.grad = torch.full((1, 2), float(k))
    for optimizer in optimizers:
        optimizer.step()
    saved = local.state_dict()
    again = [torch.optim.SGD([*nets[0].parameters(), *nets[2].parameters()], lr=1.0), optimizers[1]]
    local.end()
    later = enable_local_steps(nn.ModuleList(nets), *again, sync_every=1, outer_momentum=0.5)
    later.load_state_dict(saved)
    return [
        later.outer.optimizer.state[later._anchors[net.weight]]["outer_momentum"].flatten().tolist() for net in nets
    ]


def test_outer_momenta_are_saved_in_the_order_of_groups(workers: Workers) -> None:
    """The verdict of a step of k is k, whenever the group was added."""
    assert workers.run(2, _resumed) == [[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]] * 2


def _loaded() -> list[list[float]]:
    """Load what was saved at the start into the middle of the third round; then after it, optimizer first."""
    net = line()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    local = enable_local_steps(net, optimizer, sync_every=3)
    holder: Any = Behind(optimizer)
    box = [{"net": {"weight": net.weight.detach().clone()}, "optimizer": gather_state(holder)}]
    dist.broadcast_object_list(box)
    step(optimizer, [1.0, 2.0])
    local.close_round()
    ends: list[list[float]] = [[box[0]["optimizer"]["local_steps"]["rounds"]]]  # seen through what holds it
    for first in (0, 1):
        step(optimizer, [3.0 + dist.get_rank(), 3.0])
        if first == 0:
            net.load_state_dict(box[0]["net"])
        scatter_state(optimizer, box[0]["optimizer"])
        if first == 1:
            net.load_state_dict(box[0]["net"])
        ends.append([float(local.steps), float(local.is_open), *net.weight.tolist()[0]])
        local.close_round()
        ends.append(net.weight.tolist()[0])
    step(optimizer, [1.0, -1.0])
    local.close_round()
    return [*ends, net.weight.tolist()[0]]


def test_a_state_that_is_loaded_ends_the_open_round(workers: Workers) -> None:
    for ends in workers.run(2, _loaded):
        assert ends == [[0], *[[0.0, 0.0, 1.0, 1.0], [1.0, 1.0]] * 2, [0.5, 1.5]]


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
    net[0].grad = torch.tensor([1.0, -3.0]) * (1 + dist.get_rank())
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
