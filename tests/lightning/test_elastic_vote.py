"""`strategy="elastic_vote"` under real Trainers that come and go."""

import csv
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from signsgd_lightning import Signum
from tests.elastic import Crew, crew
from tests.elastic_trainers import Fit, fit

from .models import QUIET, Net

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")

from signsgd_lightning import ElasticVoteStrategy

multiprocess = pytest.mark.multiprocess


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as (found, _):
        yield found


def alike(workers: Crew, *names: int, every: int = 1) -> dict[int, list[dict[str, Any]]]:
    """Demand the same bits, settings and number of workers of all who took a step; return the lines by step."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for name in names:
        for line in workers.log(name):
            steps.setdefault(line["step"], []).append(line)
    for step, lines in steps.items():
        if step % every == 0:
            for key in ("bits", "lr", "workers"):
                assert all(line[key] == lines[0][key] for line in lines), (step, key)
    return steps


HALF: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
SETTINGS = {
    "SignMuon": Fit({"max_steps": 60, **HALF}, signmuon=True),
    "local steps": Fit({"max_steps": 60, **HALF}, {"sync_every": 3, "outer_momentum": 0.5}, signum=None),
    "manual": Fit({"max_steps": 60}, manual=True),
    "manual local steps": Fit({"max_steps": 120}, {"sync_every": 3}, signum=None, manual=True),
}


@multiprocess
@pytest.mark.parametrize(
    "task",
    [pytest.param(task, id=k, marks=[pytest.mark.nightly] * k.startswith("manual")) for k, task in SETTINGS.items()],
)
def test_one_is_killed_and_one_joins(task: Fit, workers: Crew, tmp_path: Path) -> None:
    """All who are there at the end have the same bits, the step counter and the schedule; the first one writes."""
    names = [workers.start(task, fit) for _ in range(3)]
    workers.wait(lambda: min(map(workers.step, names)) > 5)
    first = next(name for name in names if workers.log(name)[-1]["number"] == 0)
    workers.signal(first, signal.SIGKILL)
    left = [name for name in names if name != first]
    reached = max(map(workers.step, left))
    workers.wait(lambda: min(map(workers.step, left)) > reached + 3)
    left.append(workers.start(task, fit))
    workers.join(*left)
    steps = alike(workers, *left, every=task.strategy.get("sync_every", 1))
    end = max(steps)
    assert end == task.settings["max_steps"]
    assert len(steps[end]) == 3
    for lines in steps.values():
        assert sum(line["first"] for line in lines) <= 1
        drawn = [tuple(batch) for line in lines for batch in line["drawn"]]
        assert len(drawn) == len(set(drawn))
    assert {line["monitor"] for name in left for line in workers.log(name)} - {0.0} == {2.0, 3.0}
    for name in left:
        for line in workers.log(name):
            assert all(samples == 2 for _, samples in line["geometry"]), "a worker looks at its own gradients"
    joined = workers.log(left[-1])
    assert joined[0]["step"] < joined[-1]["geometry"][0][0] <= joined[-1]["geometry"][-1][0] <= end
    written = [row for name in names + left[-1:] for row in _logged(tmp_path / f"worker{name}")]
    assert len(written) == len(set(written)), "a step was logged by two"
    assert max(written) == end - 1
    last = next(name for name in left if workers.log(name)[-1]["number"] == 0)
    saved = torch.load(tmp_path / f"worker{last}" / "saved" / f"step={end}.ckpt", weights_only=True)
    assert saved["global_step"] == end


RESUMED = [Fit({"max_steps": 16}), Fit({"max_steps": 16}, {"sync_every": 2, "outer_momentum": 0.5}, {"betas": (0, 0)})]


@multiprocess
@pytest.mark.parametrize("task", RESUMED, ids=["votes", "local steps"])
def test_a_checkpoint_goes_on_bit_for_bit(task: Fit, workers: Crew, tmp_path: Path) -> None:
    """All are gone and start anew, one with a checkpoint: from there on parameters and batches are those of before."""
    every = task.strategy.get("sync_every", 1)
    names = [workers.start(task, fit) for _ in range(2)]
    workers.join(*names)
    before = alike(workers, *names, every=every)
    (saved,) = tmp_path.glob("worker*/saved/step=8.ckpt")
    names = [workers.start(replace(task, resume=saved), fit), workers.start(task, fit)]
    workers.join(*names)
    after = alike(workers, *names, every=every)
    assert sorted(after) == list(range(8 + every, 17))
    for step, lines in after.items():
        assert sorted(line["drawn"] for line in lines) == sorted(line["drawn"] for line in before[step])
        if step % every == 0:
            assert lines[0]["bits"] == before[step][0]["bits"]


def _logged(folder: Path) -> list[int]:
    """Return the steps for which a worker logged a loss."""
    rows = [row for file in folder.glob("**/metrics.csv") for row in csv.DictReader(file.read_text().splitlines())]
    return [int(row["step"]) for row in rows if row["loss"]]


class Two(Net):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [Signum([p]) for p in self.net.parameters()]


class Adam(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters())


class Epochs(Net):
    def configure_optimizers(self) -> Any:
        optimizer = Signum(self.net.parameters(), betas=(0, 0))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Plateau(Net):
    def configure_optimizers(self) -> Any:
        optimizer = Signum(self.net.parameters(), betas=(0, 0))
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "monitor": "loss"}}


NOWHERE = "http://127.0.0.1:9"
SCALED = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("settings", "strategy", "module", "words"),
    [
        ({"max_epochs": 1, "max_steps": -1}, {}, Net, "got max_steps=-1: pass Trainer"),
        ({"devices": 2}, {}, Net, "one device, got devices=2: pass devices=1"),
        ({"plugins": [SCALED]}, {}, Net, "take precision='bf16-mixed'"),
        ({}, {}, Two, "one optimizer, got 4: return one from configure_optimizers"),
        ({}, {}, Adam, "optimizer 0 is Adam"),
        ({"max_steps": 5}, {"sync_every": 2}, Net, "max_steps=5 would end within a round of sync_every=2"),
        ({}, {}, Epochs, "got a StepLR with interval='epoch': return schedulers of steps"),
        ({}, {}, Plateau, "got a ReduceLROnPlateau with interval='step'"),
        ({"callbacks": [EMAWeightAveraging()]}, {}, Net, "EMAWeightAveraging keeps an average that a new worker"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, {"sync_every": 2}, Net, "average the checkpoints"),
        ({}, {"lighthouse": None}, Net, "needs a lighthouse"),
        ({}, {"min_workers": 0}, Net, "min_workers must be"),
    ],
)
def test_what_cannot_work_is_refused(
    settings: dict[str, Any], strategy: dict[str, Any], module: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    elastic = ElasticVoteStrategy(**{"lighthouse": NOWHERE, "timeout": timedelta(seconds=1), **strategy})
    usual = {**QUIET, "accelerator": "cpu", "devices": 1, "strategy": elastic, "max_steps": 4}
    run = Trainer(**{**usual, **settings})
    with pytest.raises((TypeError, ValueError), match=words):
        run.fit(module())


def test_by_name() -> None:
    run = Trainer(accelerator="cpu", devices=1, strategy="elastic_vote", logger=False)
    assert type(run.strategy) is ElasticVoteStrategy
    assert run.strategy.root_device == torch.device("cpu")
