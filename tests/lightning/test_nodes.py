"""The vote between nodes in plain DDP scripts: one worker a node, with the mean of its ranks' gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.network.traffic import majority_vote
from signsgd_core.wire import HEADER_BYTES
from signsgd_lightning import Signum, enable_majority_vote
from signsgd_lightning.vote.topology import Nodes
from tests.votes import set_bucket_size
from tests.workers import Workers

from .models import Record, by_node, judge, record

LR = 0.25
SHAPES = ((5, 3), (), (66,), (2, 2, 7), (0, 2), (1,))
"""111 coordinates: shards of 56 and 55, or of 37, whose edges lie inside tensors."""

SETTINGS: dict[str, dict[str, Any]] = {
    "signSGD": {"betas": (0.0, 0.0)},
    "Signum": {"betas": (0.5, 0.5)},
    "Lion": {"betas": (0.75, 0.5), "weight_decay": 0.5},
    "verdict momentum": {"betas": (0.0, 0.0), "verdict_momentum": 0.75, "weight_decay": 0.25},
    "both momenta": {"betas": (0.5, 0.25), "verdict_momentum": 0.5},
    "warmup": {"betas": (0.5, 0.5), "warmup_steps": 3},
    "abstain": {"betas": (0.5, 0.5), "zeros": "abstain", "weight_decay": 0.5},
    "positive": {"betas": (0.5, 0.5), "zeros": "positive"},
}


class Given(nn.Module):
    """Parameters that get the gradients they are given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.ones(shape, dtype=dtype) for shape in SHAPES])

    def forward(self) -> Tensor:
        return torch.stack([x.sum() for x in self.x]).sum()


def eighths(t: int, shape: tuple[int, ...], k: int) -> Tensor:
    """This rank's gradient of tensor `k` at step `t`, a third of it zero."""
    random = torch.Generator().manual_seed(1000 * t + 10 * k + dist.get_rank())
    return torch.randint(-1, 2, shape, generator=random) * torch.randint(1, 9, shape, generator=random) / 8


def build(dtype: torch.dtype = torch.float32, bucket_size: int | None = None, **signum: Any) -> Any:
    model = DistributedDataParallel(Given(dtype))
    optimizer = Signum(model.parameters(), lr=LR, **signum)
    enable_majority_vote(model, optimizer, vote_between="nodes")
    if bucket_size is not None:
        set_bucket_size(optimizer, bucket_size)
    return model, optimizer


def train(
    steps: int = 6,
    lacking: Callable[[int, int, int], bool] | None = None,
    wild: bool = False,
    dtype: torch.dtype = torch.float32,
    bucket_size: int | None = None,
    **signum: Any,
) -> tuple[Record, dict[int, np.ndarray], int]:
    """Return the record, this rank's momenta by parameter, and the bytes that it sent to its counterparts."""
    model, optimizer = build(dtype, bucket_size, **signum)
    (one,) = record(optimizer)
    for t in range(steps):
        for k, p in enumerate(model.parameters()):
            p.grad = None if lacking and lacking(t, k, dist.get_rank()) else eighths(t, p.shape, k).to(dtype)
            if wild and p.grad is not None and p.numel() > 2:
                p.grad.view(-1)[(t + dist.get_rank()) % 3] = (torch.nan, torch.inf, -torch.inf)[t % 3]
        optimizer.step()
    keys = {p: k for k, p in enumerate(model.parameters())}
    momenta = {keys[p]: s["momentum"].float().numpy().copy() for p, s in optimizer.state.items() if "momentum" in s}
    return one, momenta, optimizer.vote.topology.workers.sent_bytes


def run(workers: Workers, world_size: int, ranks_per_node: int, **settings: Any) -> list[Any]:
    return workers.run(world_size, _train, settings, ranks_per_node=ranks_per_node)


def _train(settings: dict[str, Any]) -> Any:
    return train(**settings)


def _train_all() -> list[Any]:
    return [train(**settings) for settings in SETTINGS.values()]


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(4, 2), pytest.param(6, 2, marks=pytest.mark.nightly), (6, 3)])
def test_every_vote_is_the_references(ranks: int, ranks_per_node: int, workers: Workers) -> None:
    runs = workers.run(ranks, _train_all, ranks_per_node=ranks_per_node)
    for settings, *ends in zip(SETTINGS.values(), *runs, strict=True):
        reference = judge(by_node([one for one, _, _ in ends], ranks_per_node), **settings)
        for rank, (_, momenta, _) in enumerate(ends):
            node, place = divmod(rank, ranks_per_node)
            whole = np.concatenate([m.reshape(-1) for m in reference.momenta[node]])
            share = -(-len(whole) // ranks_per_node)
            assert bool(momenta) == (settings["betas"] != (0.0, 0.0))
            if momenta:
                ours = np.concatenate([momenta[k] for k in sorted(momenta)])
                np.testing.assert_array_equal(ours, whole[place * share : (place + 1) * share])


@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
def test_blocks_of_any_size(zeros: str, workers: Workers) -> None:
    settings = {"betas": (0.5, 0.5), "zeros": zeros, "bucket_size": 8}
    ends = run(workers, 4, 2, **settings)
    judge(by_node([one for one, _, _ in ends], 2), betas=(0.5, 0.5), zeros=zeros)


def test_half_precision_parameters(workers: Workers) -> None:
    ends = run(workers, 4, 2, betas=(0.5, 0.5), dtype=torch.bfloat16)
    judge(by_node([one for one, _, _ in ends], 2), betas=(0.5, 0.5))


def test_half_precision_momentum(workers: Workers) -> None:
    """Three steps of a half from sixteenths need 7 of a bfloat16's 8 bits."""
    ends = run(workers, 4, 2, betas=(0.5, 0.5), momentum_dtype=torch.bfloat16, steps=3)
    reference = judge(by_node([one for one, _, _ in ends], 2), betas=(0.5, 0.5))
    for node in (0, 1):
        ours = [m for _, momenta, _ in ends[2 * node : 2 * node + 2] for _, m in sorted(momenta.items())]
        np.testing.assert_array_equal(np.concatenate(ours), np.concatenate([*map(np.ravel, reference.momenta[node])]))


def _lacking(t: int, k: int, rank: int) -> bool:
    """Tensor 2: rank 1 at step 0, node 0 at step 1, all at step 2. Tensor 0: all at all odd steps."""
    who = {0: [1], 1: [0, 1], 2: [0, 1, 2, 3]}
    return (k == 2 and rank in who.get(t, [])) or (k == 0 and t % 2 == 1)


@pytest.mark.parametrize("betas", [(0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("zeros", ["alternate", "abstain", "positive"])
def test_gradients_that_ranks_nodes_or_all_lack(zeros: str, betas: tuple[float, float], workers: Workers) -> None:
    ends = run(workers, 4, 2, betas=betas, zeros=zeros, lacking=_lacking, weight_decay=0.5)
    nodes = by_node([one for one, _, _ in ends], 2)
    assert nodes[0].gradients[0][2] is not None
    assert nodes[0].gradients[1][2] is None
    judge(nodes, betas=betas, zeros=zeros, weight_decay=0.5)


def test_an_entry_that_is_not_finite_costs_its_rank_alone(workers: Workers) -> None:
    ends = run(workers, 4, 2, betas=(0.5, 0.5), wild=True)
    judge(by_node([one for one, _, _ in ends], 2), betas=(0.5, 0.5))


def test_one_node_is_one_worker(workers: Workers) -> None:
    ends = run(workers, 2, 2, betas=(0.5, 0.5))
    judge(by_node([one for one, _, _ in ends], 2), betas=(0.5, 0.5))
    assert [sent for _, _, sent in ends] == [0, 0]


def test_nodes_of_one_rank_are_ranks(workers: Workers) -> None:
    ends = run(workers, 3, 1, betas=(0.5, 0.5))
    judge([one for one, _, _ in ends], betas=(0.5, 0.5))


@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
def test_bytes_between_nodes_are_one_workers(zeros: Any, workers: Workers) -> None:
    """Each rank sends the formula's bytes for its shard; its header goes to all ranks."""
    for place, (_, _, sent) in enumerate(run(workers, 4, 2, zeros=zeros, steps=3)):
        shard = 56 - place % 2
        assert sent == 3 * (majority_vote(shard, 2, zeros) - HEADER_BYTES)


def _held() -> tuple[bool, list[int]]:
    _, optimizer = build()
    for k, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = eighths(0, p.shape, k)
    optimizer.step()
    sizes = [state["momentum"].numel() for state in optimizer.state.values() if "momentum" in state]
    return isinstance(optimizer.vote.topology, Nodes), sizes


def test_a_rank_holds_the_momentum_of_its_shard_alone(workers: Workers) -> None:
    for rank, (between_nodes, sizes) in enumerate(workers.run(4, _held, ranks_per_node=2)):
        assert between_nodes
        assert sum(sizes) == (56, 55)[rank % 2]
