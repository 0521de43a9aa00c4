"""`GeometryMonitor`: its figures are those of the recorded gradients, of one rank or of all, and it changes nothing."""

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from signsgd_core.analysis.geometry import Moments, figures
from signsgd_lightning import GeometryMonitor, VoteMonitor
from tests.workers import Workers

from .models import QUIET, Given, GivenByTwo, Net, alone, array, trainer


class Plain(Net):
    """With an optimizer that does not vote."""

    def configure_optimizers(self) -> Any:
        self.seen: list[np.ndarray] = []
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.03)

        def note(*_: Any) -> None:
            self.seen.append(vectors([[array(p.grad) for p in self.net.parameters()]])[0])

        optimizer.register_step_post_hook(note)
        return optimizer


def vectors(steps: list[list[np.ndarray]]) -> np.ndarray:
    return np.array([np.concatenate([g.ravel() for g in step]) for step in steps])


def same(values: dict[str, Any], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert values.get(name) == (None if math.isnan(value) else pytest.approx(value, rel=1e-5, abs=1e-9)), name


@pytest.mark.parametrize("clipped", [None, 0.01])
def test_figures_of_one_process(clipped: float | None, tmp_path: Path) -> None:
    """They are of gradients as the optimizer got them."""
    model, monitor = Plain(), GeometryMonitor(every_n_steps=6, samples=4, directory=tmp_path)
    run = alone(model, monitor, gradient_clip_val=clipped)
    seen = np.array(model.seen)
    assert len(seen) == 16
    assert [record["step"] for record in monitor.report.records] == [6, 12]
    for record, first in zip(monitor.report.records, (0, 6), strict=True):
        assert record["samples"] == 4
        same(record, figures(Moments.of(seen[first : first + 4])))
    assert run.callback_metrics["geometry/noise_ratio"] == pytest.approx(
        monitor.report.records[-1]["geometry/noise_ratio"]
    )


class Turning(LightningModule):
    """A quadratic with little noise, under SGD: with a learning rate of 2 every step goes to the other side."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr, self.x = lr, nn.Parameter(torch.ones(50))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.x**2).sum() / 2 + 0.01 * (torch.randn(50) * self.x).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return range(50)


@pytest.mark.parametrize(("lr", "signal"), [(2.0, 0.0), (0.0, 1.0)])
def test_what_turns_with_the_weights_counts_as_noise(lr: float, signal: float) -> None:
    monitor = GeometryMonitor(every_n_steps=50, samples=50, directory=None)
    alone(Turning(lr), monitor, max_epochs=1)
    (record,) = monitor.report.records
    assert record["geometry/signal"] == pytest.approx(signal, abs=0.01)


def test_a_choice_of_coordinates() -> None:
    monitor = GeometryMonitor(every_n_steps=4, samples=4, coordinates=9, directory=None)
    alone(model := Plain(), monitor, max_epochs=1)
    at = np.flatnonzero(np.isin(np.arange(37), np.concatenate(_chosen(monitor))))
    assert len(at) == 9
    same(monitor.report.records[0], figures(Moments.of(np.array(model.seen)[:4, at])))


def _chosen(monitor: GeometryMonitor) -> list[np.ndarray]:
    starts = np.cumsum([0, 24, 6, 6])
    return [part.numpy() + start for part, start in zip(monitor._chosen, starts, strict=True)]


def test_a_run_shorter_than_the_interval(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Is looked at as far as it goes; the advice is shown, and what it rests on is left in files."""
    with caplog.at_level(logging.INFO):
        alone(Net(), GeometryMonitor(), max_epochs=1, default_root_dir=tmp_path)
    document = json.loads((tmp_path / "geometry" / "geometry.json").read_text())
    assert [(record["step"], record["samples"]) for record in document["records"]] == [(8, 8)]
    assert (tmp_path / "geometry" / "geometry.png").stat().st_size > 10_000
    for beginning in ("Signs", "Workers: ", "Momentum: ", "Noise: ", "Matrices: "):
        assert any(message.startswith(beginning) for message in caplog.messages)


def test_loggers_get_the_figures(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    alone(Net(), GeometryMonitor(every_n_steps=4, samples=4), logger=logger)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["geometry/snr"]]
    assert len(rows) == 4
    assert (Path(logger.log_dir) / "geometry" / "geometry.json").is_file()


def _vote(strategy: str, precision: Any, seed: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    given: Any = np.random.default_rng(seed).normal(size=(7, dist.get_world_size(), 2, 30)).astype(np.float32)
    given[2, 0, 0, 3] = np.nan  # the gradient of rank 0 at the third step is left out
    monitor = GeometryMonitor(every_n_steps=5, samples=5, directory=None)
    model = Given(given, betas=(0.5, 0.5))
    run = trainer(callbacks=[monitor], strategy=strategy, **precision())
    run.fit(model)
    return given, monitor.report.records


def fp32() -> dict[str, Any]:
    return {}


def scaled() -> dict[str, Any]:
    """The scale doubles at every step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("precision", [fp32, scaled])
def test_ranks_that_vote_are_taken_together(precision: Any, workers: Workers) -> None:
    for given, records in workers.run(3, _vote, "majority_vote", precision, 0):
        flat = given[:5].reshape(15, 60)
        flat = flat[np.isfinite(flat).all(1)]
        (record,) = records
        assert record["samples"] == len(flat) == 14
        if precision is fp32:
            same(record, figures(Moments.of(flat)))
        else:  # halves on the way
            expected = figures(Moments.of(flat))
            for name in ("geometry/noise_density", "geometry/gradient_density", "geometry/skewness"):
                assert record[name] == pytest.approx(expected[name], rel=0.01)


def _overlapped() -> list[dict[str, Any]]:
    from signsgd_lightning import MajorityVoteStrategy

    return _vote(MajorityVoteStrategy(overlap=True), fp32, 0)[1]  # type: ignore[arg-type]


def test_the_same_with_overlap(workers: Workers) -> None:
    plain = workers.run(2, _vote, "majority_vote", fp32, 0)[0][1]
    assert workers.run(2, _overlapped) == [plain] * 2


def _by_nodes() -> list[dict[str, Any]]:
    from signsgd_lightning import MajorityVoteStrategy

    return _vote(MajorityVoteStrategy(vote_between="nodes"), fp32, 0)[1]  # type: ignore[arg-type]


def test_all_ranks_of_a_node_are_looked_at(workers: Workers) -> None:
    plain = workers.run(2, _vote, "majority_vote", fp32, 0)[0][1]
    assert workers.run(2, _by_nodes) == [plain] * 2


def _averaged() -> list[dict[str, Any]]:
    monitor = GeometryMonitor(every_n_steps=4, samples=4, directory=None)
    trainer(callbacks=[monitor], strategy="ddp").fit(Plain())
    return monitor.report.records


def test_averaged_gradients_count_once(workers: Workers) -> None:
    first, second = workers.run(2, _averaged)
    assert first == second
    assert [record["samples"] for record in first] == [4]


def _two() -> list[dict[str, Any]]:
    given: Any = np.ones((4, dist.get_world_size(), 2, 3), np.float32)
    monitor = GeometryMonitor(every_n_steps=2, samples=2, directory=None)
    trainer(callbacks=[monitor]).fit(GivenByTwo(given))
    return monitor.report.records


def test_of_several_optimizers_the_first(workers: Workers) -> None:
    for records in workers.run(2, _two):
        assert [record["geometry/gradient_density"] for record in records] == [1.0, 1.0]


class Sparse(Plain):
    """An embedding's gradient has rows of what was looked up alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), self.net)

    def training_step(self, batch: Any, index: int) -> Tensor:
        out: Tensor = self.net(torch.tensor([index % 10]))
        return out.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_sparse_gradients() -> None:
    monitor = GeometryMonitor(every_n_steps=8, samples=8, directory=None)
    alone(Sparse(), monitor)
    assert monitor.report.records[0]["samples"] == 8


class ByLineSearch(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.01)


def test_steps_are_counted_and_not_closures() -> None:
    monitor = GeometryMonitor(every_n_steps=4, samples=4, directory=None)
    run = alone(ByLineSearch(), monitor)
    assert [record["step"] for record in monitor.report.records] == list(range(4, run.global_step + 1, 4))


class Frozen(Plain):
    def configure_optimizers(self) -> Any:
        return None


def test_without_an_optimizer() -> None:
    with pytest.raises(ValueError, match="GeometryMonitor looks at the gradients of an optimizer's parameters, and"):
        alone(Frozen(), GeometryMonitor(4, 4))


def _counted(watched: bool) -> float:
    given: Any = np.ones((4, dist.get_world_size(), 2, 3), np.float32)
    also = [GeometryMonitor(every_n_steps=2, samples=2, directory=None)] if watched else []
    run = trainer(callbacks=[VoteMonitor(), *also], log_every_n_steps=4)
    run.fit(Given(given))
    return float(run.callback_metrics["vote/bytes_per_step"])


def test_its_own_messages_are_not_the_votes(workers: Workers) -> None:
    assert workers.run(2, _counted, True) == workers.run(2, _counted, False)


def test_training_is_the_same_bit_for_bit() -> None:
    models = [Net(), Net()]
    loss = lambda module: module.net(torch.ones(2, 4)).square().sum()  # noqa: E731
    alone(models[0], GeometryMonitor(every_n_steps=4, samples=2, curvature_loss=loss, directory=None))
    settings: dict[str, Any] = {**QUIET, "accelerator": "cpu", "max_epochs": 2}
    Trainer(**settings).fit(models[1])
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 1}, "every_n_steps must be a whole number of 2 or more, got 1"),
        ({"samples": 1}, "samples must be a whole number of 2 or more, got 1"),
        ({"samples": 300}, "samples must be at most every_n_steps=200, got 300"),
        ({"coordinates": 0.5}, "coordinates must be a whole number of 1 or more, got 0.5"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometryMonitor(**settings)
