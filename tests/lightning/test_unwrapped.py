"""`enable_majority_vote` on a model that nothing wraps: one broadcast, then every rank has its own gradients."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from signsgd_lightning import Signum, enable_local_steps, enable_majority_vote, gather_state
from tests.workers import Workers

from .models import Record, by_node, judge, record

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "weight_decay": 0.5}


def _net() -> Any:
    """Two heads, of which a step may leave one out, and buffers."""
    torch.manual_seed(1 + dist.get_rank())
    net: Any = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1), nn.Linear(6, 1))
    with torch.no_grad():
        net[1].running_mean.normal_()
    return net


def _loss(net: Any, t: int, head: int) -> Any:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))
    return (net[head](net[1](net[0](x))) - x.sum(1, keepdim=True)).square().mean()


def _train(options: dict[str, Any], heads: list[int]) -> tuple[list[float], list[Record]]:
    net = _net()
    optimizer = Signum(net.parameters(), lr=0.0625, **SIGNUM)
    enable_majority_vote(net, optimizer, **options)
    buffers = [float(b.float().sum()) for b in net.buffers()]
    records = record(optimizer)
    for t, head in enumerate(heads):
        optimizer.zero_grad()
        if options.get("overlap"):  # every parameter must have a gradient, from one backward pass
            (_loss(net, t, head) + _loss(net, t, 3)).backward()
        else:
            _loss(net, t + 9, head).backward()  # gradients accumulate without no_sync
            _loss(net, t, head).backward()
        optimizer.step()
    return buffers, records


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("heads", [[2, 2, 2], [2, 3, 2, 3]], ids=["one head", "heads by turns"])
def test_a_plain_loop(heads: list[int], ranks: int, workers: Workers) -> None:
    runs = workers.run(ranks, _train, {}, heads)
    judge([records[0] for _, records in runs], **SIGNUM)
    assert all(buffers == runs[0][0] for buffers, _ in runs), "buffers start from rank 0's"


def test_overlap(workers: Workers) -> None:
    runs = workers.run(3, _train, {"overlap": True}, [2, 2, 2])
    judge([records[0] for _, records in runs], **SIGNUM)


def test_nodes(workers: Workers) -> None:
    runs = workers.run(4, _train, {"vote_between": "nodes"}, [2, 2, 2], ranks_per_node=2)
    judge(by_node([records[0] for _, records in runs], 2), **SIGNUM)


def _in_a_group() -> list[Record]:
    """Ranks 1 and 2 of three vote; rank 0 is elsewhere."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        dist.barrier()  # with it the store would leave, by which the others find each other
        return []
    net = _net()
    optimizer = Signum(net.parameters(), lr=0.0625, **SIGNUM)
    enable_majority_vote(net, optimizer, process_group=group)
    records = record(optimizer)
    for t in range(3):
        optimizer.zero_grad()
        _loss(net, t, 2).backward()
        optimizer.step()
    gather_state(optimizer)
    dist.barrier()
    return records


def test_a_process_group_of_some_ranks(workers: Workers) -> None:
    _, first, second = workers.run(3, _in_a_group)
    judge([first[0], second[0]], **SIGNUM)


def _alone() -> tuple[bool, list[Record]]:
    net = _net()
    optimizer = Signum(net.parameters(), lr=0.0625, **SIGNUM)
    enable_majority_vote(net, optimizer)
    records = record(optimizer)
    _loss(net, 0, 2).backward()
    optimizer.step()
    return optimizer.vote is None, records


def test_one_rank(workers: Workers) -> None:
    ((alone, records),) = workers.run(1, _alone)
    assert alone
    judge(records, **SIGNUM)


class _Strided(nn.Module):
    """Parameters and buffers whose memory is not row-major, or of dtypes that Gloo does not know."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        kernel = torch.randn(3, 2, 2, 2)
        self.kernel = nn.Parameter(kernel.to(memory_format=torch.channels_last) if rank else kernel)
        self.register_buffer("columns", torch.randn(2, 8)[:, :4])
        self.register_buffer("rows", (torch.arange(40) + rank).expand(40, 40))
        self.register_buffer("scalar", torch.randn(()))
        self.register_buffer("small", torch.arange(4, dtype=torch.int16) + rank)
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 3))


def _strided() -> tuple[list[Tensor], list[Tensor]]:
    voted, alone = _Strided(dist.get_rank()), _Strided(dist.get_rank())
    enable_majority_vote(voted, Signum(voted.parameters()))
    local = enable_local_steps(alone, torch.optim.SGD(alone.parameters(), lr=0.1))
    began, now = local.model_state(), alone.state_dict()
    assert all(torch.equal(began[name], now[name]) for name in ("kernel", "columns", "scalar"))
    return tuple([t.detach() for t in (*m.parameters(), *m.buffers())] for m in (voted, alone))  # type: ignore[return-value]


def test_strides_do_not_matter(workers: Workers) -> None:
    own = _Strided(0)
    for starts in workers.run(2, _strided):
        for tensors in starts:
            assert all(map(torch.equal, tensors, (*own.parameters(), *own.buffers())))


def _only_the_empty() -> list[float]:
    """One of the parameters that have gradients has coordinates; then none."""
    net = nn.Module()
    net.full, net.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(0))
    optimizer = Signum(net.parameters(), lr=0.5)
    enable_majority_vote(net, optimizer)
    for full in (torch.ones(2), None):
        net.full.grad, net.empty.grad = full, torch.zeros(0)
        optimizer.step()
    return net.full.tolist()


def test_only_an_empty_parameter_has_a_gradient(workers: Workers) -> None:
    assert workers.run(2, _only_the_empty) == [[0.5, 0.5]] * 2


def _refused() -> tuple[list[str], bool, list[float]]:
    """The ranks have other settings, and train without a vote then."""
    rank, net = dist.get_rank(), nn.Linear(2, 1, bias=False)
    net.weight.data.fill_(float(rank))
    optimizer = Signum(net.parameters(), lr=0.1 + rank)
    with pytest.raises(RuntimeError) as of_votes:
        enable_majority_vote(net, optimizer)
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    with pytest.raises(RuntimeError) as of_rounds:
        enable_local_steps(net, sgd, sync_every=1 + rank)
    net.weight.grad = torch.ones(1, 2)
    sgd.step()
    return [str(error.value) for error in (of_votes, of_rounds)], optimizer.vote is None, net.weight.flatten().tolist()


def test_a_refusal_changes_nothing(workers: Workers) -> None:
    for rank, ((of_votes, of_rounds), alone, weights) in enumerate(workers.run(2, _refused)):
        assert "rank 0 has «group 0: lr=0.1» where rank 1 has «group 0: lr=1.1»" in of_votes
        assert "sync_every=1" in of_rounds
        assert (alone, weights) == (True, [rank - 1.0] * 2)


def _copied() -> list[float]:
    """A copy of an optimizer that votes is enabled among one rank."""
    net = nn.Linear(2, 1, bias=False)
    optimizer = Signum(net.parameters(), lr=0.5)
    enable_majority_vote(net, optimizer)
    net, optimizer = copy.deepcopy((net, optimizer))
    groups = [dist.new_group([rank]) for rank in range(2)]
    enable_majority_vote(net, optimizer, process_group=groups[dist.get_rank()])
    net.weight.data.fill_(1.0)
    net.weight.grad = torch.ones(1, 2)
    optimizer.step()
    return net.weight.flatten().tolist()


def test_a_copy_of_a_voter_among_one_rank(workers: Workers) -> None:
    assert workers.run(2, _copied) == [[0.5, 0.5]] * 2


def _of_another_shape() -> str:
    net = nn.Linear(4 + dist.get_rank(), 1)
    try:
        enable_majority_vote(net, Signum(net.parameters()))
    except RuntimeError as error:
        return str(error)
    return ""


def test_models_that_differ_are_refused_before_the_broadcast(workers: Workers) -> None:
    for message in workers.run(2, _of_another_shape):
        assert "rank 0 has «weight: shape (1, 4)" in message
        assert "where rank 1 has «weight: shape (1, 5)" in message


def test_without_a_process_group() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match=r"needs a process group: call torch\.distributed\.init_process_group first"):
        enable_majority_vote(net, Signum(net.parameters()))


def test_no_module() -> None:
    x = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=r"takes a model first, a torch\.nn\.Module, got list"):
        enable_majority_vote([x], Signum([x]))  # type: ignore[arg-type]
