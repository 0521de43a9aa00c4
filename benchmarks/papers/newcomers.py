"""Workers that come and go lose their own momenta: what that costs a vote, on a small GPT.

python -m benchmarks.papers.newcomers --text FILE --out benchmarks/results/papers

Of four workers one, in turn, is replaced every so many steps by a newcomer, whose momenta start at zero. Learning rates
are signmuon.py's best. Verdict momentum has nothing to lose: it is the same on all workers. What was trained is kept in
trainings.json.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from .common import command_line, heading, mean_std, publish
from .methods import Job
from .tasks import Task, add_arguments, shared_task
from .training import SEEDS, Row, Store, add_device, draw_rows

BEST: dict[str, tuple[float, float | None, float]] = {"SignMuon": (0.08, 2e-3, 0.1), "Signum": (2e-4, None, 0.0)}
"""Learning rate, that of what is no hidden matrix, and weight decay."""
EVERY: tuple[int | None, ...] = (None, 100, 20, 5)
WORKERS = 4


def measure(task: Task, steps: int, store: Store) -> dict[str, list[Row]]:
    """Return each method's row for each pace of replacement."""
    rows = dict[str, list[Row]]()
    for method, (lr, other, decay) in BEST.items():
        job = Job(task.key, method, lr, decay, WORKERS, steps, other_lr=other)
        rows[method] = []
        for every in EVERY:
            jobs = [job._replace(replaced_every=every, seed=seed) for seed in SEEDS]
            rows[method].append(Row(jobs[0], store.run(task, jobs, f"{method}, one replaced every {every} steps")))
    return rows


def table(task: Task, rows: dict[str, list[Row]]) -> Iterator[str]:
    """Return the lines."""
    steps = next(iter(rows.values()))[0].job.steps
    yield f"{task.name}, {steps} steps of {task.global_batch} examples, {WORKERS} workers: {task.measured}"
    paces = ["never" if every is None else f"{every} steps" for every in EVERY]
    yield f"{'one worker is replaced every':<30}" + "".join(f"{pace:>18}" for pace in paces)
    for method, own in rows.items():
        yield f"{method:<30}" + "".join(f"{mean_std(row.scores):>18}" for row in own)
    yield f"mean ± standard deviation of {len(SEEDS)} seeds"


def draw(task: Task, rows: dict[str, list[Row]], pyplot: Any) -> Any:
    """Return a figure: the loss against replacements a hundred steps."""
    paces = [0.0 if every is None else 100 / every for every in EVERY]
    return draw_rows(task, rows, paces, "workers replaced in a hundred steps", pyplot)


def main() -> None:
    parser = command_line("newcomers", __doc__)
    add_arguments(parser)
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    add_device(parser)
    options: argparse.Namespace = parser.parse_args()
    task, steps = shared_task("gpt", options)
    rows = measure(task, steps, Store(options.out, options.device, options.processes))
    lines = [heading("newcomers"), *table(task, rows)]
    publish("newcomers", lines, lambda pyplot: draw(task, rows, pyplot), options.out)


if __name__ == "__main__":
    main()
