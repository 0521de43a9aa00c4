"""`MajorityVoteStrategy(vote_between="nodes")`: a Trainer on nodes of two ranks, each node one worker."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.amp import GradScaler

from signsgd_core import Reference, Zeros
from signsgd_core.adversaries import ADVERSARIES
from signsgd_core.network.traffic import majority_vote
from signsgd_core.wire import HEADER_BYTES
from signsgd_lightning import MajorityVoteStrategy, RanksDifferError, VoteMonitor
from tests.faults.test_verify import FlipBit
from tests.votes import SIZES, STEPS, expected_figures, given_gradients
from tests.workers import Workers

from .models import Array, Given, Net, Record, array, by_node, judge, trainer
from .test_callbacks import Notes

LOCAL = 2
"""Ranks per node."""


def node_trainer(strategy: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A Trainer on all ranks of the process group, `LOCAL` a node."""
    return trainer(
        devices=LOCAL,
        num_nodes=dist.get_world_size() // LOCAL,
        strategy=MajorityVoteStrategy(vote_between="nodes", **(strategy or {})),
        **settings,
    )


def means(given: Sequence[Sequence[Sequence[Array | None]]]) -> list[list[list[Array | None]]]:
    """Return `given[step][node][tensor]`: the mean of what its ranks have, where any has something."""

    def mean(gradients: Sequence[Array | None]) -> Array | None:
        own = [np.where(np.isfinite(g), g, 0) for g in gradients if g is not None]
        return np.asarray(sum(own) / np.float32(LOCAL), np.float32) if own else None

    return [
        [
            [mean(tensor) for tensor in zip(*step[first : first + LOCAL], strict=True)]
            for first in range(0, len(step), LOCAL)
        ]
        for step in given
    ]


def demand(ranks: Sequence[Sequence[Array]], given: Any, **settings: Any) -> None:
    """Demand every rank's last parameters to be what the specification makes of the nodes' gradients."""
    nodes = means(given)
    shapes = [next(g.shape for step in nodes for node in step if (g := node[k]) is not None) for k in range(len(SIZES))]
    reference = Reference([np.ones(shape, np.float32) for shape in shapes], len(nodes[0]), 0.25, **settings)
    for step in nodes:
        reference.step(step)
    for parameters in ranks:
        for ours, expected in zip(parameters, reference.parameters, strict=True):
            np.testing.assert_array_equal(ours, expected, strict=True)


def _fit(settings: dict[str, Any]) -> list[Record]:
    model = Net(betas=(0.5, 0.75), weight_decay=0.25, samples=48)
    node_trainer(**settings).fit(model)
    return model.records


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (4, {}),
        (6, {"max_epochs": 2}),
        (4, {"gradient_clip_val": 0.25}),
        (4, {"precision": "bf16-mixed"}),
        (4, {"precision": "bf16-true"}),
    ],
)
def test_a_trainers_votes_are_the_references(ranks: int, settings: dict[str, Any], workers: Workers) -> None:
    runs = workers.run(ranks, _fit, settings, ranks_per_node=LOCAL)
    judge(by_node([run[0] for run in runs], LOCAL), betas=(0.5, 0.75), weight_decay=0.25)


def _train(given: Any, strategy: dict[str, Any], settings: dict[str, Any], signum: dict[str, Any]) -> list[Array]:
    model = Given(given, **signum)
    node_trainer(strategy, **settings).fit(model)
    return [array(x) for x in model.x]


def test_accumulation(workers: Workers) -> None:
    wild: Any = given_gradients(4)
    given = [[[np.where(np.isfinite(g), g, 0) for g in rank] for rank in step] for step in wild]
    signum = {"betas": (0.5, 0.5)}
    ends = workers.run(4, _train, given, {}, {"accumulate_grad_batches": 2}, signum, ranks_per_node=LOCAL)
    pairs = zip(given[::2], given[1::2], strict=True)
    summed: Any = [
        [[(a + b) / 2 for a, b in zip(r, q, strict=True)] for r, q in zip(s, t, strict=True)] for s, t in pairs
    ]
    demand(ends, summed, **signum)


@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
def test_parameters_that_ranks_or_nodes_do_not_use(zeros: Zeros, workers: Workers) -> None:
    given = given_gradients(4)
    given[1][1][0] = given[2][0][1] = given[2][1][1] = None  # one rank of node 0; both of them
    for rank in given[3]:
        rank[2] = None
    signum = {"betas": (0.5, 0.5), "zeros": zeros}
    ends = workers.run(4, _train, given, {"find_unused_parameters": True}, {}, signum, ranks_per_node=LOCAL)
    demand(ends, given, **signum)


def _overflow(given: Any, signum: dict[str, Any]) -> list[Array]:
    scaler = GradScaler("cpu", init_scale=2.0 ** (8 + dist.get_rank()), growth_interval=2)
    return _train(given, {}, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}, signum)


def test_every_rank_has_its_own_loss_scale(workers: Workers) -> None:
    """The given gradients are not finite here and there, so that scales differ more and more."""
    signum = {"betas": (0.5, 0.5)}
    demand(workers.run(4, _overflow, given_gradients(4), signum, ranks_per_node=LOCAL), given_gradients(4), **signum)


def _observe(given: Any, zeros: Zeros) -> list[Any]:
    notes = Notes()
    run = node_trainer(callbacks=[VoteMonitor()], logger=notes, log_every_n_steps=2)
    run.fit(Given(given, betas=(0.0, 0.0), zeros=zeros))
    return [row for _, row in notes.rows if "vote/ties" in row]


@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
def test_monitor_shows_nodes(zeros: Zeros, workers: Workers) -> None:
    """Its figures are of the nodes' votes; entries that are not finite are counted on all ranks."""
    given: Any = given_gradients(6)
    nodes = 3
    shards = [-(-sum(SIZES) // LOCAL), sum(SIZES) // LOCAL]
    ballots = sum(majority_vote(shard, nodes, zeros) - HEADER_BYTES * (nodes - 1) for shard in shards)
    headers = HEADER_BYTES * LOCAL * LOCAL * (nodes - 1)
    wild = [sum(int((~np.isfinite(g)).sum()) for rank in step for g in rank) for step in given]
    for rows in workers.run(6, _observe, given, zeros, ranks_per_node=LOCAL):
        for k, (row, expected) in enumerate(zip(rows, expected_figures(means(given), zeros, 2), strict=True)):
            assert row.pop("vote/bytes_per_step") == ballots + headers + (0 if k else headers / 2)  # weights, once
            assert 0 < row.pop("vote/exchange_seconds") < 5
            assert row == pytest.approx({**expected, "vote/nonfinite": sum(wild[: 2 * k + 2])}, rel=1e-12, abs=1e-12)


def _lie(given: Any, names: dict[int, str]) -> list[Array]:
    adversaries = {node: ADVERSARIES[name](node) for node, name in names.items()}
    return _train(given, {"adversaries": adversaries}, {}, {"betas": (0.5, 0.5)})


@pytest.mark.parametrize(
    "names", [{1: "invert"}, {0: "random", 2: "constant"}, {2: "silent"}, {1: "nan", 0: "collude"}]
)
def test_nodes_that_lie(names: dict[int, str], workers: Workers) -> None:
    given = given_gradients(6)
    adversaries = {node: ADVERSARIES[name](node) for node, name in names.items()}
    ends = workers.run(6, _lie, given, names, ranks_per_node=LOCAL)
    demand(ends, given, betas=(0.5, 0.5), adversaries=adversaries)


def _flip(flips: list[Callback]) -> Any:
    run = node_trainer({"verify_every_n_steps": 2}, callbacks=flips, max_epochs=2)
    try:
        run.fit(Net(samples=4 * 4 * STEPS // 2, verdict_momentum=0.5))
    except RanksDifferError as error:
        return error.ranks, error.step, error.parameter
    return run.global_step


@pytest.mark.parametrize("momentum", [False, True])
def test_a_rank_that_differs_is_named(momentum: bool, workers: Workers) -> None:
    run = partial(workers.run, 4, _flip, ranks_per_node=LOCAL)
    assert run([FlipBit(3, 2, momentum)]) == [([3], 3, "net.2.weight")] * 4
    assert run([]) == [STEPS] * 4
