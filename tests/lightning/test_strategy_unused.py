"""Parameters that a step does not use, on some ranks or on all; freezing and unfreezing midway."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from signsgd_lightning import MajorityVoteStrategy, Signum
from tests.workers import Workers

from .models import Array, Given, Net, Record, fit, judge, record

UNUSED = {"strategy": "majority_vote_find_unused_parameters_true"}
SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "weight_decay": 0.5}


def _gradients(steps: int = 6, ranks: int = 2) -> list[list[list[Array | None]]]:
    """Tensor 0 is used always, tensor 1 by rank 1 at odd steps and by rank 0 at 0 and 4, tensor 2 by nobody at 0-2."""
    random = np.random.default_rng(3)
    given: list[list[list[Array | None]]] = []
    for t in range(steps):
        given.append([])
        for rank in range(ranks):
            used = (True, t % 2 == 1 if rank == 1 else t % 4 == 0, t > 2)
            draws = [(random.integers(-3, 4, 70) / 8).astype(np.float32) for _ in used]
            given[t].append([g if use else None for g, use in zip(draws, used, strict=True)])
    return given


def _judge(runs: list[list[Record]], given: list[list[list[Array | None]]], **settings: Any) -> None:
    for rank, (one,) in enumerate(runs):
        one.gradients = [step[rank] for step in given]
    judge([run[0] for run in runs], **settings)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
def test_ranks_that_did_not_use_a_parameter_abstain(ranks: int, zeros: str, workers: Workers) -> None:
    given = _gradients(ranks=ranks)
    runs = workers.run(ranks, fit, partial(Given, given, zeros=zeros, **SIGNUM), UNUSED)
    _judge(runs, given, zeros=zeros, **SIGNUM)
    one = runs[0][0]
    for t, before, after in zip(range(6), [one.start, *one.parameters], one.parameters, strict=False):
        moved = [x.tobytes() != y.tobytes() for x, y in zip(before, after, strict=True)]
        assert moved == [True, any(worker[1] is not None for worker in given[t]), t > 2], t


def test_static_graph_with_a_parameter_used_on_one_rank(workers: Workers) -> None:
    given: list[list[list[Array | None]]] = [[[_pair(t)[0], None], list(_pair(t + 10))] for t in range(3)]
    settings = {"strategy": MajorityVoteStrategy(static_graph=True)}
    _judge(workers.run(2, fit, partial(Given, given, **SIGNUM), settings), given, **SIGNUM)


def _pair(seed: int) -> list[Array]:
    random = np.random.default_rng(seed)
    return [(random.integers(-3, 4, 40) / 8).astype(np.float32) for _ in range(2)]


def test_accumulation_over_batches_of_which_one_uses_a_parameter(workers: Workers) -> None:
    """Rank 0 uses tensor 1 in the first of two batches, rank 1 in none; Lightning halves each batch's loss."""
    batches: list[list[list[Any]]] = []
    for t in range(6):
        (a, b), (c, _) = _pair(t), _pair(t + 10)
        batches.append([[a, c if t % 2 == 0 else None], [b, None]])
    runs = workers.run(2, fit, partial(Given, batches, **SIGNUM), {**UNUSED, "accumulate_grad_batches": 2})
    given: list[list[list[Array | None]]] = []
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        sums = [(f[0] + s[0]) / 2 for f, s in zip(first, second, strict=True)]
        used = first[0][1]
        assert used is not None
        given.append([[sums[0], used / 2], [sums[1], None]])
    _judge(runs, given, **SIGNUM)


def _half_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    net[0].requires_grad_(False)
    return net


class _Freezing(Net):
    """The first layer is frozen in steps 2 and 3."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.net[0].requires_grad_(index not in (2, 3))


class _Thawing(Net):
    """The first layer, frozen from the start, is freed at step 2; the optimizer has it all along."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.net[0].requires_grad_(index >= 2)


def test_freezing_midway(workers: Workers) -> None:
    runs = workers.run(2, fit, partial(_Freezing, samples=48, **SIGNUM), UNUSED)
    for (one,) in runs:
        assert all(g is None for t in (2, 3) for g in one.gradients[t][:2])
        assert all(g is not None for t in (0, 1, 4, 5) for g in one.gradients[t])
    judge([run[0] for run in runs], **SIGNUM)
    one = runs[0][0]
    assert [x.tobytes() for x in one.parameters[1][:2]] == [x.tobytes() for x in one.parameters[3][:2]]


@pytest.mark.parametrize("settings", [{}, UNUSED], ids=["all used", "find unused"])
def test_unfreezing_midway(settings: dict[str, Any], workers: Workers) -> None:
    runs = workers.run(2, fit, partial(_Thawing, _half_frozen, **SIGNUM), settings)
    judge([run[0] for run in runs], **SIGNUM)
    one = runs[0][0]
    assert [x.tobytes() for x in one.start[:2]] == [x.tobytes() for x in one.parameters[1][:2]]
    assert one.parameters[1][0].tobytes() != one.parameters[2][0].tobytes()


class _Finetuning(BaseFinetuning):
    """Lightning's own way: freeze the first layer, and give it a parameter group of its own in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.125)


class _Head(Net):
    def configure_optimizers(self) -> Any:
        optimizer = Signum([p for p in self.parameters() if p.requires_grad], **self.signum)
        self.records = record(optimizer)
        return optimizer


@pytest.mark.parametrize("settings", [{}, UNUSED], ids=["all used", "find unused"])
def test_finetuning_adds_a_group_midway(settings: dict[str, Any], workers: Workers) -> None:
    settings = {"callbacks": [_Finetuning()], "max_epochs": 2, **settings}
    runs = workers.run(2, fit, partial(_Head, samples=16, **SIGNUM), settings)
    for k in range(2):
        judge([run[k] for run in runs], **SIGNUM)
    assert [len(one.parameters) for one in runs[0]] == [4, 2]
    assert runs[0][1].lrs == [0.125, 0.125]
    assert all(g is not None for g in runs[0][1].gradients[0])


def test_frozen_parameters_are_never_touched(workers: Workers) -> None:
    runs = workers.run(2, fit, partial(Net, _half_frozen, **SIGNUM), {})
    judge([run[0] for run in runs], **SIGNUM)
    assert [x.tobytes() for x in runs[0][0].start[:2]] == [x.tobytes() for x in runs[0][0].end[:2]]
