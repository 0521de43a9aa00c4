"""What becomes of verdict momentum with other γ, mixed with worker momentum, and beside SGD.

python -m benchmarks.papers.verdict_variants --text FILE --images DIR --out benchmarks/results/papers

For the GPT and the ResNet of verdict_momentum.py and four workers: each variant is tuned by eight runs and repeated
with two more seeds. For the ResNet, where the votes are behind, also with rates of layers, and with four times the
batch in a fourth of the steps.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from .common import command_line, heading, publish
from .methods import PER_LAYER, Job
from .tasks import Task, add_arguments, shared_task
from .training import Row, Store, add_device, tuned
from .verdict_momentum import DECAYS, MANY, RATES, tuned_grids

WIDER, WIDE = 4, ("AdamW", "Signum", "verdict momentum")
"""Times the batch, and who gets it."""
BEHIND = "resnet"
SGD = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

Found = dict[str, tuple[Task, list[Row]]]
"""Of each experiment its task, and a row for each method."""


def variants(kind: str, key: str, steps: int) -> list[list[Job]]:
    """Return eight runs of each variant."""
    small, large = RATES[kind]["Signum"], RATES[kind]["verdict momentum"]
    mixtures = [("mixture 0.5 and 0.8", lr, 0.1) for lr in large] + [("mixture 0.9 and 0.8", lr, 0.1) for lr in small]
    grids = [
        [(f"verdict momentum {gamma}", lr, 0.1) for gamma in (0.5, 0.9) for lr in large],
        mixtures,
        [("SGD", lr, 0.0) for lr in SGD],
    ]
    if kind == BEHIND:
        grids.append([(f"Signum{PER_LAYER}", lr, decay) for lr in small for decay in DECAYS])
        grids.append([(f"verdict momentum 0.8{PER_LAYER}", lr, decay) for lr in large for decay in DECAYS])
    return [[Job(key, method, lr, decay, MANY, steps) for method, lr, decay in runs] for runs in grids]


def measure(options: argparse.Namespace, store: Store) -> Found:
    """Return the rows of all variants, those they are compared with first."""
    found = {}
    for kind in options.tasks:
        task, steps = shared_task(kind, options)
        plain = tuned_grids(task, store, RATES[kind], steps)
        found[task.name] = task, plain + [tuned(task, store, jobs) for jobs in variants(kind, task.key, steps)]
        if kind == BEHIND:
            wide, fewer = shared_task(kind, options, WIDER)
            rates = {method: RATES[kind][method] for method in WIDE}
            found[f"{task.name}, {WIDER} times the batch"] = wide, tuned_grids(wide, store, rates, fewer)
    return found


def table(found: Found) -> Iterator[str]:
    """Return the lines."""
    for name, (task, rows) in found.items():
        yield f"\n{name}, {rows[0].job.steps} steps of {task.global_batch} examples, {MANY} workers: {task.measured}"
        yield f"  {'method':<36}{'lr':>9}{'decay':>7}{'mean':>9}{'±':>8}"
        for row in rows:
            job = row.job
            yield f"  {job.method:<36}{job.lr:>9.2g}{job.weight_decay:>7g}{row.mean:>9.4f}{row.spread:>8.4f}"


def draw(found: Found, pyplot: Any) -> Any:
    """Return a figure of the scores, a panel for each experiment."""
    figure, panels = pyplot.subplots(len(found), 1, figsize=(9, 2.6 * len(found)), layout="constrained", squeeze=False)
    for (name, (task, rows)), axes in zip(found.items(), panels[:, 0], strict=True):
        for height, row in enumerate(reversed(rows)):
            axes.errorbar(row.mean, height, xerr=row.spread, marker="o", color="C0")
        axes.set_yticks(range(len(rows)), [row.job.method for row in reversed(rows)], fontsize=8)
        axes.set(title=f"{name}: {task.measured}, {task.better} is better")
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = command_line("verdict_variants", __doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(RATES), default=list(RATES))
    add_device(parser)
    options = parser.parse_args()
    found = measure(options, Store(options.out, options.device))
    lines = [heading("verdict_variants"), *table(found)]
    publish("verdict_variants", lines, lambda pyplot: draw(found, pyplot), options.out)


if __name__ == "__main__":
    main()
