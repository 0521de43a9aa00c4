"""Whole trainings: how votes, local steps and averaging optimizers compare at the end, not after a beginning.

python -m benchmarks.papers.whole --text FILE --images DIR --out benchmarks/results/papers

A GPT takes 10,000 steps, a ResNet of nine layers ten epochs, with four workers. Learning rates are tuned on shorter
trainings: those of signmuon.py and local_steps.py, each method with as many, then 2,000 steps of the GPT, or an epoch
of the larger ResNet, at the best rates and at half of them, and at half of these as long as that is better. Scores are
measured along the way, since a model may unlearn. What was trained is kept in trainings.json: started again, it goes on
where it was.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .common import command_line, heading, publish
from .local_steps import base, better_of_two, candidates
from .methods import CLIPPED, Job, voted
from .search import halved_until_worse, search
from .signmuon import LONG_STEPS, START, start
from .tasks import Images, Task, add_arguments, shared_task
from .training import SEEDS, Row, Store, add_device

LOCAL, INSIDE, EVERY = "local steps", f"Muon{CLIPPED}", 16
"""Local steps: what they are called, the optimizer inside, and how many steps lie between votes."""
STEPS = {"gpt": (LONG_STEPS, 10_000), "resnet": (390, 3_900)}
"""Of the second tuning, and of the whole training."""


class End(NamedTuple):
    """A method's whole training: its name, and its seeds with the first one's job."""

    name: str
    row: Row

    @property
    def path(self) -> tuple[list[int], list[float]]:
        """Steps, and the seeds' mean score there."""
        scores = np.array([[score for _, score in run.scores] for run in self.row.runs])
        return [step for step, _ in self.row.runs[0].scores], scores.mean(0).tolist()

    def best(self, task: Task) -> tuple[int, float]:
        """Return where the seeds' mean score is best, and this score."""
        sign = 1 if task.better == "higher" else -1
        return max(zip(*self.path, strict=True), key=lambda point: sign * point[1])


def tuned_short(kind: str, options: argparse.Namespace, store: Store) -> Iterator[tuple[str, Job]]:
    """Yield methods, and their best jobs of the short training."""
    task, steps = shared_task(kind, options)
    runs, most = (2, 2) if options.short else (6, 14)
    for method in [*START[kind], LOCAL]:
        if options.methods and method not in options.methods:
            continue
        if method == LOCAL:
            jobs = candidates(base(task, kind, INSIDE, steps), "vote", 2 if options.short else EVERY)
            yield f"{INSIDE}, vote every {EVERY}", better_of_two(task, store, jobs).job
        else:
            yield method, search(task, store, *start(task.key, kind, method, steps), runs, most).row.job


def whole_task(kind: str, options: argparse.Namespace) -> Task:
    """Return the model that is trained to the end, and its data."""
    if kind == "resnet" and not options.short:
        return Images(options.images, 16, 9, 128)
    return shared_task(kind, options)[0]


def measure(kind: str, options: argparse.Namespace) -> tuple[Task, list[End]]:
    """Return every method of one task at the end."""
    store = Store(options.out, options.device, options.processes)
    middle, steps = (4, 6) if options.short else STEPS[kind]
    seeds, task = SEEDS[: options.seeds], whole_task(kind, options)
    jobs = dict[str, Job]()
    for name, job in tuned_short(kind, options, store):
        jobs[name] = halved_until_worse(task, store, job._replace(task=task.key, steps=middle))._replace(steps=steps)
    scored = Store(options.out, options.device, options.processes, scored=True)
    scored.run(task, [job._replace(seed=seed) for seed in seeds for job in jobs.values()], f"{task.key}, whole")
    rows = (Row(job, scored.run(task, [job._replace(seed=seed) for seed in seeds], "")) for job in jobs.values())
    return task, [End(name, row) for name, row in zip(jobs, rows, strict=True)]


def table(task: Task, ends: Sequence[End]) -> Iterator[str]:
    """Return the lines."""
    job, seeds = ends[0].row.job, len(ends[0].row.runs)
    yield f"\n{task.name}, {job.steps} steps of {task.global_batch} examples, {job.workers} workers: {task.measured}"
    yield f"  {'method':<28}{'lr':>9}{'other lr':>9}{'bits':>9}{'best':>9}{'step':>7}{'end':>9}{'±':>8}   last loss"
    for end in ends:
        job, (step, score) = end.row.job, end.best(task)
        other = "-" if job.other_lr is None else f"{job.other_lr:.3g}"
        spread = f"{end.row.spread:.4f}" if seeds > 1 else "-"
        last = float(np.mean([run.curve[-1][1] for run in end.row.runs]))
        yield (
            f"  {end.name:<28}{job.lr:>9.3g}{other:>9}{job.bits:>9,.0f}{score:>9.4f}{step:>7}"
            f"{end.row.mean:>9.4f}{spread:>8}   {last:.4f}"
        )
    yield f"\nmean and standard deviation of {seeds} of the seeds; bits: that a worker sends for each parameter in the"
    yield "whole run; best: along the way, and when; last loss: of the last twentieth, training"


def draw(task: Task, ends: Sequence[End], pyplot: Any) -> Any:
    """Return a figure: scores against steps and against bits."""
    figure, (by_step, by_bits) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for end in ends:
        steps, scores = end.path
        style = "-" if voted(end.row.job.method) or end.row.job.exchange == "vote" else "--"
        by_step.plot(steps, scores, style, label=end.name)
        by_bits.plot(np.array(steps) * end.row.job.bits / end.row.job.steps, scores, style)
    shown = [score for end in ends for step, score in zip(*end.path, strict=True) if 10 * step >= end.row.job.steps]
    room = 0.05 * (max(shown) - min(shown)) + 1e-3
    for axes in (by_step, by_bits):
        axes.set(ylabel=task.measured, ylim=(min(shown) - room, max(shown) + room))
        axes.grid(alpha=0.3)
    by_step.set(title=f"{task.name}, {ends[0].row.job.workers} workers; {task.better} is better", xlabel="step")
    by_bits.set(xlabel="bits that a worker has sent for each parameter", xscale="log")
    by_step.legend(fontsize=8)
    return figure


def main() -> None:
    parser = command_line("whole", __doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--methods", nargs="+", help="some of them only (default: all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of each (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    add_device(parser)
    options = parser.parse_args()
    for kind in options.tasks:
        task, ends = measure(kind, options)
        lines = [heading("whole"), *table(task, ends)]
        publish(f"whole_{kind}", lines, partial(draw, task, ends), options.out)


if __name__ == "__main__":
    main()
