"""`enable_local_steps` in real processes: every round `==` `signsgd_core.LocalReference`, whatever takes the steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from signsgd_core.adversaries import Adversary, invert, send_nan, silent
from signsgd_core.network.traffic import local_steps
from signsgd_lightning import RanksDifferError, Signum, enable_local_steps
from tests.workers import Workers

from .rounds import Ends, Recorder, Round, ends_of, judge


def _muon(net: Any) -> list[Optimizer]:
    matrices = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(rest, lr=0.05)]


INNER: dict[str, Callable[[Any], list[Optimizer]]] = {
    "AdamW": lambda net: [torch.optim.AdamW(net.parameters(), lr=0.05)],
    "SGD": lambda net: [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)],
    "Signum": lambda net: [Signum(net.parameters(), lr=0.01)],
    "Muon and AdamW": _muon,
}


def net_of(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model with a buffer that training changes, one that it does not, and one that is no number."""
    torch.manual_seed(seed)
    net: Any = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(7, 3))
    net.register_buffer("table", torch.randn(4))
    return net.to(dtype)


def backward(net: Any, t: int, head: int = 2) -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))
    x = x.to(next(net.parameters()).dtype)
    loss: Any = (net[head](net[1](net[0](x))) - x[:, :3]).square().mean()
    loss.backward()


def train(
    inner: str, steps: int, options: dict[str, Any], dtype: torch.dtype = torch.float32, heads: tuple[int, ...] = (2,)
) -> tuple[Ends, list[Round], list[Any]]:
    """Train on every rank; return the start, the rounds and the buffers."""
    net = net_of(dist.get_rank(), dtype)
    optimizers = INNER[inner](net)
    recorder = Recorder(net, optimizers)
    local = enable_local_steps(net, *optimizers, **options)
    start = ends_of(net)
    for t in range(steps):
        net.zero_grad()
        backward(net, t, heads[dist.get_rank() % len(heads)])
        for optimizer in optimizers:
            optimizer.step()
        recorder.note_common(local)
    recorder.note_own()
    local.close_round()
    recorder.note_common(local)
    return start, recorder.rounds, [b.double().numpy() for b in net.buffers()]


CASES = [
    (2, "AdamW", 6, {"sync_every": 3}),
    (3, "Muon and AdamW", 5, {"sync_every": 2, "outer_lr": 1.25}),
    (4, "SGD", 4, {"sync_every": 1, "outer_momentum": 0.5, "outer_lr": 0.5}),
    (3, "Signum", 7, {"sync_every": 4, "outer_momentum": 0.875, "verify_every_n_rounds": 1}),
    (1, "AdamW", 4, {"sync_every": 2, "outer_momentum": 0.5}),
]


@pytest.mark.parametrize(("ranks", "inner", "steps", "options"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_rounds_are_those_of_the_reference(
    ranks: int, inner: str, steps: int, options: dict[str, Any], workers: Workers
) -> None:
    runs = workers.run(ranks, train, inner, steps, options)
    assert len(runs[0][1]) == -(-steps // options["sync_every"])
    judge(runs, **{name: options[name] for name in ("outer_lr", "outer_momentum") if name in options})
    for _, _, buffers in runs:
        for own, first in zip(buffers, runs[0][2], strict=True):
            np.testing.assert_array_equal(own, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, workers: Workers) -> None:
    import ml_dtypes

    runs = workers.run(2, train, "SGD", 4, {"sync_every": 2}, dtype)
    judge(runs, np.float64 if dtype is torch.float64 else ml_dtypes.bfloat16)


def test_a_rank_that_does_not_use_a_layer_abstains_there(workers: Workers) -> None:
    runs = workers.run(3, train, "SGD", 3, {"sync_every": 2}, torch.float32, (2, 2, 3))
    reference = judge(runs)
    assert all(verdict is not None for verdict in reference.verdicts[-4:]), "one rank is enough for its head"
    moved = [(end != start).any() for start, end in zip(runs[0][0], runs[0][1][0][1], strict=True)]
    assert all(moved[-4:])


@pytest.mark.parametrize("attack", [invert, silent, send_nan])
def test_adversaries(attack: Adversary, workers: Workers) -> None:
    runs = workers.run(3, train, "AdamW", 4, {"sync_every": 2, "adversaries": {1: attack}})
    judge(runs, adversaries={1: attack})


def _buffers(steps: int) -> tuple[list[Any], list[Any], int]:
    """Return the running mean before and after a round, and how many buffers were sent for it."""
    net = net_of(dist.get_rank())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    local = enable_local_steps(net, optimizer, sync_every=100)
    local.close_round()  # the first one compares parameters, too
    for t in range(steps):
        backward(net, t)
        optimizer.step()
    own = net[1].running_mean.numpy().copy()
    sent = local.vote.topology.everyone.sent_bytes
    local.close_round()
    sent = local.vote.topology.everyone.sent_bytes - sent
    return own, net[1].running_mean.numpy(), sent


def test_buffers_that_changed_are_averaged(workers: Workers) -> None:
    runs = workers.run(3, _buffers, 3)
    mean = (runs[0][0] + runs[1][0] + runs[2][0]) / np.float32(3)
    for _, after, _ in runs:
        np.testing.assert_array_equal(after, mean)
    tensors, buffers = 8, 3  # and the running mean and variance of seven, never the table
    d = 5 * 7 + 7 + 7 + 7 + (7 * 3 + 3)
    assert runs[0][2] == local_steps(d, 3, 1, tensors + buffers) + 2 * 2 * 7 * 4 + _present_bytes(tensors, 3)


def _present_bytes(tensors: int, workers: int) -> int:
    """One head is used by nobody, so that each rank says which tensors it moved."""
    return (workers - 1) * -(-tensors // 8)


def _uneven() -> tuple[int, Ends, Ends]:
    """Rank 1 has two batches more than the others."""
    net = net_of(dist.get_rank())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    local = enable_local_steps(net, optimizer, sync_every=3)
    for t in range(5 + 2 * (dist.get_rank() == 1)):
        backward(net, t)
        optimizer.step()
    local.close_round()
    buffers = [b.double().numpy() for b in net.buffers() if b.is_floating_point()]
    return local.outer.rounds, ends_of(net), buffers


def test_a_rank_that_has_more_batches_keeps_no_one_waiting(workers: Workers) -> None:
    runs = workers.run(3, _uneven, group_timeout=10)
    for rounds, ends, buffers in runs:
        assert rounds == 3  # one full one for all, rank 1's second with what the others have, and one that is early
        for own, first in zip([*ends, *buffers], [*runs[0][1], *runs[0][2]], strict=True):
            np.testing.assert_array_equal(own, first)


def _changes_between_rounds() -> tuple[Ends, Ends, float]:
    """Weights that are loaded between rounds are where the next one begins."""
    net = net_of(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    local = enable_local_steps(net, optimizer, sync_every=1)
    backward(net, 0)
    optimizer.step()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(2.0)
    optimizer.step()
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": 1.0})
    added.grad = torch.tensor([1.0, 1.0, -1.0])
    optimizer.step()
    return ends_of(net), [added.detach().numpy()], float(local.outer.rounds)


def test_weights_and_groups_may_change_between_rounds(workers: Workers) -> None:
    for ends, (added,), rounds in workers.run(2, _changes_between_rounds):
        assert rounds == 1  # nobody moved in the others
        assert all((x == 2.0).all() for x in ends)
        np.testing.assert_array_equal(added, [0, 0, 2])


def _disagree(kind: str) -> str:
    rank = dist.get_rank()
    net = nn.Linear(3 + (kind == "model" and rank), 1)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    if kind == "optimizer" and rank:
        optimizer = torch.optim.Adam(net.parameters())
    try:
        enable_local_steps(net, optimizer, sync_every=2 + (kind == "sync_every" and rank))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sync_every", "«sync_every=2, outer_lr=1.0, outer_momentum=0.0» where rank 1 has «sync_every=3"),
        ("model", r"shape \(1, 3\).* where rank 1 has .*shape \(1, 4\)"),
        ("optimizer", "«optimizers SGD» where rank 1 has «optimizers Adam»"),
    ],
)
def test_ranks_that_disagree_are_refused(kind: str, words: str, workers: Workers) -> None:
    for said in workers.run(2, _disagree, kind):
        with pytest.raises(RuntimeError, match=words):
            raise RuntimeError(said)


def _flip() -> str:
    """Rank 1's parameters change between rounds, and nobody else's."""
    net = net_of(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    enable_local_steps(net, optimizer, sync_every=1, verify_every_n_rounds=2)
    try:
        for t in range(4):
            backward(net, t)
            optimizer.step()
            if t == 0 and dist.get_rank() == 1:
                with torch.no_grad():
                    net[2].bias[0] += 1
    except RanksDifferError as error:
        return f"{error.step} {error.parameter} {error.ranks}"
    return ""


def test_verification_finds_ranks_that_differ(workers: Workers) -> None:
    assert workers.run(3, _flip) == ["1 2.bias [1]"] * 3


def test_what_cannot_work_is_refused() -> None:
    net = nn.Linear(2, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="sync_every must be a whole number of 1 or more, got 0"):
        enable_local_steps(net, sgd, sync_every=0)
    with pytest.raises(ValueError, match="verify_every_n_rounds must be a whole number of 0 or more, got -1"):
        enable_local_steps(net, sgd, verify_every_n_rounds=-1)
    with pytest.raises(ValueError, match="needs the optimizers that are to take steps, got none"):
        enable_local_steps(net)
    with pytest.raises(TypeError, match=r"optimizer 0 must be a torch.optim.Optimizer, got int"):
        enable_local_steps(net, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a model first, a torch.nn.Module, got SGD"):
        enable_local_steps(sgd, sgd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds parameters that are not the model's"):
        enable_local_steps(nn.Linear(2, 1), sgd)
    tied = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    tied[1].weight.data = tied[0].weight.data
    with pytest.raises(ValueError, match=r"parameters 0\.weight and 1\.weight share memory"):
        enable_local_steps(tied, torch.optim.SGD(tied.parameters(), lr=0.1))
    unmade = nn.Linear(2, 1, device="meta")
    with pytest.raises(ValueError, match=r"optimizer 0 has parameters without values, on the meta device: .* to_empty"):
        enable_local_steps(unmade, torch.optim.SGD(unmade.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="local steps need a process group"):
        enable_local_steps(net, sgd)
