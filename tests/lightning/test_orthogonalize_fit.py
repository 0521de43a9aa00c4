"""SignMuon by the Trainer: schedules, accumulation, precision, logging, and a checkpoint that goes on bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import nn

from signsgd_lightning import Signum, VoteMonitor, signmuon_groups
from tests.workers import Workers

from .models import Net, Record, alone, judge, record, trainer
from .test_callbacks import Notes

LR = 0.0625


def deep_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


class SignMuon(Net):
    """Scheduled: the rates of both groups fall by half at every step of the schedule."""

    def __init__(self) -> None:
        super().__init__(deep_net)

    def configure_optimizers(self) -> Any:
        optimizer = Signum(signmuon_groups(self.net, LR, LR / 2))
        self.records = record(optimizer)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def judge_both(ranks: list[list[Record]]) -> None:
    matrices, others = zip(*ranks, strict=True)
    assert set(matrices[0].lrs) >= {LR, LR / 2}
    assert others[0].lrs == [lr / 2 for lr in matrices[0].lrs]
    judge(matrices, betas=(0.9, 0.95), orthogonalize={0: 1, 1: 1}, tolerance=1e-3)
    judge(others, betas=(0.9, 0.95))


def _fit(settings: dict[str, Any]) -> list[Record]:
    model = SignMuon()
    trainer(**settings).fit(model)
    return model.records


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2, "max_epochs": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"strategy": "majority_vote_find_unused_parameters_true"},
    ],
    ids=str,
)
def test_every_step_is_the_references(settings: dict[str, Any], workers: Workers) -> None:
    judge_both(workers.run(2, _fit, settings))


def test_one_process() -> None:
    model = SignMuon()
    alone(model, Callback(), strategy="auto", devices=1)
    judge_both([model.records])


def _logged() -> dict[str, float]:
    notes = Notes()
    callbacks: list[Callback] = [LearningRateMonitor("step"), VoteMonitor()]
    trainer(callbacks=callbacks, logger=notes, log_every_n_steps=1).fit(SignMuon())
    return {name: value for _, row in notes.rows for name, value in row.items()}


def test_rates_have_the_groups_names_and_votes_are_watched(workers: Workers) -> None:
    logged = workers.run(2, _logged)[0]
    assert {"lr-Signum/matrices", "lr-Signum/others"} <= set(logged)
    assert 0 < logged["vote/agreement/rank0"] < 1


def _weights(model: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in model.parameters()]


def _fit_to(epochs: int, start: str | None, save: str | None) -> list[np.ndarray]:
    model = SignMuon()
    run = trainer(max_epochs=epochs)
    run.fit(model, ckpt_path=start)
    if save is not None:
        run.save_checkpoint(save)
    return _weights(model)


def test_a_checkpoint_goes_on(tmp_path: Path, workers: Workers) -> None:
    half = str(tmp_path / "half.ckpt")
    workers.run(2, _fit_to, 1, None, half)
    resumed, whole = workers.run(2, _fit_to, 2, half, None), workers.run(2, _fit_to, 2, None, None)
    for ours, expected in zip(resumed, whole, strict=True):
        for x, y in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(x, y)
