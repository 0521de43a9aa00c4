"""The second paper's table of faults redone: how many workers may lie, under a vote and under fp32 averaging.

python -m benchmarks.liars --out benchmarks/results

Seven real worker processes over Gloo train a perceptron on handwritten digits, of which some lie about every
gradient. Each method gets in each column the best learning rate of a grid by its first seed, then runs all seeds.
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.machine import machine
from signsgd_core import demo
from signsgd_core.adversaries import Adversary, invert, send_nan
from signsgd_lightning import Signum, enable_majority_vote

WORKERS, BATCH_SIZE, WIDTH = 7, 32, 256


def shout(gradient: Any) -> Any:
    """Return a hundred times the opposite of the gradient."""
    return -100 * gradient


COLUMNS: dict[str, dict[int, Adversary]] = {
    "none": {},
    **{f"{count} of {WORKERS} invert": dict.fromkeys(range(count), invert) for count in (1, 2, 3)},
    "1 inverts, ×100": {0: shout},
    "1 sends NaN": {0: send_nan},
}
RATES = {
    "vote": (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
    "averaging": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
NAMES = {"vote": "Signum (.9, .9), majority vote", "averaging": "SGD, momentum .9, fp32 averaging"}


@dataclass
class Run:
    """One training: what it was, and its accuracy on the test images, 0 to 1."""

    method: str
    column: str
    rate: float
    seed: int
    accuracy: float


def train(method: str, liars: dict[int, Adversary], rate: float, seed: int, data: demo.Data, steps: int) -> float:
    """Train on this rank among all; return the accuracy of rank 0's model."""
    rank = dist.get_rank()
    torch.manual_seed(seed)
    model = perceptron()
    take_step = voting(model, liars, rate) if method == "vote" else averaging(model, liars, rate)
    images, labels = torch.from_numpy(data.train_images).float() / 127.5 - 1, torch.from_numpy(data.train_labels)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % (len(images) // (WORKERS * BATCH_SIZE)) == 0:
            order = torch.randperm(len(images), generator=generator)  # the same on all ranks
            shares = order[: len(images) // (WORKERS * BATCH_SIZE) * WORKERS * BATCH_SIZE].view(-1, WORKERS, BATCH_SIZE)
        mine = shares[step % len(shares), rank]
        take_step(images[mine], labels[mine], 0.5 * rate * (1 + np.cos(np.pi * step / steps)))
    with torch.no_grad():
        right = model(torch.from_numpy(data.test_images).float() / 127.5 - 1).argmax(1)
    return float((right == torch.from_numpy(data.test_labels)).float().mean())


def perceptron() -> nn.Module:
    """Return a network for the digits, small enough for seven workers on two cores."""
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


TakeStep = Callable[[Tensor, Tensor, float], None]


def voting(model: nn.Module, liars: dict[int, Adversary], rate: float) -> TakeStep:
    """Return a function that takes one step by majority vote."""
    ddp = DistributedDataParallel(model)
    optimizer = Signum(model.parameters(), lr=rate)
    enable_majority_vote(ddp, optimizer, adversaries=liars)

    def take_step(x: Tensor, y: Tensor, lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()

    return take_step


def averaging(model: nn.Module, liars: dict[int, Adversary], rate: float) -> TakeStep:
    """Return a function that takes one step by the mean of the gradients that the workers send."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    lie = liars.get(dist.get_rank())

    def take_step(x: Tensor, y: Tensor, lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(model(x), y)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if lie is not None:
            for gradient in gradients:
                gradient.copy_(torch.from_numpy(np.array(lie(gradient.numpy()))))
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = torch.split(flat / WORKERS, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        optimizer.step()

    return take_step


def worker(rank: int, port: int, options: argparse.Namespace) -> None:
    """Run all trainings on one rank; the first one reports."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    data, runs = demo.load(None, options.out), list[Run]()
    count = sum(len(RATES[method]) + options.seeds - 1 for method in RATES for _ in COLUMNS)
    bar = tqdm(total=count, disable=rank > 0)
    for column, _liars in COLUMNS.items():
        for method, rates in RATES.items():

            def run(rate: float, seed: int, method: str = method, column: str = column) -> Run:
                runs.append(
                    Run(method, column, rate, seed, train(method, COLUMNS[column], rate, seed, data, options.steps))
                )
                bar.update()
                bar.set_postfix_str(f"{column}, {method}: {runs[-1].accuracy:.1%}")
                return runs[-1]

            best = max((run(rate, 0) for rate in rates), key=lambda one: one.accuracy).rate
            chosen = torch.tensor(best, dtype=torch.float64)
            dist.broadcast(chosen, 0)
            for seed in range(1, options.seeds):
                run(float(chosen), seed)
    bar.close()
    if rank == 0:
        report(runs, options)
    dist.destroy_process_group()


def report(runs: list[Run], options: argparse.Namespace) -> None:
    """Print the table; save it and the plot."""
    table: dict[tuple[str, str], list[Run]] = {}
    for method in RATES:
        for column in COLUMNS:
            cell = [run for run in runs if (run.method, run.column) == (method, column)]
            best = max((run for run in cell if run.seed == 0), key=lambda run: run.accuracy).rate
            table[method, column] = [run for run in cell if run.rate == best]
    command = " ".join(["python -m benchmarks.liars", *sys.argv[1:]])
    lines = [
        f"{machine()}, torch {torch.__version__}",
        f"{command}: {WORKERS} workers, {options.steps} steps, {options.seeds} seeds",
        f"{'test accuracy, mean (worst), at learning rate':<46}" + "".join(f"{column:>24}" for column in COLUMNS),
    ]
    for method, name in NAMES.items():
        cells = []
        for column in COLUMNS:
            accuracies = [run.accuracy for run in table[method, column]]
            rate = table[method, column][0].rate
            cells.append(f"{np.mean(accuracies):>9.1%} ({min(accuracies):.1%}) {rate:<6g}")
        lines.append(f"{name:<46}" + "".join(f"{cell:>24}" for cell in cells))
    print("\n" + "\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "liars.txt").write_text("\n".join(lines) + "\n")
    save_plot(table, options.out / "liars.png")


def save_plot(table: dict[tuple[str, str], list[Run]], path: Path) -> None:
    """Save the accuracies, a bar a method in each column, the seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for k, (method, name) in enumerate(NAMES.items()):
        places = np.arange(len(COLUMNS)) + (k - 0.5) * 0.38
        cells = [[run.accuracy for run in table[method, column]] for column in COLUMNS]
        axes.bar(places, [np.mean(cell) for cell in cells], 0.36, label=name)
        for place, cell in zip(places, cells, strict=True):
            axes.plot([place] * len(cell), cell, "k.", markersize=4)
    axes.set(xticks=range(len(COLUMNS)), xticklabels=COLUMNS, ylabel="test accuracy", ylim=(0, 1))
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("signsgd_demo"), help="where to save both")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    spawn(worker, (free, parser.parse_args()), WORKERS)  # type: ignore[no-untyped-call]
