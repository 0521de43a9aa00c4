"""A user's own messages, other models, and wrappers beside a vote: apart from it, or refused by name."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote
from signsgd_lightning.vote.transport import Message
from tests.workers import Workers

from .models import judge, record
from .uses import SIGNUM, backward, error_of, net_of, voter


def _own_messages(size: int) -> list[float]:
    ddp, optimizer = voter()
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    got = []
    for tag in (0, 1, 4, 5):
        outgoing, incoming = torch.full((size,), float(10 * rank + tag)), torch.empty(size)
        works = [dist.isend(outgoing, other, tag=tag), dist.irecv(incoming, other, tag=tag)]
        backward(ddp, tag)
        optimizer.step()
        for work in works:
            work.wait()  # type: ignore[union-attr]
        got.append(float(incoming[0]))
    return got


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_a_users_own_messages_are_not_taken_for_ours(size: int, workers: Workers) -> None:
    assert workers.run(2, _own_messages, size) == [[10.0, 11.0, 14.0, 15.0], [0.0, 1.0, 4.0, 5.0]]


def test_tags_are_apart() -> None:
    tags = [message.tag for message in Message]
    assert len(set(tags)) == len(tags)
    assert min(tags) > 1000


def _twins() -> tuple[str, str]:
    """Two models of one structure; rank 0 skips a step of one of them."""
    (a, on_a), (b, on_b) = voter(), voter()
    for t in range(3):  # at the second, DDP's forward pass waits for all ranks
        for model, optimizer in ((a, on_a), (b, on_b)):
            backward(model, t)
            if (t, model, dist.get_rank()) == (2, a, 0):
                continue
            told = error_of(optimizer.step)
            if told != "no error":
                return told, f"{on_a.t} {on_b.t}"
    return "no error", ""


def test_votes_on_two_models_of_one_structure_never_meet(workers: Workers) -> None:
    for told, steps in workers.run(2, _twins, group_timeout=10):
        assert "rank 0 has «optimizer 0 of model" in told
        assert steps == "2 2"


def _wrapped_anew(kept: bool) -> tuple[str, str]:
    net = net_of()
    ddp, optimizer = voter(net)
    if not kept:
        del ddp
    again = DistributedDataParallel(net)

    def train() -> None:
        backward(again, 0)
        optimizer.step()

    told = error_of(train)
    enable_majority_vote(again, optimizer)
    return told, error_of(train)


@pytest.mark.parametrize("kept", [True, False])
def test_a_model_that_is_wrapped_anew_must_be_enabled_anew(kept: bool, workers: Workers) -> None:
    for told, then in workers.run(2, _wrapped_anew, kept):
        assert told.startswith(
            "RuntimeError: this DistributedDataParallel model averages gradients of parameters that vote: call enable"
            if kept
            else "RuntimeError: the model that this vote was enabled with is gone, and another wrapper may average"
        )
        assert then == "no error"


def _evaluated() -> str:
    """Another wrapper may be used where nothing is averaged."""
    net = net_of()
    ddp, optimizer = voter(net)
    other = DistributedDataParallel(net)
    with torch.no_grad():
        other(torch.ones(1, 4))
    backward(ddp, 0)
    return error_of(optimizer.step)


def test_another_wrapper_may_evaluate(workers: Workers) -> None:
    assert workers.run(2, _evaluated) == ["no error"] * 2


class _Wrapper(nn.Module):
    """As Fabric's: a module around the one that DDP has wrapped."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def _around(kind: str) -> Any:
    net = net_of()
    if kind == "inside":
        net[0] = DistributedDataParallel(net[0])
        return error_of(lambda: voter(net))
    if kind == "a part":
        net[0] = DistributedDataParallel(net[0])
        return error_of(lambda: enable_majority_vote(net, Signum(net.parameters())))
    if kind == "delayed":
        names = [("0.weight", net[0].weight)]
        ddp = DistributedDataParallel(net, delay_all_reduce_named_params=names, param_to_hook_all_reduce=net[0].weight)
        return error_of(lambda: enable_majority_vote(ddp, Signum(net.parameters())))
    wrapper = _Wrapper(DistributedDataParallel(net))
    optimizer = Signum(net.parameters(), **SIGNUM)
    enable_majority_vote(wrapper, optimizer)
    (one,) = record(optimizer)
    for t in range(2):
        backward(wrapper, t)
        optimizer.step()
    return one


def test_what_averages_beside_the_vote_is_refused(workers: Workers) -> None:
    for kind in ("inside", "a part"):
        for told in workers.run(2, _around, kind):
            assert told.startswith("ValueError: the model has DistributedDataParallel around a part of it, which would")
    for told in workers.run(2, _around, "delayed"):
        assert "delay_all_reduce_named_params averages past it: leave out" in told


def test_a_wrapper_around_ddp_is_seen_through(workers: Workers) -> None:
    judge(workers.run(2, _around, "wrapped"), betas=(0.5, 0.5))


def test_lookahead_and_its_like_may_step(workers: Workers) -> None:
    assert workers.run(2, _lookahead) == ["no error"] * 2


class _Lookahead(torch.optim.Optimizer):
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def _lookahead() -> str:
    ddp, optimizer = voter()
    outer = _Lookahead(optimizer)
    backward(ddp, 0)
    return error_of(outer.step)
