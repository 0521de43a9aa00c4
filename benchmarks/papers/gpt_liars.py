"""Workers that send the opposite of their gradients, on a small GPT: votes beside the mean and the median.

python -m benchmarks.papers.gpt_liars --text FILE --out benchmarks/results/papers

Seven workers, none to three of whom lie, the same global batch. Each method is tuned for each number of liars, from
neighbour to neighbour of learning rates; then three seeds. What was trained is kept in trainings.json.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from .common import command_line, heading, mean_std, publish
from .methods import CLIPPED, MEDIAN, Job, voted
from .search import Found, search
from .tasks import Task, Text, add_arguments, text_of
from .training import SEEDS, Store, add_device, draw_rows

START: dict[str, tuple[float, float | None]] = {
    "SignMuon": (0.08, 2e-3),
    "Signum": (4e-4, None),
    f"AdamW .95{CLIPPED}": (4e-3, None),
    f"AdamW .95{MEDIAN}{CLIPPED}": (4e-3, None),
}
"""Where the search of a method begins: its learning rate, and that of what is no hidden matrix."""
WORKERS, LIARS, STEPS, DECAY = 7, (0, 1, 2, 3), 300, 0.1


def measure(task: Task, options: argparse.Namespace, store: Store) -> dict[str, list[Found]]:
    """Return every method with every number of liars."""
    steps, most = (2, 2) if options.short else (STEPS, 10)
    found = dict[str, list[Found]]()
    for method, (lr, other) in START.items():
        job = Job(task.key, method, lr, DECAY, WORKERS, steps, other_lr=other)
        found[method] = [search(task, store, job._replace(liars=n), (DECAY,), 3, most) for n in LIARS]
    return found


def table(task: Task, found: dict[str, list[Found]]) -> Iterator[str]:
    """Return the lines."""
    steps = next(iter(found.values()))[0].row.job.steps
    yield f"{task.name}, {steps} steps of {task.global_batch} examples, {WORKERS} workers: {task.measured}"
    yield f"{'workers that send the opposite':<32}" + "".join(f"{n:>18}" for n in LIARS)
    for method, cells in found.items():
        name = f"{method}, vote" if voted(method) else method
        yield f"{name:<32}" + "".join(f"{mean_std(one.row.scores):>18}" for one in cells)
        rates = [f"{one.row.job.lr:.3g}{'' if one.inside else '*'} of {one.tried}" for one in cells]
        yield f"{'  learning rate, of how many':<32}" + "".join(f"{text:>18}" for text in rates)
    yield f"mean ± standard deviation of {len(SEEDS)} seeds; * the best rate is at an edge of those tried"


def draw(task: Task, found: dict[str, list[Found]], pyplot: Any) -> Any:
    """Return a figure: the loss against the number of liars."""
    rows = {method: [one.row for one in cells] for method, cells in found.items()}
    return draw_rows(task, rows, LIARS, f"workers of {WORKERS} that send the opposite", pyplot)


def main() -> None:
    parser = command_line("gpt_liars", __doc__)
    add_arguments(parser)
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    add_device(parser)
    options = parser.parse_args()
    width, layers, context, batch = (16, 1, 16, WORKERS) if options.short else (64, 2, 64, 4 * WORKERS)
    task = Text(text_of(options), width, layers, context, batch)
    found = measure(task, options, Store(options.out, options.device, options.processes))
    lines = [heading("gpt_liars"), *table(task, found)]
    publish("gpt_liars", lines, lambda pyplot: draw(task, found, pyplot), options.out)


if __name__ == "__main__":
    main()
