"""Tuning with as many runs for each method: from neighbour to neighbour on a grid that extends itself, or by halves."""

from collections.abc import Mapping
from typing import NamedTuple

from .methods import Job
from .tasks import Task
from .training import SEEDS, Row, Store, best, tuned

FACTOR = 2.0
"""From one learning rate of the grid to the next; powers of two are exact, so that ways there and back meet."""


class Found(NamedTuple):
    """A method at its best point.

    Attributes:
        row: its seeds.
        tried: how many runs tuned it.
        inside: whether its rates have lower and higher ones beside them that were tried and are worse.
    """

    row: Row
    tried: int
    inside: bool


def search(task: Task, store: Store, start: Job, decays: tuple[float, ...], runs: int, most: int = 14) -> Found:
    """Tune a method by one seed, then train it with all seeds; the arguments are `tune`'s."""
    chosen, scores = tune(task, store, start, decays, runs, most)
    jobs = [chosen._replace(seed=seed) for seed in SEEDS]
    row = Row(chosen, store.run(task, jobs, f"{task.key}, {start.method}, seeds"))
    return Found(row, len(scores), not missing(chosen, decays, scores))


def tune(
    task: Task, store: Store, start: Job, decays: tuple[float, ...], runs: int, most: int = 14
) -> tuple[Job, dict[Job, float]]:
    """Return a method's best point, and the scores of all that were tried.

    The search goes on until the best point has all its neighbours tried: half and twice the learning rate, and likewise
    the other learning rate, or the other weight decay. Where that took fewer runs than `runs`, further points
    around the best follow.

    Args:
        task: what to train on.
        store: what was trained before.
        start: where the search begins.
        decays: weight decays of the grid; one is no choice.
        runs: of each method, at the least.
        most: runs, even where the best is at an edge.
    """
    scores: dict[Job, float] = {}
    chosen, new = start, [start]
    while new := new[: most - len(scores)]:
        outcomes = store.run(task, new, f"{task.key}, {start.method}")
        scores |= {job: run.score for job, run in zip(new, outcomes, strict=True)}
        known = list(scores)
        chosen = best(known, store.run(task, known, ""), task.better)
        new = missing(chosen, decays, scores) or around(chosen, decays, scores)[: max(runs - len(scores), 0)]
    return chosen, scores


def halved_until_worse(task: Task, store: Store, job: Job) -> Job:
    """Return the best of a job and of those at half its rates, half of these, and so on; the last tried is worse."""
    tried = [job, halved(job)]
    while (best := tuned(task, store, tried, SEEDS[:1]).job) == tried[-1]:
        tried.append(halved(best))
    return best


def halved(job: Job) -> Job:
    """Return a job at half its learning rates."""
    return scaled(job, 0.5)


def scaled(job: Job, by: float) -> Job:
    """Return a job at `by` times its learning rates."""
    return job._replace(lr=by * job.lr, other_lr=job.other_lr and by * job.other_lr)


def missing(job: Job, decays: tuple[float, ...], tried: Mapping[Job, float]) -> list[Job]:
    """Return a job's neighbours that were not tried."""
    neighbours = [*_rates(job, FACTOR), *_seconds(job, decays)]
    return [one for one in neighbours if one not in tried]


def around(job: Job, decays: tuple[float, ...], tried: Mapping[Job, float]) -> list[Job]:
    """Return the points behind a job's neighbours that were not tried: the corners, then the next rates."""
    corners = [one for beside in _seconds(job, decays) for one in _rates(beside, FACTOR)]
    further = [*corners, *_rates(job, FACTOR**2)]
    return [one for one in further if one not in tried]


def _rates(job: Job, factor: float) -> list[Job]:
    """Return the job's neighbours on the first axis."""
    return [job._replace(lr=job.lr * by) for by in (factor, 1 / factor)]


def _seconds(job: Job, decays: tuple[float, ...]) -> list[Job]:
    """Return the job's neighbours on the second axis: the other learning rate, or the weight decay."""
    if job.other_lr is not None:
        return [job._replace(other_lr=job.other_lr * by) for by in (FACTOR, 1 / FACTOR)]
    return [job._replace(weight_decay=decay) for decay in decays if decay != job.weight_decay]
