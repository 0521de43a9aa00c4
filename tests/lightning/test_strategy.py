"""`MajorityVoteStrategy` through a real Trainer over real processes: its votes equal `Reference`, bit for bit."""

from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import signsgd_lightning
from signsgd_lightning import MajorityVoteStrategy, ShardedMajorityVoteStrategy
from tests.workers import Workers

from .models import Given, Net, Record, fit, judge, trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "signSGD": {"betas": (0.0, 0.0)},
    "Signum": {"betas": (0.9, 0.9)},
    "Lion": {"betas": (0.9, 0.99), "weight_decay": 0.1},
    "verdict momentum": {"betas": (0.0, 0.0), "verdict_momentum": 0.8},
    "warmup": {"betas": (0.5, 0.5), "warmup_steps": 2},
    "abstain": {"zeros": "abstain"},
    "positive": {"zeros": "positive"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_vote_is_the_references(settings: dict[str, Any], workers: Workers) -> None:
    runs = workers.run(2, fit, partial(Net, **settings), {})
    judge([run[0] for run in runs], **settings)
    assert len(runs[0][0].parameters) == 4  # 32 samples, 2 ranks, batches of 4


def test_three_ranks(workers: Workers) -> None:
    runs = workers.run(3, fit, partial(Net, samples=24), {})
    judge([run[0] for run in runs])


def _started() -> tuple[np.ndarray, list[Record]]:
    model = Net()
    built = model.net[0].weight.detach().numpy().copy()
    trainer(max_steps=1).fit(model)
    return built, model.records


def test_parameters_start_from_rank_0s(workers: Workers) -> None:
    ranks = workers.run(2, _started)
    assert not np.array_equal(ranks[0][0], ranks[1][0])
    for _, records in ranks:
        np.testing.assert_array_equal(records[0].start[0], ranks[0][0])


def _zeros() -> tuple[str, list[np.ndarray]]:
    model = Given([[[np.zeros(2, np.float32)]] * torch.distributed.get_world_size()] * 3, betas=(0, 0))
    run: Any = trainer()
    run.fit(model)
    return run.optimizers[0].zeros, [x[0] for x in model.records[0].parameters]


def test_zeros_alternate_under_a_vote_and_abstain_alone(workers: Workers) -> None:
    assert workers.run(1, _zeros)[0][0] == "abstain"
    np.testing.assert_array_equal(workers.run(1, _zeros)[0][1], np.ones((3, 2)))
    for zeros, trajectory in workers.run(2, _zeros):
        assert zeros == "alternate"
        np.testing.assert_array_equal(trajectory, [[0.75, 0.75], [1, 1], [0.75, 0.75]])


def _alone() -> tuple[bool, list[Record]]:
    model = Net()
    run: Any = trainer()
    run.fit(model)
    return run.optimizers[0].vote is None, model.records


def test_one_process_trains_without_an_exchange(workers: Workers) -> None:
    alone, records = workers.run(1, _alone)[0]
    assert alone
    judge(records)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "no bucket view": {"gradient_as_bucket_view": False},
    "static graph": {"static_graph": True},
    "tiny buckets": {"bucket_cap_mb": 2**-16},
    "find unused": {"find_unused_parameters": True},
    "timeout": {"timeout": timedelta(seconds=20), "process_group_backend": "gloo"},
}


class _Seeing(Net):
    """Looks at its strategy while it trains."""

    def on_train_start(self) -> None:
        strategy: Any = self.trainer.strategy
        ddp = strategy.model
        self.seen = {name: getattr(ddp, name) for name in vars(ddp)}
        self.seen |= {"bucket_cap_mb": ddp.bucket_bytes_cap / 2**20}
        self.seen |= {"timeout": strategy._timeout, "process_group_backend": strategy.process_group_backend}


def _with_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Record]]:
    model = _Seeing()
    trainer(strategy=MajorityVoteStrategy(**arguments)).fit(model)
    return {name: model.seen[name] for name in arguments}, model.records


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_ddps_own_arguments(arguments: dict[str, Any], workers: Workers) -> None:
    ranks = workers.run(2, _with_arguments, arguments)
    judge([records[0] for _, records in ranks])
    for seen, _ in ranks:
        assert seen == arguments


def test_registered_as_ddp_registers_its_own() -> None:
    assert signsgd_lightning.MajorityVoteStrategy.strategy_name == "majority_vote"
    ours = {name: StrategyRegistry[name] for name in StrategyRegistry if name.startswith("majority_vote")}
    theirs = {name: StrategyRegistry[name] for name in StrategyRegistry if name.split("_")[0] == "ddp"}
    assert len(theirs) == 12
    assert type(StrategyRegistry.get(ours.pop("majority_vote_sharded")["strategy_name"])) is ShardedMajorityVoteStrategy
    assert ours.keys() == {"majority_vote" + name.removeprefix("ddp") for name in theirs}
    for name, entry in theirs.items():
        our = ours["majority_vote" + name.removeprefix("ddp")]
        assert our["init_params"] == entry["init_params"]
        strategy = StrategyRegistry.get(our["strategy_name"])
        assert type(strategy) is MajorityVoteStrategy
        assert strategy._start_method == our["init_params"]["start_method"]
