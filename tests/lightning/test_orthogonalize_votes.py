"""Votes on polar factors over real processes: nodes, overlap, scalers, liars, monitors, other numbers of workers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import invert
from signsgd_core.network.traffic import majority_vote
from signsgd_lightning import Signum, enable_majority_vote, gather_state, scatter_state, signmuon_groups
from signsgd_lightning.vote.observers import VoteStatistics
from tests.votes import set_bucket_size
from tests.workers import Workers

from .models import Record, by_node, judge, record

LR, BETAS, TOLERANCE = 0.0625, (0.9, 0.95), 1e-3


class Net(nn.Module):
    """Two matrices of one shape, a tall one, a kernel, and vectors between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 4, 3)
        self.layers = nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.conv(x).flatten(1))).square().mean()  # type: ignore[no-any-return]


MATRICES = {0: 1, 1: 1, 2: 1, 3: 1}


def batch(t: int, rank: int | None = None) -> Tensor:
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(100 * t + rank))


def build(bucket_size: int = 256, vote: dict[str, Any] | None = None, **signum: Any) -> Any:
    model = DistributedDataParallel(Net())
    optimizer = Signum(signmuon_groups(model, LR, LR), **signum)
    enable_majority_vote(model, optimizer, **(vote or {}))
    set_bucket_size(optimizer, bucket_size)
    return model, optimizer


def train(steps: int = 5, clip: bool = False, **settings: Any) -> list[Record]:
    """Return the records of both groups: the matrices', the others'."""
    model, optimizer = build(**settings)
    records = record(optimizer)
    for t in range(steps):
        optimizer.zero_grad()
        model(batch(t)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return records


def _train(settings: dict[str, Any]) -> list[Record]:
    return train(**settings)


def judge_both(ranks: list[list[Record]], **settings: Any) -> None:
    matrices, others = zip(*ranks, strict=True)
    reference = judge(matrices, betas=BETAS, orthogonalize=MATRICES, tolerance=TOLERANCE, **settings)
    share = np.concatenate([u.ravel() for u in reference.undecided]).mean()
    print(f"undecided: {share:.2%}")
    assert share < 0.05
    judge(others, betas=BETAS, **settings)


@pytest.mark.parametrize("workers_", [2, 3])
@pytest.mark.parametrize("bucket_size", [1, 256, 1 << 22])
def test_buckets_of_any_size(workers_: int, bucket_size: int, workers: Workers) -> None:
    """A matrix that lies in several buckets has one polar factor."""
    judge_both(workers.run(workers_, _train, {"bucket_size": bucket_size}))


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_nodes(ranks_per_node: int, workers: Workers) -> None:
    ends = workers.run(4, _train, {"vote": {"vote_between": "nodes"}}, ranks_per_node=ranks_per_node)
    both = [by_node(group, ranks_per_node) for group in map(list, zip(*ends, strict=True))]
    judge_both(list(map(list, zip(*both, strict=True))))


def test_overlap_is_the_same_bits(workers: Workers) -> None:
    plain, overlapped = (workers.run(2, _train, {"vote": {"overlap": overlap}}) for overlap in (False, True))
    judge_both(overlapped)
    for a, b in zip(plain[0][0].end, overlapped[0][0].end, strict=True):
        np.testing.assert_array_equal(a, b)


def test_clipped_gradients(workers: Workers) -> None:
    judge_both(workers.run(2, _train, {"clip": True}))


@pytest.mark.parametrize("zeros", ["alternate", "abstain", "positive"])
def test_liars(zeros: str, workers: Workers) -> None:
    ends = workers.run(3, _train, {"vote": {"adversaries": {1: invert}}, "zeros": zeros})
    judge_both(ends, adversaries={1: invert}, zeros=zeros)


def _traffic() -> tuple[int, int]:
    model, optimizer = build(bucket_size=1 << 22)
    model(batch(0)).backward()
    optimizer.step()
    before = optimizer.vote.topology.workers.sent_bytes
    model(batch(1)).backward()
    optimizer.step()
    return optimizer.vote.topology.workers.sent_bytes - before, sum(p.numel() for p in model.parameters())


def test_one_bit_a_parameter_each_way(workers: Workers) -> None:
    for sent, length in workers.run(2, _traffic):
        assert sent == majority_vote(length, 2)  # as without orthogonalize


def _watch() -> list[float]:
    """What is not finite is in a matrix that lies in several buckets."""
    model, optimizer = build(bucket_size=1)
    statistics = VoteStatistics()
    optimizer.vote.observe(statistics)
    for t in range(2):
        optimizer.zero_grad()
        model(batch(t)).backward()
        model.module.layers[0].weight.grad.view(-1)[-2:] = torch.nan
        optimizer.step()
    return statistics.take(["coordinates", "disagreements", "flips", "ties", "nonfinite"])


def test_a_monitor_counts_gradients_as_they_came(workers: Workers) -> None:
    length = sum(p.numel() for p in Net().parameters())
    for coordinates, disagreements, flips, ties, nonfinite in workers.run(2, _watch):
        assert coordinates == 2 * length
        assert nonfinite == 4
        assert 0 < disagreements < length
        assert 0 < flips < length
        assert ties > 0


def _scaled() -> list[Record]:
    """A gradient scaler's factor is out of the polar factor, and an overflow costs a rank that entry alone."""
    model, optimizer = build()
    records = record(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale(model(batch(t))).backward()
        if t == 1 and dist.get_rank() == 0:
            next(model.parameters()).grad[0, 0, 0] = torch.inf
        scale = scaler.get_scale()
        scaler.step(optimizer)
        for one in records:
            one.gradients[-1] = [None if g is None else g / np.float32(scale) for g in one.gradients[-1]]
        scaler.update()
    return records


def test_a_gradient_scaler(workers: Workers) -> None:
    judge_both(workers.run(2, _scaled))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _step(model: nn.Module, optimizer: Signum, t: int) -> None:
    optimizer.zero_grad()
    model(batch(t)).backward()
    optimizer.step()


def _save(vote: dict[str, Any]) -> Any:
    """Return what is saved after three steps, and the weights after a fourth."""
    model, optimizer = build(vote=vote)
    for t in range(3):
        _step(model, optimizer, t)
    saved = copy.deepcopy(gather_state(optimizer)), _weights(model)
    _step(model, optimizer, 3)
    return *saved, _weights(model)


def _resume(state: Any, weights: Any, vote: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = build(vote=vote)
    model.load_state_dict(weights)
    scatter_state(optimizer, state)
    _step(model, optimizer, 3)
    return _weights(model)


@pytest.mark.parametrize("between", ["ranks", "nodes"])
def test_a_checkpoint_of_all_momenta(between: str, workers: Workers) -> None:
    vote = {"vote_between": between}
    state, weights, after = workers.run(4, _save, vote, ranks_per_node=2)[0]
    for resumed in workers.run(4, _resume, state, weights, vote, ranks_per_node=2):
        assert all(torch.equal(resumed[name], value) for name, value in after.items())


def test_another_number_of_workers_goes_on(workers: Workers) -> None:
    state, weights, _ = workers.run(2, _save, {})[0]
    first, *others = workers.run(3, _resume, state, weights, {})
    for resumed in others:
        assert all(torch.equal(resumed[name], value) for name, value in first.items())
