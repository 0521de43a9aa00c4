"""SignMuon beside strong baselines: AdamW with clipping, Muon, Lion and SGD, and beside the other votes.

python -m benchmarks.papers.signmuon --text FILE --images DIR --out benchmarks/results/papers

For a small GPT and a small ResNet each: equally many tuning runs a method with four workers, two more seeds at its best
point, the votes with other numbers of workers at the same global batch, and a longer training of the GPT by the best
few. What was trained is kept in trainings.json: started again, it goes on where it was.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .common import command_line, heading, publish
from .methods import CLIPPED, Job, voted
from .search import Found, halved, search
from .tasks import Task, add_arguments, shared_task
from .training import SEEDS, Row, Store, add_device, tuned

VERDICT = "verdict momentum 0.8"
START: dict[str, dict[str, tuple[float, float | None]]] = {
    "resnet": {
        "SignMuon": (0.08, 4e-3),
        f"Muon{CLIPPED}": (0.02, 0.005),
        f"AdamW .95{CLIPPED}": (5e-3, None),
        VERDICT: (4e-3, None),
        "Signum": (1e-3, None),
        f"AdamW{CLIPPED}": (5e-3, None),
        f"Lion{CLIPPED}": (1e-3, None),
        "SGD, Nesterov": (0.1, None),
    },
    "gpt": {
        "SignMuon": (0.08, 1e-3),
        f"Muon{CLIPPED}": (0.02, 0.005),
        f"AdamW .95{CLIPPED}": (4e-3, None),
        VERDICT: (4e-3, None),
        "Signum": (2e-4, None),
        f"AdamW{CLIPPED}": (4e-3, None),
        f"Lion{CLIPPED}": (4e-4, None),
        f"SGD, Nesterov{CLIPPED}": (0.2, None),
    },
}
"""Where the search of a method begins: its learning rate, and that of what is no hidden matrix."""
DECAYS, COUPLED = (0.1, 0.0), (5e-4, 0.0)
"""Weight decays of the grid; SGD's is part of the gradient. A method with two learning rates has the first."""

MANY, OTHERS = 4, (1, 3, 8)
"""Workers in the grid, and afterwards."""
LONG_STEPS, LONG = 2_000, (f"AdamW .95{CLIPPED}", f"Muon{CLIPPED}", "SignMuon")
"""The longer training of the GPT, by whom; at the best rates of the grid or, if that is better, at half of them."""
LONG_ONCE = (VERDICT, "Signum", f"Lion{CLIPPED}", f"SGD, Nesterov{CLIPPED}")
"""By whom with one seed."""
PARTS = ("grid", "workers", "long")


class Table(NamedTuple):
    """What was trained of one task.

    Attributes:
        task: the model and its data.
        steps: of the grid.
        found: each method at its best point.
        others: the votes with other numbers of workers, one seed.
        long: the longer training.
    """

    task: Task
    steps: int
    found: list[Found]
    others: list[Row]
    long: list[Row]


def start(key: str, kind: str, method: str, steps: int) -> tuple[Job, tuple[float, ...]]:
    """Return where the search of a method begins, and the weight decays of its grid."""
    lr, other_lr = START[kind][method]
    decays = COUPLED if method.startswith("SGD") else DECAYS
    return Job(key, method, lr, decays[0], MANY, steps, other_lr=other_lr), decays


def measure(kind: str, options: argparse.Namespace, store: Store) -> Table:
    """Train what the options ask for of one task."""
    task, steps = shared_task(kind, options)
    runs, most = (2, 2) if options.short else (options.runs, 14)
    methods = [method for method in START[kind] if not options.methods or method in options.methods]
    found = [search(task, store, *start(task.key, kind, method, steps), runs, most) for method in methods]
    jobs = [one.row.job for one in found]
    others, long = list[Row](), list[Row]()
    if "workers" in options.parts:
        votes = [job._replace(workers=workers) for job in jobs if voted(job.method) for workers in OTHERS]
        others = [Row(job, store.run(task, [job], f"{task.key}, {job.workers} workers")) for job in votes]
    if "long" in options.parts and kind == "gpt":
        seeds = dict.fromkeys(LONG, SEEDS) | dict.fromkeys(LONG_ONCE, SEEDS[:1])
        longer = [job._replace(steps=4 if options.short else LONG_STEPS) for job in jobs if job.method in seeds]
        long = [tuned(task, store, [job, halved(job)], seeds[job.method]) for job in longer]
    return Table(task, steps, found, others, long)


HEAD = f"  {'method':<26}{'lr':>9}{'other lr':>9}{'decay':>8}{'runs':>5}{'bits':>8}{'mean':>9}{'±':>8}   last loss"


def table(kinds: list[Table]) -> Iterator[str]:
    """Return the lines."""
    for task, steps, found, others, long in kinds:
        yield f"\n{task.name}, {steps} steps of {task.global_batch} examples, {MANY} workers: {task.measured}"
        yield HEAD
        yield from (line(one.row, f"{one.tried}{'' if one.inside else '*'}") for one in found)
        if others:
            yield "  other numbers of workers at the same global batch and learning rates, one seed:"
        for row in others:
            yield f"  {row.job.method:<26}{row.scores[0]:>9.4f}   {row.job.workers} workers"
        if long:
            yield f"  {long[0].job.steps} steps, at these rates or half of them, whichever is better with one seed:"
            yield from (line(row, "") for row in long)
    seeds = len(SEEDS)
    yield f"\nruns: of tuning, one seed (* the best is at an edge); then mean and standard deviation of {seeds} seeds."
    yield "bits: that a worker sends for each parameter in the whole run; last loss: of the last twentieth, training."
    yield "Without a deviation it is one seed."


def line(row: Row, tried: str) -> str:
    """Return a method's line."""
    job, ends = row.job, [run.curve[-1][1] if run.curve else np.nan for run in row.runs]
    other = "" if job.other_lr is None else f"{job.other_lr:.3g}"
    spread = f"{row.spread:.4f}" if len(ends) > 1 else "-"
    return (
        f"  {job.method:<26}{job.lr:>9.3g}{other:>9}{job.weight_decay:>8g}{tried:>5}{job.bits:>8,.0f}"
        f"{row.mean:>9.4f}{spread:>8}   {np.mean(ends):.4f}"
    )


def draw(kinds: list[Table], pyplot: Any) -> Any:
    """Return a figure: training loss of each method, and scores beside the bits that were sent."""
    figure, panels = pyplot.subplots(len(kinds), 2, figsize=(12, 4.4 * len(kinds)), layout="constrained", squeeze=False)
    for (task, steps, found, _, _), (curves, scores) in zip(kinds, panels, strict=True):
        for k, row in enumerate(one.row for one in found):
            style = {"color": f"C{k}", "label": row.job.method}
            curves.plot(*row.curve, linestyle="-" if voted(row.job.method) else "--", **style)
            scores.errorbar(row.job.bits, row.mean, yerr=row.spread, marker="o", capsize=3, **style)
        curves.set(title=f"{task.name}, {steps} steps, {MANY} workers", xlabel="step", ylabel="training loss")
        curves.legend(fontsize=8)
        scores.set(xscale="log", xlabel="bits sent for each parameter", ylabel=f"{task.measured}")
        scores.set(title=f"{task.better} is better; {len(SEEDS)} seeds")
        scores.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = command_line("signmuon", __doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(START), default=list(START))
    parser.add_argument("--methods", nargs="+", help="some of them only (default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=8, help="of tuning, for each method (default: %(default)s)")
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    add_device(parser)
    options = parser.parse_args()
    store = Store(options.out, options.device, options.processes)
    kinds = [measure(kind, options, store) for kind in options.tasks]
    publish("signmuon", [heading("signmuon"), *table(kinds)], lambda pyplot: draw(kinds, pyplot), options.out)


if __name__ == "__main__":
    main()
