"""Manual optimization: several optimizers, each with a vote of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from signsgd_lightning import Signum
from tests.workers import Workers

from .models import Net, Record, judge, record, trainer

GENERATOR: dict[str, Any] = {"betas": (0.5, 0.75)}
DISCRIMINATOR: dict[str, Any] = {"betas": (0.0, 0.0), "verdict_momentum": 0.75, "weight_decay": 0.25}


class Gan(Net):
    """A generator and a discriminator; the discriminator steps at every batch, the generator at every other."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__(lambda: nn.ModuleDict({"g": nn.Linear(2, 4), "d": nn.Linear(4, 1)}))
        self.automatic_optimization, self.toggle = False, toggle

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        g, d = optimizers
        real, noise = batch[0], batch[0][:, :2]
        self._step(d, lambda: self._loss(real, 1) + self._loss(self.net["g"](noise).detach(), 0))
        if index % 2:
            self._step(g, lambda: self._loss(self.net["g"](noise), 1))

    def _step(self, optimizer: Any, loss: Any) -> None:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def _loss(self, x: Tensor, label: float) -> Tensor:
        scores = self.net["d"](x)
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, label))

    def configure_optimizers(self) -> Any:
        g = Signum(self.net["g"].parameters(), lr=0.125, **GENERATOR)
        d = Signum(self.net["d"].parameters(), lr=0.0625, **DISCRIMINATOR)
        self.records = [*record(g), *record(d)]
        return [g, d]


def _gan(toggle: bool) -> list[Record]:
    model = Gan(toggle)
    trainer(strategy="majority_vote_find_unused_parameters_true").fit(model)
    return model.records


@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "untoggled"])
def test_two_optimizers_that_step_by_turns(toggle: bool, workers: Workers) -> None:
    ranks = workers.run(2, _gan, toggle)
    judge([records[0] for records in ranks], **GENERATOR)
    judge([records[1] for records in ranks], **DISCRIMINATOR)
    assert [len(one.parameters) for one in ranks[0]] == [2, 4]
