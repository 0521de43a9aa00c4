"""A small GPT over slow cables: loss against steps, bytes and wall clock, by vote and by AdamW over DDP.

python -m benchmarks.papers.gpt_over_wire --text FILE --out benchmarks/results/papers

Learning rates are tuned in one process first, equally many runs each; AdamW's serves its compressed forms, too. Then
four worker processes train, each in a network namespace of its own on a cable of a limited rate (see
benchmarks/wire.py); the clock stands while the loss on the rest of the text is looked at. It takes root and iproute2.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.network import available
from benchmarks.wire import Cell, work

from .common import command_line, heading, publish
from .gpt_worker import METHODS
from .methods import Job
from .tasks import Text, add_arguments, text_of
from .training import Store, best

WORKERS, LIMIT = 4, 3_600
RATES = {
    "AdamW": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "Signum": (5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
    "verdict momentum 0.8": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
}
DDP = "AdamW, DDP fp32"
SHORT = (DDP, "verdict momentum .8, vote")

Curve = list[dict[str, float]]


def tune(text: Path, shape: tuple[int, int, int], batch_size: int, steps: int, store: Store) -> dict[str, float]:
    """Return the best learning rate of each way, for every method of gpt_worker.py."""
    task = Text(text, *shape, global_batch=WORKERS * batch_size)
    rates = {}
    for method, tried in RATES.items():
        jobs = [Job(task.key, method, lr, 0.1, WORKERS, steps) for lr in tried]
        rates[method] = best(jobs, store.run(task, jobs, f"tuning {method}"), task.better).lr
    of = {"Signum": "Signum", "verdict": "verdict momentum 0.8"}
    return {method: rates[of.get(method.split()[0], "AdamW")] for method in METHODS}


def reached(curve: Curve, loss: float, what: str) -> float:
    """Return at how many steps, bytes or seconds a loss was first reached, between points in a straight line."""
    for before, after in itertools.pairwise(curve):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before[what] + share * (after[what] - before[what])
    return float("nan")


def table(curves: dict[str, Curve], rates: dict[str, float]) -> Iterator[str]:
    """Return the lines: what each came to, and what it took to AdamW's loss."""
    aim = curves[DDP][-1]["loss"]
    yield f"{'':<28}{'lr':>9}{'loss':>8}{'MB sent':>10}{'seconds':>9}   to the loss of {DDP}, {aim:.3f}:"
    for method, curve in curves.items():
        end, seconds, steps = curve[-1], reached(curve, aim, "seconds"), reached(curve, aim, "step")
        share = seconds / curves[DDP][-1]["seconds"]
        took = "not reached" if np.isnan(seconds) else f"{steps:.0f} steps, {seconds:.0f} s, {share:.3f} of its time"
        yield (
            f"{method:<28}{rates[method]:>9.2g}{end['loss']:>8.3f}{end['bytes'] / 1e6:>10.1f}{end['seconds']:>9.1f}"
            f"   {took}"
        )


def draw(curves: dict[str, Curve], pyplot: Any) -> Any:
    """Return a figure of the loss against steps, bytes and seconds."""
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    for axes, (what, label, unit) in zip(
        panels,
        (("step", "steps", 1), ("bytes", "megabytes sent by a worker", 1e6), ("seconds", "seconds", 1)),
        strict=True,
    ):
        for method, curve in curves.items():
            axes.plot([point[what] / unit for point in curve[1:]], [point["loss"] for point in curve[1:]], label=method)
        axes.set(xlabel=label, xscale="linear" if what == "step" else "log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss on the rest of the text, nats a byte")
    panels[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = command_line("gpt_over_wire", __doc__)
    add_arguments(parser)
    parser.add_argument("--mbits", type=int, default=100, help="Mbit/s of a cable (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of 64 bytes of each worker")
    options = parser.parse_args()
    if not available():
        parser.error("network namespaces are needed: run it as root, with iproute2 installed")
    steps, shape = options.steps, (options.width, options.layers, 64)
    if options.short:
        steps, shape = 15, (32, 1, 64)
    text = text_of(options)
    store = Store(options.out)
    rates = dict.fromkeys(METHODS, 1e-3) if options.short else tune(text, shape, options.batch_size, steps, store)
    curves = {}
    for method in SHORT if options.short else METHODS:
        module = ["benchmarks.papers.gpt_worker", "--method", method, "--text", str(text.resolve()), "--seed", "1"]
        module += ["--steps", str(steps), "--batch-size", str(options.batch_size), "--lr", str(rates[method])]
        module += ["--width", str(shape[0]), "--layers", str(shape[1]), "--context", str(shape[2])]
        cell = Cell(options.mbits, 0, WORKERS, 0)
        curves[method] = work(cell, module, method, LIMIT)["points"]
    parameters = sum(p.numel() for p in Text(text, *shape).model().parameters())
    lines = [
        heading("gpt_over_wire"),
        f"{WORKERS} workers, {options.mbits} Mbit/s, {parameters:,} parameters, {steps} steps of {WORKERS} x "
        f"{options.batch_size} x {shape[2]} bytes, one seed; bytes at the interface",
        *table(curves, rates),
    ]
    publish("gpt_over_wire", lines, lambda pyplot: draw(curves, pyplot), options.out)


if __name__ == "__main__":
    main()
