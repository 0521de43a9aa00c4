"""Local steps: a vote on displacements every `H` steps beside their fp32 mean, DiLoCo, and an exchange at every step.

python -m benchmarks.papers.local_steps --text FILE --images DIR --out benchmarks/results/papers

The inner learning rates are about the best that signmuon.py found of the same optimizer. Every row of local steps has
three inner rates and two outer settings to be tuned by, and the best one's neighbours, until the best is at no edge.
The two best have two more seeds, and the better mean counts, at no edge either. Then the vote with other numbers of
workers, and a longer training of the GPT by vote and mean with the first optimizer inside, at these rates, halved until
worse, and by the other outer step from the best of these on. Each task has a result file of its own. What was trained
is kept in trainings.json: started again, it goes on where it was.
"""

import argparse
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from .common import command_line, heading, publish
from .methods import CLIPPED, Job
from .search import halved_until_worse, scaled
from .signmuon import LONG_STEPS
from .tasks import Task, add_arguments, shared_task
from .training import SEEDS, Row, Store, add_device, tuned

ADAMW, MUON, SIGNMUON = f"AdamW .95{CLIPPED}", f"Muon{CLIPPED}", "SignMuon"
BEST: dict[str, dict[str, tuple[float, float | None]]] = {
    "gpt": {ADAMW: (2e-3, None), MUON: (0.04, 0.005), SIGNMUON: (0.08, 2e-3)},
    "resnet": {ADAMW: (2.5e-3, None), MUON: (0.08, 0.005), SIGNMUON: (0.16, 8e-3)},
}
"""Learning rates, and those of what is no hidden matrix, as signmuon.py found them."""

OUTER: dict[str, list[tuple[str, float, float]]] = {
    "vote": [("vote", 1.0, 0.0), ("vote", 1.4, 0.0)],
    "mean": [("mean", 1.0, 0.0), ("mean", 1.4, 0.0)],
    "DiLoCo": [("mean", 0.7, 0.9), ("mean", 0.35, 0.9)],
}
"""What is tried of each outer step: what is exchanged, η, μ with Nesterov's momentum."""
RATES = (1.0, 2.0, 0.5)
"""Shares of the best inner learning rate that are tried."""
MOST = 20
"""Runs that tune a row."""
EVERY, LONG = (4, 16, 64), (16,)
"""Steps between exchanges, and those of the longer training."""
MANY, OTHERS = 4, (2, 8)
"""Workers, and afterwards other numbers of them."""


class Found(NamedTuple):
    """One way to train at its best: its name, steps between exchanges, seeds, and how many runs tuned it."""

    name: str
    sync_every: int
    row: Row
    tried: int


class Table(NamedTuple):
    """What was trained of one task.

    Attributes:
        task: the model and its data.
        steps: of the trainings that tune.
        found: each way at its best.
        others: the votes with other numbers of workers, one seed.
        long: the longer training, one seed.
    """

    task: Task
    steps: int
    found: list[Found]
    others: list[Row]
    long: list[Found]


def base(task: Task, kind: str, method: str, steps: int, workers: int = MANY) -> Job:
    """Return the job of an optimizer that exchanges at every step."""
    lr, other_lr = BEST[kind][method]
    return Job(task.key, method, lr, 0.1, workers, steps, other_lr=other_lr)


def candidates(start: Job, outer: str, sync_every: int) -> list[Job]:
    """Return what is tried of one row."""
    return [
        scaled(start, share)._replace(
            sync_every=sync_every, exchange=exchange, outer_lr=outer_lr, outer_momentum=momentum
        )
        for share, (exchange, outer_lr, momentum) in itertools.product(RATES, OUTER[outer])
    ]


def inside(task: Task, store: Store, jobs: list[Job]) -> tuple[Row, int]:
    """Return the best of jobs, and how many there were: with half and twice each of its rates beside it.

    By one seed first, which is cheap, then by all.
    """
    for best in (partial(tuned, seeds=SEEDS[:1]), better_of_two):
        new = jobs
        while new and len(jobs) < MOST:
            new = [job for job in _neighbours(best(task, store, jobs).job) if job not in jobs]
            jobs = [*jobs, *new][:MOST]
    return better_of_two(task, store, jobs), len(jobs)


def _neighbours(job: Job) -> list[Job]:
    assert job.outer_lr is not None
    steps = (0.5, 2.0)
    return [*(scaled(job, by) for by in steps), *(job._replace(outer_lr=job.outer_lr * by) for by in steps)]


def better_of_two(task: Task, store: Store, jobs: list[Job]) -> Row:
    """Return the better mean of the two best jobs by one seed: settings that are near each other are told by seeds."""
    first = tuned(task, store, jobs)
    second = tuned(task, store, [job for job in jobs if job != first.job])
    sign = 1 if task.better == "higher" else -1
    return max(first, second, key=lambda row: sign * row.mean)


def measure(kind: str, options: argparse.Namespace, store: Store) -> Table:
    """Train what the options ask for of one task."""
    task, steps = shared_task(kind, options)
    found = []
    for method in BEST[kind]:
        jobs = [base(task, kind, method, steps)._replace(seed=seed) for seed in SEEDS]
        found.append(Found(method, 1, Row(jobs[0], store.run(task, jobs, f"{task.key}, {method}")), 1))
    for method, every, outer in itertools.product(options.inner, options.every, options.outer):
        sync_every = 2 if options.short else every
        row, tried = inside(task, store, candidates(base(task, kind, method, steps), outer, sync_every))
        found.append(Found(f"{method}, {outer}", sync_every, row, tried))
    votes = [one.row.job for one in found if one.row.job.exchange == "vote"]
    jobs = [job._replace(workers=workers) for job in votes for workers in options.workers]
    others = [Row(job, store.run(task, [job], f"{task.key}, {job.workers} workers")) for job in jobs]
    long = list[Found]()
    for one in found:
        here = one.sync_every in options.long and one.row.job.method == options.inner[0]
        if here and kind == "gpt" and not one.row.job.outer_momentum:
            long += longer(task, store, one, 4 if options.short else LONG_STEPS)
    return Table(task, steps, found, others, long)


def longer(task: Task, store: Store, one: Found, steps: int) -> Iterator[Found]:
    """Return a way of a longer training by each outer step: at its rates, halved until worse; then from the best on."""
    job = one.row.job._replace(steps=steps)
    for _, outer_lr, _ in OUTER[str(job.exchange)]:
        job = halved_until_worse(task, store, job._replace(outer_lr=outer_lr))
        yield one._replace(row=Row(job, store.run(task, [job], "")), tried=0)


def table(measured: Table) -> Iterator[str]:
    """Return the lines."""
    task, steps, found, others, long = measured
    yield f"\n{task.name}, {steps} steps of {task.global_batch} examples, {MANY} workers: {task.measured}"
    yield f"  {'optimizer, exchange':<28}{'H':>4}{'lr':>9}{'η':>7}{'μ':>6}{'runs':>5}{'bits':>9}{'mean':>9}{'±':>8}"
    yield from map(line, found)
    if others:
        yield "  the votes with other numbers of workers, same global batch and rates, one seed:"
    for row in others:
        yield f"  {row.job.method:<28}{row.job.sync_every:>4}   {row.job.workers} workers{row.scores[0]:>9.4f}"
    if long:
        yield f"  {long[0].row.job.steps} steps, at these rates, halved until worse, one seed:"
        yield from map(line, long)
    yield "\nruns: of tuning, one seed; bits: that a worker sends for each parameter in the whole run; then mean and"
    yield f"standard deviation of {len(SEEDS)} seeds. DiLoCo: the mean with Nesterov's momentum."


def line(found: Found) -> str:
    """Return a way's line; without tuning runs and a spread it is the longer training's."""
    name, sync_every, row, tried = found
    eta, mu = ("" if x is None else format(x, "g") for x in (row.job.outer_lr, row.job.outer_momentum))
    spread = f"{row.spread:.4f}" if len(row.runs) > 1 else "-"
    return (
        f"  {name:<28}{sync_every:>4}{row.job.lr:>9.3g}{eta:>7}{mu:>6}{tried or '':>5}{row.job.bits:>9,.0f}"
        f"{row.mean:>9.4f}{spread:>8}"
    )


def draw(measured: Table, pyplot: Any) -> Any:
    """Return a figure: scores against bits."""
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    task, steps, found, *_ = measured
    for name in dict.fromkeys(one.name for one in found):
        same = [one for one in found if one.name == name]
        bits, means = [one.row.job.bits for one in same], [one.row.mean for one in same]
        axes.errorbar(bits, means, yerr=[one.row.spread for one in same], marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="bits that a worker sends for each parameter", ylabel=task.measured)
    axes.set(title=f"{task.name}, {steps} steps, {MANY} workers; {task.better} is better")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def main() -> None:
    parser = command_line("local_steps", __doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(BEST), default=list(BEST))
    parser.add_argument("--inner", nargs="+", choices=[ADAMW, MUON], default=[MUON, ADAMW])
    parser.add_argument("--outer", nargs="+", choices=list(OUTER), default=list(OUTER), help="what is exchanged")
    parser.add_argument("--every", nargs="+", type=int, default=list(EVERY), help="H (default: %(default)s)")
    parser.add_argument("--workers", nargs="*", type=int, default=list(OTHERS), help="besides 4 (default: %(default)s)")
    parser.add_argument("--long", nargs="*", type=int, default=list(LONG), help="H of the longer training")
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    add_device(parser)
    options = parser.parse_args()
    store = Store(options.out, options.device, options.processes)
    for kind in options.tasks:
        measured = measure(kind, options, store)
        lines = [heading("local_steps"), *table(measured)]
        publish(f"local_steps_{kind}", lines, partial(draw, measured), options.out)


if __name__ == "__main__":
    main()
