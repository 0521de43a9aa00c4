"""Densities of gradient, noise and curvature through trainings of a GPT and a ResNet, and what they advise.

python -m benchmarks.papers.densities --text FILE --images DIR --out benchmarks/results/papers

As in the paper: at some points of a training the weights stand still while many batches pass, whose gradients' mean and
standard deviation in each coordinate are g and σ; and beyond it the Hessian's diagonal there, of one batch, is L. One
worker takes the whole batch. With --whole the GPT is trained as long as in whole.py, at the rates there.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from signsgd_core.analysis.advice import advise
from signsgd_core.analysis.geometry import Moments, density, figures
from signsgd_lightning.monitor.geometry_monitor import hessian_diagonal, twice_differentiable

from .common import command_line, heading, publish
from .methods import CLIPPED, Job
from .tasks import Task, add_arguments, shared_task
from .training import train
from .whole import STEPS

RATES: dict[str, dict[str, float]] = {
    "gpt": {"AdamW": 2e-3, "Signum": 2e-4, "verdict momentum 0.8": 4e-3},
    "resnet": {"SGD": 0.1, "AdamW": 1e-2, "Signum": 1e-3, "verdict momentum 0.8": 4e-3},
}
WHOLE = {f"AdamW{CLIPPED}": (2e-3, None, 0.0), "SignMuon": (0.04, 1e-3, 0.1)}
"""Method -> its learning rate in whole.py, that of what is no hidden matrix, and weight decay."""
POINTS = (0.0, 0.02, 0.1, 0.3, 0.6, 1.0)
"""Shares of the training."""

SHOWN = ("gradient_density", "noise_density", "noise_ratio", "curvature_density", "curvature_ratio", "signal", "snr")

Record = dict[str, float]


def look(task: Task, model: nn.Module, step: int, batches: int) -> Record:
    """Return the figures of gradients at the model's weights; the model stays as it is."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    source = np.random.default_rng([99, step])
    tens = ([_gradient(task, model, source) for _ in range(10)] for _ in range(batches // 10))  # for memory's sake
    moments = reduce(Moments.merge, (Moments.of(torch.stack(rows).numpy()) for rows in tens))
    with twice_differentiable():
        loss = task.loss(model, task.batch(task.global_batch, source))
    curvature = nn.utils.parameters_to_vector(hessian_diagonal(loss, list(model.parameters())))
    for norm in norms:
        norm.track_running_stats = True
    values = figures(moments, density(curvature.abs().numpy()))
    return {"step": step, "samples": moments.count, **values}


def _gradient(task: Task, model: nn.Module, source: np.random.Generator) -> Tensor:
    loss = task.loss(model, task.batch(task.global_batch, source))
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))


def measure(task: Task, job: Job, batches: int) -> list[Record]:
    """Train and look at the gradients at some points."""
    at, records = {int(point * job.steps) for point in POINTS}, list[Record]()

    def watch(step: int, model: nn.Module) -> None:
        if step in at:
            records.append(look(task, model, step, batches))

    train(task, job, watch=watch)
    return records


def table(task: Task, job: Job, records: list[Record]) -> Iterator[str]:
    """Return the lines: the figures through training, and the advice."""
    rates = f"lr {job.lr:g}" if job.other_lr is None else f"lr {job.lr:g} and {job.other_lr:g}"
    yield f"\n{task.name}, {job.method} with {rates}, batches of {task.global_batch}"
    yield f"{'step':>6}" + "".join(f"{shown:>19}" for shown in SHOWN)
    for record in records:
        yield f"{record['step']:>6}" + "".join(f"{record[f'geometry/{shown}']:>19.4f}" for shown in SHOWN)
    yield from advise(records, job.workers)


def draw(found: list[tuple[Task, Job, list[Record]]], pyplot: Any) -> Any:
    """Return a figure of densities and ratios through training, a row for each task."""
    tasks = list(dict.fromkeys(task.name for task, _, _ in found))
    figure, panels = pyplot.subplots(len(tasks), 2, figsize=(12, 4.2 * len(tasks)), layout="constrained", squeeze=False)
    styles = {"gradient": "-", "noise": "--", "curvature": ":"}
    methods = list(dict.fromkeys(job.method for _, job, _ in found))
    for task, job, records in found:
        steps, colour = [record["step"] for record in records], f"C{methods.index(job.method)}"
        left, right = panels[tasks.index(task.name)]
        for what, style in styles.items():
            values = [record[f"geometry/{what}_density"] for record in records]
            left.plot(steps, values, style, color=colour, marker=".")
        for what, style in (("noise_ratio", "--"), ("curvature_ratio", ":")):
            values = [record[f"geometry/{what}"] for record in records]
            right.plot(steps, values, style, color=colour, marker=".")
        left.set(title=f"{task.name}: densities φ", xlabel="step", yscale="log")
        right.set(title="R2 = φ(σ)/φ(g) and R1 = √φ(L)/φ(g)", xlabel="step", yscale="log")
        right.axhline(1, color="black", linewidth=0.8)
    axes = panels[0, 0]
    named = [axes.plot([], [], color=f"C{k}", label=method)[0] for k, method in enumerate(methods)]
    drawn = (("-", "gradient"), ("--", "noise, R2"), (":", "curvature, R1"))
    named += [axes.plot([], [], style, color="gray", label=what)[0] for style, what in drawn]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named))
    return figure


def beginnings(options: argparse.Namespace) -> Iterator[tuple[Task, Job]]:
    """Yield the short trainings of both models."""
    for kind, rates in RATES.items():
        task, steps = shared_task(kind, options)
        for method, lr in list(rates.items())[: 1 if options.short else None]:
            yield task, Job(task.key, method, lr, 0.0, 1, steps)


def whole(options: argparse.Namespace) -> Iterator[tuple[Task, Job]]:
    """Yield the GPT's trainings to the end."""
    task, _ = shared_task("gpt", options)
    steps = 2 if options.short else STEPS["gpt"][1]
    for method, (lr, other_lr, decay) in WHOLE.items():
        yield task, Job(task.key, method, lr, decay, 1, steps, other_lr=other_lr)


def main() -> None:
    parser = command_line("densities", __doc__)
    add_arguments(parser)
    parser.add_argument("--whole", action="store_true", help="through whole trainings of the GPT")
    parser.add_argument("--batches", type=int, default=400, help="that pass at a point (default: %(default)s)")
    options = parser.parse_args()
    jobs = list(whole(options) if options.whole else beginnings(options))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(measure, task, job, 20 if options.short else options.batches) for task, job in jobs]
        records = [future.result() for future in tqdm(futures, "trainings", leave=False)]
    found = [(task, job, rows) for (task, job), rows in zip(jobs, records, strict=True)]
    name = "densities_whole" if options.whole else "densities"
    lines = [heading("densities"), *(line for one in found for line in table(*one))]
    publish(name, lines, lambda pyplot: draw(found, pyplot), options.out)


if __name__ == "__main__":
    main()
