"""Verdict momentum beside AdamW, Lion and the papers' Signum, each tuned over equally many runs.

python -m benchmarks.papers.verdict_momentum --text FILE --images DIR --out benchmarks/results/papers

For a small GPT and a small ResNet each: a grid of eight runs a method with four workers, two more seeds at its best
point, and then other numbers of workers at the same global batch, with three learning rates each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .common import command_line, heading, publish
from .methods import Job, voted
from .tasks import Task, add_arguments, shared_task
from .training import SEEDS, Row, Store, add_device, tuned

RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "gpt": {
        "AdamW": (1e-3, 2e-3, 4e-3, 8e-3),
        "Lion": (1e-4, 2e-4, 4e-4, 8e-4),
        "Signum": (1e-4, 2e-4, 4e-4, 8e-4),
        "verdict momentum": (1e-3, 2e-3, 4e-3, 8e-3),
    },
    "resnet": {
        "AdamW": (1.25e-3, 2.5e-3, 5e-3, 1e-2),
        "Lion": (2.5e-4, 5e-4, 1e-3, 2e-3),
        "Signum": (2.5e-4, 5e-4, 1e-3, 2e-3),
        "verdict momentum": (1e-3, 2e-3, 4e-3, 8e-3),
    },
}
DECAYS, GAMMAS = (0.0, 0.1), (0.8, 0.95)
WORKERS = (1, 3, 8)
MANY = 4
"""Workers in the grid."""


def grid(key: str, method: str, rates: Sequence[float], steps: int) -> list[Job]:
    """Return eight runs of a method: four learning rates, and two weight decays or two γ."""
    if method == "verdict momentum":
        return [Job(key, f"{method} {gamma}", lr, 0.1, MANY, steps) for lr in rates for gamma in GAMMAS]
    return [Job(key, method, lr, decay, MANY, steps) for lr in rates for decay in DECAYS]


def tuned_grids(task: Task, store: Store, rates: Mapping[str, Sequence[float]], steps: int) -> list[Row]:
    """Return each method's best."""
    return [tuned(task, store, grid(task.key, method, tried, steps)) for method, tried in rates.items()]


def around(job: Job, workers: int) -> list[Job]:
    """Return runs with another number of workers, at half, the same and twice the learning rate."""
    return [job._replace(workers=workers, lr=job.lr * factor) for factor in (0.5, 1.0, 2.0)]


def measure(tasks: dict[str, tuple[Task, int]], store: Store) -> tuple[dict[str, list[Row]], list[Row]]:
    """Return the rows of each task with four workers, and those of the votes with other numbers of workers."""
    many: dict[str, list[Row]] = {name: [] for name in tasks}
    others: list[Row] = []
    for name, (task, steps) in tasks.items():
        many[name] = tuned_grids(task, store, RATES[name], steps)
        for row in many[name]:
            for workers in WORKERS if voted(row.job.method) else ():
                others.append(tuned(task, store, around(row.job, workers), SEEDS[:1]))
    return many, others


def table(tasks: dict[str, tuple[Task, int]], many: dict[str, list[Row]], others: Sequence[Row]) -> Iterator[str]:
    """Return the lines."""
    for name, (task, steps) in tasks.items():
        rows = many[name]
        yield f"\n{task.name}, {steps} steps of {task.global_batch} examples, {MANY} workers: {task.measured}"
        yield f"  {'method':<24}{'lr':>9}{'decay':>7}{'mean':>9}{'±':>8}   loss of the last twentieth"
        for row in rows:
            ends = [run.curve[-1][1] if run.curve else np.nan for run in row.runs]
            yield (
                f"  {row.job.method:<24}{row.job.lr:>9.2g}{row.job.weight_decay:>7g}{row.mean:>9.4f}"
                f"{row.spread:>8.4f}   {np.mean(ends):.4f}"
            )
        yield "  other numbers of workers, one seed, the best of three learning rates:"
        for row in (row for row in others if row.job.task == task.key):
            yield f"  {row.job.method:<24}{row.job.lr:>9.2g}{'':>7}{row.scores[0]:>9.4f}   {row.job.workers} workers"


def draw(tasks: dict[str, tuple[Task, int]], many: dict[str, list[Row]], others: Sequence[Row], pyplot: Any) -> Any:
    """Return a figure: training loss of each method, and the votes' scores beside the number of workers."""
    figure, panels = pyplot.subplots(len(tasks), 2, figsize=(12, 4.2 * len(tasks)), layout="constrained", squeeze=False)
    for (name, (task, _)), (curves, scores) in zip(tasks.items(), panels, strict=True):
        for row in many[name]:
            curves.plot(*row.curve, label=row.job.method)
        curves.set(title=f"{task.name}, {MANY} workers", xlabel="step", ylabel="training loss")
        curves.legend()
        for row in many[name]:
            mine = [(other.job.workers, other.scores[0]) for other in others if _same(other.job, row.job)]
            points = sorted([*mine, (MANY, row.scores[0])])
            if mine:
                scores.plot(*zip(*points, strict=True), marker="o", label=row.job.method)
            else:
                scores.axhline(row.mean, linestyle="--", linewidth=1, color="gray")
                scores.annotate(row.job.method, (1, row.mean), fontsize=8)
        scores.set(title="same global batch", xlabel="workers that vote", ylabel=f"score, {task.better} is better")
        scores.legend()
    return figure


def _same(a: Job, b: Job) -> bool:
    return (a.task, a.method) == (b.task, b.method)


def main() -> None:
    parser = command_line("verdict_momentum", __doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(RATES), default=list(RATES))
    add_device(parser)
    options = parser.parse_args()
    tasks = {name: shared_task(name, options) for name in options.tasks}
    many, others = measure(tasks, Store(options.out, options.device))
    lines = [heading("verdict_momentum"), *table(tasks, many, others)]
    publish("verdict_momentum", lines, lambda pyplot: draw(tasks, many, others, pyplot), options.out)


if __name__ == "__main__":
    main()
