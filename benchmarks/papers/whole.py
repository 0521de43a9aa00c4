"""Whole trainings: how votes, local steps and averaging optimizers compare at the end, not after a beginning.

python -m benchmarks.papers.whole --text FILE --out benchmarks/results/papers

A GPT takes 10,000 steps with four workers. Learning rates are tuned on shorter trainings, each method with as many:
500 steps as signmuon.py and local_steps.py do, then 2,000 steps at the best rates and at half of them. The validation
loss is measured along the way, since a model may unlearn. What was trained is kept in trainings.json: started again, it
goes on where it was.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .common import command_line, heading, publish
from .local_steps import base, better_of_two, candidates
from .methods import CLIPPED, Job, voted
from .search import search
from .signmuon import LONG_STEPS, START, halved, start
from .tasks import Task, add_arguments, shared_task
from .training import SEEDS, Row, Store, add_device, tuned

METHODS = [method for method in START["gpt"] if not method.startswith("Lion")]
LOCAL, EVERY = f"Muon{CLIPPED}", 16
"""Local steps: the optimizer inside, and how many steps lie between votes."""
STEPS = 10_000


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


def short(task: Task, store: Store, options: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    """Yield methods, and their best jobs of the short training."""
    _, steps = shared_task("gpt", options)
    runs, most = (2, 2) if options.short else (6, 14)
    for method in options.methods:
        if method == "local steps":
            jobs = candidates(base(task, "gpt", LOCAL, steps), "vote", 2 if options.short else EVERY)
            yield f"{LOCAL}, vote every {EVERY}", better_of_two(task, store, jobs).job
        else:
            yield method, search(task, store, *start(task.key, "gpt", method, steps), runs, most).row.job


def measure(task: Task, options: argparse.Namespace) -> list[End]:
    """Return every method at the end."""
    store = Store(options.out, options.device, options.processes)
    scored = Store(options.out, options.device, options.processes, scored=True)
    middle, whole, seeds = (4, 6, SEEDS[:2]) if options.short else (LONG_STEPS, STEPS, SEEDS[: options.seeds])
    jobs = dict[str, Job]()
    for name, job in short(task, store, options):
        longer = job._replace(steps=middle)
        jobs[name] = tuned(task, store, [longer, halved(longer)], SEEDS[:1]).job._replace(steps=whole)
    scored.known = store.known
    scored.run(task, [job._replace(seed=seed) for seed in seeds for job in jobs.values()], f"{task.key}, whole")
    rows = (Row(job, scored.run(task, [job._replace(seed=seed) for seed in seeds], "")) for job in jobs.values())
    return [End(name, row) for name, row in zip(jobs, rows, strict=True)]


def table(task: Task, ends: Sequence[End]) -> Iterator[str]:
    """Return the lines."""
    job, seeds = ends[0].row.job, len(ends[0].row.runs)
    yield f"\n{task.name}, {job.steps} steps of {task.global_batch} examples, {job.workers} workers: {task.measured}"
    yield f"  {'method':<28}{'lr':>9}{'other lr':>9}{'bits':>9}{'best':>9}{'step':>7}{'end':>9}{'±':>8}   last loss"
    for end in ends:
        job, (step, score) = end.row.job, end.best(task)
        other = "" if job.other_lr is None else f"{job.other_lr:.3g}"
        spread = f"{end.row.spread:.4f}" if seeds > 1 else ""
        last = float(np.mean([run.curve[-1][1] for run in end.row.runs]))
        yield (
            f"  {end.name:<28}{job.lr:>9.3g}{other:>9}{job.bits:>9,.0f}{score:>9.4f}{step:>7}"
            f"{end.row.mean:>9.4f}{spread:>8}   {last:.4f}"
        )
    yield f"\nbits: that a worker sends for each parameter in the whole run; best: the lowest mean of {seeds} seeds"
    yield "along the way; end: mean and standard deviation; last loss: of the last twentieth, training."


def draw(task: Task, ends: Sequence[End], pyplot: Any) -> Any:
    """Return a figure: scores against steps and against bits."""
    figure, (by_step, by_bits) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    for end in ends:
        steps, scores = end.path
        style = "-" if voted(end.row.job.method) or end.row.job.exchange == "vote" else "--"
        bits = np.array(steps) * end.row.job.bits / end.row.job.steps
        by_step.plot(steps, scores, style, label=end.name)
        by_bits.plot(bits, scores, style)
    lowest = min(score for end in ends for score in end.path[1])
    by_step.set(xlabel="step", ylabel=task.measured, ylim=(lowest - 0.05, lowest + 1))
    by_bits.set(xlabel="bits that a worker has sent for each parameter", xscale="log")
    by_step.set_title(f"{task.name}, {ends[0].row.job.workers} workers")
    by_step.legend(fontsize=8)
    for axes in (by_step, by_bits):
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = command_line("whole", __doc__)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "local steps"], default=[*METHODS, "local steps"])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of each (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    add_device(parser)
    options = parser.parse_args()
    task, _ = shared_task("gpt", options)
    ends = measure(task, options)
    publish("whole", [heading("whole"), *table(task, ends)], lambda pyplot: draw(task, ends, pyplot), options.out)


if __name__ == "__main__":
    main()
