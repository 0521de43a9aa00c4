"""Training by any method with `M` workers in one process: averaged gradients, or a majority vote.

Every worker draws its own part of the same global batch, and batch norm sees a worker's part alone, as on machines of
their own. All methods have the same schedule: linear warmup over a twentieth of the steps, then half a cosine.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .methods import Job, voted, workers_of
from .tasks import Task

SEEDS = (0, 1, 2)
"""Of a method at its best point; the grid has the first."""


class Run(NamedTuple):
    """What a job came to.

    Attributes:
        score: at the end.
        curve: (step, mean training loss since the point before) along the way.
        scores: (step, score) along the way, if asked for.
    """

    score: float
    curve: list[tuple[int, float]]
    scores: Sequence[tuple[int, float]] = ()


def train(
    task: Task,
    job: Job,
    points: int = 20,
    watch: Callable[[int, nn.Module], None] | None = None,
    scored: bool = False,
) -> Run:
    """Train once; a loss that is not finite ends it with the worst score.

    Args:
        task: the model and its data, on the device to train on.
        job: how to train it.
        points: how many of the curve to keep.
        watch: gets the steps taken so far, and the model, before each step and at the end.
        scored: whether the model is scored at these points.
    """
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    model = task.model().to(task.device)
    models, update = workers_of(model, job)
    sources = [np.random.default_rng([job.seed, worker]) for worker in range(job.workers)]
    curve, losses, scores = list[tuple[int, float]](), list[float](), list[tuple[int, float]]()
    for step in range(job.steps):
        if watch is not None:
            watch(step, model)
        gradients = []
        for k, (worker, source) in enumerate(zip(models, sources, strict=True)):
            loss = task.loss(worker, task.batch(task.global_batch // job.workers, source))
            of_worker = torch.autograd.grad(loss, list(worker.parameters()))
            gradients.append([-g for g in of_worker] if k < (job.liars or 0) else list(of_worker))
            losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Run(math.nan, curve, scores)
        update(gradients, schedule(step, job.steps))
        if (step + 1) * points // job.steps > step * points // job.steps:
            curve.append((step + 1, float(np.mean(losses))))
            losses.clear()
            if scored:
                scores.append((step + 1, task.score(model)))
    if watch is not None:
        watch(job.steps, model)
    return Run(task.score(model), curve, scores)


def schedule(step: int, steps: int) -> float:
    """Return the learning rate's share of its peak."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


class Store:
    """Runs of jobs in `trainings.json`: an interrupted grid goes on where it was, and scripts share what they train.

    Args:
        folder: where the file is, or None to keep nothing.
        device: to train on, such as "cuda".
        processes: how many train at a time; None for one a core.
        scored: whether what is trained is scored along the way.
        trainer: what trains, given task, job and `scored`.
    """

    def __init__(
        self,
        folder: Path | None,
        device: str = "cpu",
        processes: int | None = None,
        scored: bool = False,
        trainer: Callable[..., Run] = train,
    ) -> None:
        self.path, self.device, self.scored = folder and folder / "trainings.json", device, scored
        self.trainer = trainer
        self.processes = processes or os.cpu_count()
        self.known: dict[str, Run] = {}
        if self.path is not None and self.path.exists():
            self.known = {key: Run(*value) for key, value in json.loads(self.path.read_text()).items()}

    def run(self, task: Task, jobs: Iterable[Job], title: str) -> list[Run]:
        """Return what the jobs come to, each trained in a process of its own unless it is known."""
        jobs = list(jobs)
        if new := list(dict.fromkeys(job for job in jobs if job.key not in self.known)):
            self._train(task, new, title)
        return [self.known[job.key] for job in jobs]

    def _train(self, task: Task, jobs: Sequence[Job], title: str) -> None:
        with ProcessPoolExecutor(self.processes, initializer=_share, initargs=(task, self.device)) as pool:
            futures = [(job, pool.submit(_job, self.trainer, job, self.scored)) for job in jobs]
            for job, future in tqdm(futures, title, leave=False):
                self.known[job.key] = future.result()
                self._save()

    def _save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            known = {key: run if run.scores else run[:2] for key, run in self.known.items()}
            part.write_text(json.dumps(known, indent=0) + "\n")
            part.replace(self.path)


_shared: list[Task] = []
"""What this process trains."""


def _share(task: Task, device: str) -> None:
    torch.set_flush_denormal(True)  # weights of dead units decay to such, which slow a CPU down
    task.to(device)
    _shared.append(task)


def _job(trainer: Callable[..., Run], job: Job, scored: bool) -> Run:
    return trainer(_shared[0], job, scored=scored)


def best(jobs: Sequence[Job], outcomes: Sequence[Run], better: str) -> Job:
    """Return the job with the best score; one that diverged never is."""
    sign = 1 if better == "higher" else -1
    return max(zip(jobs, outcomes, strict=True), key=lambda pair: (math.isfinite(s := pair[1].score), sign * s))[0]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where to train."""
    parser.add_argument("--device", default="cpu", help='such as "cuda" (default: %(default)s)')


class Row(NamedTuple):
    """A method at its best point: the job of its first seed, and the runs of all seeds."""

    job: Job
    runs: list[Run]

    @property
    def scores(self) -> list[float]:
        return [run.score for run in self.runs]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """Standard deviation of the seeds' scores."""
        return float(np.std(self.scores, ddof=1))

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """Steps, and the mean training loss of all seeds."""
        losses = np.array([[loss for _, loss in run.curve] for run in self.runs])
        return [step for step, _ in self.runs[0].curve], losses.mean(0).tolist()


def tuned(task: Task, store: Store, jobs: Sequence[Job], seeds: Sequence[int] = SEEDS) -> Row:
    """Return the best of some jobs with all seeds."""
    what = f"{task.key}, {jobs[0].method}, {jobs[0].workers} workers"
    chosen = best(jobs, store.run(task, jobs, what), task.better)
    return Row(chosen, store.run(task, [chosen._replace(seed=seed) for seed in seeds], f"{what}, seeds"))


def draw_rows(task: Task, rows: Mapping[str, Sequence[Row]], places: Sequence[float], label: str, pyplot: Any) -> Any:
    """Return a figure: each method's mean score and spread at some places of an axis with that label; votes solid."""
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for method, own in rows.items():
        style: dict[str, Any] = {"linestyle": "-" if voted(method) else "--", "marker": "o", "capsize": 3}
        axes.errorbar(places, [row.mean for row in own], yerr=[row.spread for row in own], label=method, **style)
    axes.set(xlabel=label, ylabel=task.measured, xticks=places)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
