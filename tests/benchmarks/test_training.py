"""The experiments' training: the vote of one worker is `Signum`'s, a grid goes on where it was, scripts run whole."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.network import available
from benchmarks.papers.densities import look
from benchmarks.papers.gpt_over_wire import APART, DDP, OURS, Way, cost, level
from benchmarks.papers.gpt_worker import EXACT
from benchmarks.papers.local_steps import MUON
from benchmarks.papers.methods import PER_LAYER, VOTED, Job
from benchmarks.papers.tasks import Images, Task, Text
from benchmarks.papers.training import Run, Store, best, schedule, train
from signsgd_lightning import Signum

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text() -> Task:
    return Text(Path(json.__file__), 16, 1, 16, global_batch=4)


def _signum(text: Task, job: Job, method: str, shares: Callable[[list[np.ndarray]], list[float]]) -> float:
    """Return the score of training by hand, each tensor's learning rate a share of all given its weights."""
    torch.manual_seed(job.seed)
    model, source = text.model(), np.random.default_rng([job.seed, 0])
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = Signum(groups, job.lr, weight_decay=job.weight_decay, **VOTED[method])
    for step in range(job.steps):
        weights = [p.detach().numpy() for p in model.parameters()]
        for group, share in zip(optimizer.param_groups, shares(weights), strict=True):
            group["lr"] = job.lr * schedule(step, job.steps) * share
        optimizer.zero_grad()
        text.loss(model, text.batch(4, source)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return text.score(model)


@pytest.mark.parametrize("method", ["Signum", "verdict momentum 0.8"])
def test_the_vote_of_one_worker_is_signum_alone(method: str, text: Task) -> None:
    job = Job(text.key, method, 0.01, 0.1, workers=1, steps=12, seed=3)
    assert train(text, job).score == _signum(text, job, method, lambda weights: [1.0] * len(weights))


def test_rates_of_layers_are_those_of_signum_in_parameter_groups(text: Task) -> None:
    job = Job(text.key, f"Signum{PER_LAYER}", 0.01, 0.1, workers=1, steps=5, seed=3)

    def shares(weights: list[np.ndarray]) -> list[float]:
        matrices = np.concatenate([x.ravel() for x in weights if x.ndim > 1])
        return [float(np.sqrt(np.mean(x**2) / np.mean(matrices**2))) if x.ndim > 1 else 1.0 for x in weights]

    score = train(text, job).score
    assert score == pytest.approx(_signum(text, job, "Signum", shares), rel=1e-5)
    assert score != train(text, job._replace(method="Signum")).score


def test_as_many_examples_whatever_the_workers(text: Task) -> None:
    averaged = [train(text, Job(text.key, "AdamW", 0.01, workers=workers, steps=8)).score for workers in (1, 2, 4)]
    assert len(set(averaged)) == 3, "each worker draws its own batches"
    assert max(averaged) - min(averaged) < 0.2


def test_a_schedule_warms_up_and_falls() -> None:
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.01)
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 < shares[-1] < 0.001


def test_one_that_diverged_is_never_the_best() -> None:
    jobs = [Job("", "AdamW", lr) for lr in (1.0, 2.0, 3.0)]
    runs = [Run(score, []) for score in (2.0, math.nan, 1.0)]
    assert best(jobs, runs, "lower").lr == 3.0
    assert best(jobs, runs, "higher").lr == 1.0


def test_a_grid_goes_on_where_it_was(text: Task, tmp_path: Path) -> None:
    jobs = [Job(text.key, "Signum", lr, workers=2, steps=4) for lr in (0.001, 0.01)]
    path = tmp_path / "trainings.json"
    first = Store(tmp_path).run(text, jobs[:1], "grid")
    known = json.loads(path.read_text())
    known[jobs[0].key][0] = -1.0
    path.write_text(json.dumps(known))
    again = Store(tmp_path).run(text, jobs, "grid")
    assert again[0].score == -1.0, "it was trained again"
    assert again[1].score != first[0].score
    assert sorted(json.loads(path.read_text())) == sorted(job.key for job in jobs)


def _run(*arguments: object, timeout: float = 280) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-8_000:]
    return done.stdout


@pytest.mark.nightly
def test_verdict_momentum(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.verdict_momentum", "--short", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    for task in ("GPT on bytes, 2 steps", "ResNet on images, 2 steps"):
        assert task in printed
    for workers in (1, 3, 8):
        assert len(re.findall(rf"(?:Signum|verdict momentum 0\.\d+) .* {workers} workers", printed)) == 4


@pytest.mark.nightly
def test_cifar10(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.cifar10", "--short", "--methods", "SGD", "Signum", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    found = re.findall(r"^(SGD|Signum) +(\d) +\S+ +\S+ +[\d.]+% +[\d.]+$", printed, re.MULTILINE)
    assert found == [("SGD", "1"), ("Signum", "1"), ("SGD", "4"), ("Signum", "4")]
    best = re.findall(r"the best vote beside the best of the others, workers [14]: [+-][\d.]+ points", printed)
    assert len(best) == 2


@pytest.mark.nightly
def test_verdict_variants(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.verdict_variants", "--short", "--tasks", "resnet", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    rows = re.findall(r"^  (.{36}) +\S+ +\S+ +0\.\d{4} +\d\.\d{4}$", printed, re.MULTILINE)
    known, wide = ["AdamW", "Lion", "Signum", "verdict momentum"], ["AdamW", "Signum", "verdict momentum"]
    variants = ["verdict momentum", "mixture", "SGD", "Signum, per layer", "verdict momentum 0.8, per layer"]
    for row, method in zip(rows, known + variants + wide, strict=True):
        assert row.startswith(method)


@pytest.mark.nightly
def test_densities(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.densities", "--short", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["densities.png", "densities.txt"]
    rows = re.findall(r"^ +([012])((?: +\d+\.\d{4}){7})$", printed, re.MULTILINE)
    assert [step for step, _ in rows] == ["0", "1", "2"] * 2
    for _, values in rows:
        gradient, noise, ratio, curvature, *_ = map(float, values.split())
        assert ratio == pytest.approx(noise / gradient, rel=0.01)
        assert 0 < curvature < 1


@pytest.mark.nightly
def test_densities_through_whole_trainings(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.densities", "--whole", "--short", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["densities_whole.png", "densities_whole.txt"]
    assert re.findall(r"^GPT on bytes, (.+), batches of 16$", printed, re.MULTILINE) == [
        "AdamW, clipped with lr 0.002",
        "SignMuon with lr 0.04 and 0.001",
    ]


TRAINED = {
    "signmuon": (["--methods", "SignMuon", "Signum"], r"^  (SignMuon|Signum) .+ \d\.\d{4}", 2 * 2 * 4 + 2),
    "local_steps": (
        ["--every", "4", "--workers", "2", "--long", "2", "--inner", MUON],
        rf"^  {MUON}, (vote|mean|DiLoCo) +2 ",
        2 * 3 + 4,
    ),
    "whole": (["--methods", "SignMuon", "local steps"], rf"^  (SignMuon|{MUON}, vote every 16) ", 2 * 2),
}
"""Script -> options, how its rows begin, and how many there are of both tasks."""


@pytest.mark.nightly
@pytest.mark.parametrize("script", TRAINED)
def test_methods_side_by_side(script: str, tmp_path: Path) -> None:
    options, row, rows = TRAINED[script]
    printed = _run(f"benchmarks.papers.{script}", "--short", "--out", tmp_path, *options)
    names = [script] if script == "signmuon" else [f"{script}_gpt", f"{script}_resnet"]
    files = [f"{name}.{kind}" for name in names for kind in ("png", "txt")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "trainings.json"])
    assert len(re.findall(row, printed, re.MULTILINE)) == rows, printed


def test_looking_at_the_geometry_changes_no_training() -> None:
    task = Images(None, 2, 8, 16)
    job = Job(task.key, "SGD", 0.1, workers=1, steps=3)
    seen = []
    watched = train(task, job, watch=lambda step, model: seen.append(look(task, model, step, 10)))
    assert watched.score == train(task, job).score
    assert [record["step"] for record in seen] == [0, 1, 2, 3]
    assert len({record["geometry/gradient_density"] for record in seen}) == 4, "the weights had moved"


def test_a_run_is_reckoned_from_its_first_steps() -> None:
    """Those of PowerSGD in full precision as they were, all others by their median."""
    seconds = [1.0] * EXACT + [3.0, 2.0, 9.0]
    assert [cost(seconds, steps) for steps in (0.5, EXACT, EXACT + 2)] == [0.5, EXACT, EXACT + 6]
    way = Way(Job("", "", 0.1), [(0, 4.0), (10, 2.0), (20, 1.0)], seconds, [], alone=0.0)
    assert [way.reached(loss) for loss in (4.5, 3.0, 2.0, 1.5)] == [0, 5, 10, 15]
    assert level([1.0] * EXACT + [2.0, 6.0]) == [1.0] * EXACT + [4.0]
    assert math.isnan(way.reached(0.5))
    assert way.apart(EXACT) == EXACT


@pytest.mark.nightly
@pytest.mark.net
@pytest.mark.timeout(900)  # it starts 36 processes
@pytest.mark.skipif(not available(), reason="needs root and iproute2")
def test_gpt_over_a_slow_network(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.gpt_over_wire", "--short", "--out", tmp_path, timeout=880)
    rows = re.findall(r"^(.{28})[ \d.e-]{30}([ \d.]{9})[ \d.]{23}   ", printed, re.MULTILINE)
    sent = {name.rstrip(): float(mb) for name, mb in rows}
    assert list(sent) == [DDP, OURS, APART, f"{OURS}, 3 steps"]
    assert sent[APART] < sent[OURS], "15 steps and one vote"
    assert sent[OURS] < sent[DDP] / 3, "even of so small a model, most of whose bytes are headers"
    assert (tmp_path / "gpt_over_wire.png").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images of different sizes."""
    path, source = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            (path / part / label).mkdir(parents=True)
            for k in range(count):
                pixels = source.integers(0, 256, (40 + k, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / part / label / f"{k}.png")
    return path


@pytest.mark.nightly
def test_imagenet_recipe_in_lightning(folder: Path, tmp_path: Path) -> None:
    common = [folder, "--accelerator", "cpu", "--size", 32, "--batch-size", 6, "--loaders", 0, "--out", tmp_path]
    command = ["benchmarks.papers.imagenet_lightning", *common, "--devices", 2]
    assert "after 1 epochs and 2 steps" in _run(*command, "--epochs", 1)
    assert "after 2 epochs and 4 steps" in _run(*command, "--epochs", 2, "--resume")


@pytest.mark.nightly
@pytest.mark.slow  # TensorFlow takes minutes to trace a ResNet-50 of two replicas
@pytest.mark.timeout(900)
def test_imagenet_recipe_in_keras(folder: Path, tmp_path: Path) -> None:
    common = [folder, "--size", 32, "--batch-size", 6, "--out", tmp_path]
    command = ["benchmarks.papers.imagenet_keras", *common, "--replicas", 2]
    assert "after 1 epochs and 2 steps" in _run(*command, "--epochs", 1, timeout=400)
    assert "after 2 epochs and 4 steps" in _run(*command, "--epochs", 2, "--resume", timeout=400)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert len(rows) == 3
    assert "vote/agreement/rank1" in rows[0]
