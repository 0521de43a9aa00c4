"""A ResNet on CIFAR-10 with one and four workers: the votes beside the optimizers that average.

python -m benchmarks.papers.cifar10 --images DIR --out benchmarks/results/papers

A grid of learning rates and weight decays for each method, equally many runs, and three seeds at its best point. By
default a ResNet-8 of the paper's width for an epoch, which is what two cores do in an hour. The whole training, for a
GPU: ``--depth 20 --steps 62400 --device cuda``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from . import verdict_momentum
from .common import command_line, heading, publish
from .methods import Job, voted
from .tasks import STEPS, Images, Task, add_arguments
from .training import Row, Store, add_device, tuned

SHARED = verdict_momentum.RATES["resnet"]
RATES = {
    "SGD": (0.03, 0.1, 0.3, 1.0),
    "Adam": SHARED["AdamW"],
    "AdamW": SHARED["AdamW"],
    "Lion": SHARED["Lion"],
    "signSGD": (3e-4, 1e-3, 3e-3, 1e-2),
    "Signum": SHARED["Signum"],
    "verdict momentum 0.8": SHARED["verdict momentum"],
}
COUPLED = {"SGD": (0.0, 5e-4), "Adam": (0.0, 5e-4)}
"""Of these two the decay is part of the gradient."""

WORKERS = (1, 4)


def measure(task: Task, store: Store, methods: Sequence[str], steps: int) -> list[Row]:
    """Return the rows of all methods with one and with four workers, whom averaging knows by batch norm alone."""
    rows = []
    for workers in WORKERS:
        for method in methods:
            decays = COUPLED.get(method, verdict_momentum.DECAYS)
            jobs = [Job(task.key, method, lr, decay, workers, steps) for lr in RATES[method] for decay in decays]
            rows.append(tuned(task, store, jobs))
    return rows


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Return the lines, and how far the best vote is from the best of the others."""
    yield f"{'method':<24}{'workers':>8}{'lr':>9}{'decay':>8}{'accuracy':>10}{'±':>7}"
    for row in rows:
        job, mean, spread = row.job, 100 * row.mean, 100 * row.spread
        yield f"{job.method:<24}{job.workers:>8}{job.lr:>9.2g}{job.weight_decay:>8g}{mean:>9.2f}%{spread:>7.2f}"
    for workers in WORKERS:
        votes, others = (
            [100 * row.mean for row in rows if (row.job.workers, voted(row.job.method)) == (workers, vote)]
            for vote in (True, False)
        )
        if votes and others:
            best = max(votes) - max(others)
            yield f"the best vote beside the best of the others, workers {workers}: {best:+.2f} points"


def draw(rows: Sequence[Row], pyplot: Any) -> Any:
    """Return a figure of the training losses."""
    figure, panels = pyplot.subplots(1, len(WORKERS), figsize=(12, 5), sharey=True, layout="constrained")
    for axes, workers in zip(panels, WORKERS, strict=True):
        for row in (row for row in rows if row.job.workers == workers):
            axes.plot(*row.curve, "-" if voted(row.job.method) else "--", label=row.job.method)
        axes.set(title=f"workers: {workers}", xlabel="step", ylabel="training loss")
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = command_line("cifar10", __doc__)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depth", type=int, default=8, help="6n + 2; the paper's 20")
    parser.add_argument("--steps", type=int, default=STEPS["resnet"])
    add_device(parser)
    options = parser.parse_args()
    task = Images(options.images, 2 if options.short else options.width, options.depth, 16 if options.short else 128)
    store, steps = Store(options.out, options.device), 2 if options.short else options.steps
    rows = measure(task, store, options.methods, steps)
    size = f"ResNet-{options.depth} of width {task.shape[0]}, {steps} steps of {task.global_batch}"
    lines = [heading("cifar10"), size, *table(rows)]
    publish("cifar10", lines, lambda pyplot: draw(rows, pyplot), options.out)


if __name__ == "__main__":
    main()
