"""Local steps beside what exchanges gradients or parameters itself: refused on every rank, before anything changes."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signsgd_core.adversaries import invert
from signsgd_lightning import (
    Signum,
    enable_local_steps,
    enable_majority_vote,
    gather_state,
    scatter_state,
)
from tests.workers import Workers


def _net() -> nn.Module:
    torch.manual_seed(dist.get_rank())
    return nn.Linear(3, 2)


def _sgd(net: nn.Module) -> Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def _fsdp1(net: nn.Module) -> None:
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    shards = [p.detach().clone() for p in model.parameters()]
    try:
        enable_local_steps(model, _sgd(model))
    finally:
        assert all(map(torch.equal, shards, model.parameters()))


def _zero(net: nn.Module) -> None:
    enable_local_steps(net, ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1))


def _post_local(net: nn.Module) -> None:
    enable_local_steps(net, PostLocalSGDOptimizer(_sgd(net), PeriodicModelAverager(period=2, warmup_steps=0)))


def _inside_ddp(net: nn.Module) -> None:
    model = DistributedDataParallel(net)
    enable_local_steps(net, _sgd(net))
    model(torch.ones(1, 3))


def _ddp_later(net: nn.Module) -> None:
    enable_local_steps(net, _sgd(net))
    DistributedDataParallel(net)(torch.ones(1, 3))


def _group_of_others(net: nn.Module) -> None:
    others = [dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()]
    enable_local_steps(net, _sgd(net), process_group=others)


def _vote_of_others(net: nn.Module) -> None:
    others = [dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()]
    enable_majority_vote(net, Signum(net.parameters()), process_group=others)


def _no_function(net: nn.Module) -> None:
    enable_local_steps(net, _sgd(net), adversaries={0: invert, 1: "invert"})  # type: ignore[dict-item]


def _vote_too(net: nn.Module) -> None:
    optimizer = Signum(net.parameters())
    enable_local_steps(net, optimizer)
    enable_majority_vote(net, optimizer)


def _mean(net: nn.Module) -> Signum:
    """Return an optimizer that has a state of two ranks, and does not vote yet."""
    voter, later = Signum(net.parameters()), Signum(net.parameters())
    enable_majority_vote(net, voter)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    voter.step()
    box = [gather_state(voter)]
    dist.broadcast_object_list(box)
    scatter_state(later, box[0])
    return later


def _loaded_before_the_vote(net: nn.Module) -> None:
    enable_majority_vote(net, _mean(net))


def _loaded_before_local_steps(net: nn.Module) -> None:
    enable_local_steps(net, _mean(net))


def _sgd_loaded_before(net: nn.Module) -> None:
    optimizer = _sgd(net)
    enable_local_steps(net, optimizer)
    scatter_state(_sgd(net), gather_state(optimizer))


def _adamws_state(net: nn.Module) -> None:
    optimizer = _sgd(net)
    enable_local_steps(net, optimizer)
    try:
        scatter_state(optimizer, torch.optim.AdamW(_net().parameters(), lr=0.3).state_dict())
    finally:
        assert optimizer.param_groups[0]["lr"] == 0.1


def _one_twice(net: nn.Module) -> None:
    optimizer = _sgd(net)
    enable_local_steps(net, optimizer, optimizer)


def _one_votes_twice(net: nn.Module) -> None:
    optimizer = Signum(net.parameters())
    enable_majority_vote(net, optimizer, optimizer)


def _outer_momentum_of_another(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    enable_local_steps(net, optimizer, outer_momentum=0.5)
    outer = {"rounds": 7, "outer_momenta": [torch.ones(3, 3), None]}
    saved = {"momentum_buffer": torch.ones(2, 3)}
    try:
        scatter_state(optimizer, {**optimizer.state_dict(), "state": {0: saved}, "local_steps": outer})
    finally:
        assert not optimizer.state


def _weights(net: nn.Module) -> None:
    optimizer = _sgd(net)
    enable_local_steps(net, optimizer)
    scatter_state(optimizer, net.state_dict())


MISTAKES: dict[Callable[[nn.Module], None], str] = {
    _fsdp1: "ValueError: the model is wrapped in FullyShardedDataParallel, .*models that are whole on every rank",
    _zero: "TypeError: optimizer 0 is a ZeroRedundancyOptimizer, which exchanges parameters itself: pass an ordinary",
    _post_local: "TypeError: optimizer 0 is a PostLocalSGDOptimizer, which exchanges parameters itself",
    _inside_ddp: "RuntimeError: this DistributedDataParallel model averages .* local steps: train through the model",
    _ddp_later: "RuntimeError: this DistributedDataParallel model averages .* or call LocalSteps.end first",
    _group_of_others: r"ValueError: local steps need a torch.distributed.ProcessGroup that this rank is in, got -?\d+",
    _vote_of_others: r"ValueError: a majority vote needs a torch.distributed.ProcessGroup that this rank is in, got",
    _no_function: "TypeError: adversaries must be functions, .* got 'invert' of rank 1",
    _vote_too: "ValueError: optimizer 0 takes local steps: call LocalSteps.end, or make a new one that votes",
    _loaded_before_the_vote: "ValueError: optimizer 0 got the mean of .* call enable_majority_vote, then scatter_state",
    _loaded_before_local_steps: "ValueError: optimizer 0 got the mean of .* enable_local_steps, then scatter_state",
    _adamws_state: "ValueError: this is the state of Adam or AdamW, not of SGD, which needs dampening, momentum",
    _one_twice: "ValueError: got 2 optimizers of which two are the same: pass each once",
    _one_votes_twice: "ValueError: got 2 optimizers of which two are the same: pass each once",
    _outer_momentum_of_another: r"ValueError: the outer momenta must fit 2 parameters, got 2 of .* \[\(3, 3\), None\]",
    _weights: "ValueError: this is no state of SGD: it has no 'state', only 'weight', 'bias'",
    _sgd_loaded_before: r"TypeError: SGD takes no local steps, .* call enable_local_steps\(model, optimizer\) before",
}


def _said(name: str) -> str:
    try:
        globals()[name](_net())
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__[1:])
def test_mistakes(mistake: Callable[[nn.Module], None], workers: Workers) -> None:
    for said in workers.run(2, _said, mistake.__name__):
        assert re.match(MISTAKES[mistake], said), said


def _ends() -> list[Tensor]:
    """Another wrapper may have the model again once its local steps have ended."""
    net = _net()
    enable_local_steps(net, _sgd(net)).end()
    DistributedDataParallel(net)(torch.ones(1, 3)).sum().backward()
    return [p.detach().clone() for p in net.parameters()]


def test_local_steps_that_ended_refuse_nothing(workers: Workers) -> None:
    first, second = workers.run(2, _ends)
    assert all(map(torch.equal, first, second))
