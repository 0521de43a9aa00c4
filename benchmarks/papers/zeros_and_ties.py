"""What a zero and a tied vote should count as: three rules, two to five workers, drift and digits.

python -m benchmarks.papers.zeros_and_ties

First, how far coordinates drift by signSGD with a learning rate of 1 whose gradients are zero on some or all workers,
or pure noise. Then a perceptron on handwritten digits, of whose gradients' entries a fifth or more is exactly zero,
with signSGD and Signum. The learning rate falls by a cosine; the best of a grid is chosen for each row by the loss on a
validation set, mean of the seeds; the test set is what is printed.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from benchmarks.papers import digits
from benchmarks.papers.common import Array, Outcome, best, beyond, main, mean_std, rate_text
from signsgd_core import Reference
from signsgd_core.ballots import Zeros

RULES: tuple[Zeros, ...] = get_args(Zeros)
WORKERS = (2, 3, 4, 5)
METHODS = {"signSGD": (0.0, 0.0), "Signum .9": (0.9, 0.9)}
RATES = tuple(0.016 * 2 ** (k / 2) for k in range(-5, 2))  # .0028 to .023
PROBES = ("all zero", "one worker's noise", "one worker's signal", "noise on all")
"""What coordinates are of: zero on all but one worker, drawn anew each step, where that one has noise or always −1."""

COORDINATES = 1_000


def probe(workers: int, rule: Zeros, steps: int) -> dict[str, Array]:
    """Return how far each coordinate of each probe has come, in learning rates."""
    random = np.random.default_rng(0)
    reference = Reference([np.zeros(COORDINATES)] * len(PROBES), workers, 1.0, betas=(0, 0), zeros=rule)
    for _ in range(steps):
        noise = random.standard_normal((workers, COORDINATES))
        chosen = random.integers(workers, size=COORDINATES) == np.arange(workers)[:, None]
        reference.step(list(zip(np.zeros_like(noise), chosen * noise, -1.0 * chosen, noise, strict=True)))
    return dict(zip(PROBES, reference.parameters, strict=True))


def drift_lines(workers: tuple[int, ...], steps: int) -> Iterator[str]:
    """Return the table of drifts."""
    yield f"drift a step (root mean square of the way after {steps:,} steps), in learning rates, {COORDINATES:,}"
    yield "coordinates; a signal that comes through drifts +1"
    yield f"{'M':<3}{'zeros':<11}" + "".join(f"{name:>22}" for name in PROBES)
    for m, rule in product(workers, RULES):
        ways = probe(m, rule, steps).values()
        cells = [f"{way.mean() / steps:+.2f} ({(way**2).mean() ** 0.5:,.0f})" for way in ways]
        yield f"{m:<3}{rule:<11}" + "".join(f"{cell:>22}" for cell in cells)


class Run(NamedTuple):
    """What a training came to.

    Attributes:
        validation: loss.
        loss: on the test images.
        accuracy: on the test images, 0 to 1.
        zero: share of zeros among the entries of gradients.
        moved: how far weights went, in first learning rates, whose pixel is dark in every image to train with.
        asleep: how many of the hidden units no image to train with wakes.
    """

    validation: float
    loss: float
    accuracy: float
    zero: float
    moved: float
    asleep: float


Cell = tuple[str, int, Zeros]
Runs = dict[tuple[Cell, float], list[Run]]


def train(cell: Cell, rate: float, seed: int, data: digits.Data, steps: int) -> Run:
    """Train one perceptron."""
    method, workers, rule = cell
    model = digits.perceptron(seed)
    begin = [x.copy() for x in digits.parameters(model)]
    reference = Reference(begin, workers, rate, METHODS[method], zeros=rule)

    def cosine(step: int) -> float:
        return float(0.5 * rate * (1 + np.cos(np.pi * step / steps)))

    zeros = []
    for gradients in digits.training(model, reference, data.train, seed, steps, cosine):
        zeros.append(np.mean([np.concatenate([g.ravel() for g in worker]) == 0 for worker in gradients]))
    dark = ~data.train.images.any(0).numpy()
    moved = np.abs(reference.parameters[0] - begin[0])[:, dark].mean() / rate
    tested = digits.measure(model, data.test)
    validation, asleep = digits.measure(model, data.validation)[0], digits.asleep(model, data.train)
    return Run(validation, *tested, float(np.mean(zeros)), float(moved), asleep)


def train_all(short: bool) -> Runs:
    """Train every method, number of workers and rule at all rates with all seeds."""
    data = digits.load()
    steps, seeds = (100, 2) if short else (300, 3)
    rates = (0.016,) if short else RATES
    cells: list[Cell] = list(product(["signSGD"], (2,), RULES) if short else product(METHODS, WORKERS, RULES))
    jobs = tqdm(list(product(cells, rates, range(seeds))), leave=False)
    runs: Runs = {}
    for cell, rate, seed in jobs:
        runs.setdefault((cell, rate), []).append(train(cell, rate, seed, data, steps))
    return runs


def chosen(runs: Runs) -> dict[Cell, tuple[float, list[Run]]]:
    """Return the best learning rate of each cell, and its runs."""
    found = {}
    for cell in dict.fromkeys(cell for cell, _ in runs):
        tried = {
            rate: float(np.mean([run.validation for run in some])) for (c, rate), some in runs.items() if c == cell
        }
        rate = best(tried)
        found[cell] = rate, runs[cell, rate]
    return found


def digit_lines(runs: Runs) -> Iterator[str]:
    """Return the table of trainings, and where rules differ."""
    rates = sorted({rate for _, rate in runs})
    found = chosen(runs)
    header = f"{'test loss':>17}{'test accuracy':>16}{'zeros':>8}{'dark moved':>12}{'asleep':>8}"
    yield f"{'':<11}{'M':<3}{'zeros':<11}{'rate':>8}{header}"
    for (method, workers, rule), (rate, some) in found.items():
        loss, accuracy = mean_std([run.loss for run in some]), mean_std([run.accuracy for run in some], 1, "%")
        zero, moved, asleep = (np.mean([run[k] for run in some]) for k in (3, 4, 5))
        yield (
            f"{method:<11}{workers:<3}{rule:<11}{rate_text(rate, rates):>8}{loss:>17}{accuracy:>16}"
            f"{zero:>8.0%}{moved:>12.1f}{asleep:>8.1f}"
        )
    apart = []
    for (method, workers, rule), (_, some) in found.items():
        for other in RULES[: RULES.index(rule)]:
            losses = [[run.loss for run in runs] for runs in (some, found[method, workers, other][1])]
            if beyond(*losses):
                worse, better = (rule, other) if np.mean(losses[0]) > np.mean(losses[1]) else (other, rule)
                apart.append(f"{method}, M = {workers}: {worse} is worse than {better}")
    yield "test losses further apart than both standard deviations together:" + ("" if apart else " none")
    yield from (f"  {line}" for line in apart)


def experiment(short: bool) -> Outcome:
    """Measure drifts, then train."""
    runs = train_all(short)
    seeds = len(next(iter(runs.values())))
    lines = [
        *drift_lines(WORKERS[:2] if short else WORKERS, 200 if short else 1_000),
        "",
        f"digits, {seeds} seeds, batches of {digits.BATCH_SIZE} a worker: mean ± standard deviation; zeros:",
        "their share of gradients' entries; dark moved: how far weights of pixels that are never lit went, in learning",
        f"rates; asleep: how many of {digits.WIDTH} hidden units no image wakes; * the rate is at the edge of its grid",
        *digit_lines(runs),
    ]
    return Outcome(lines, drawing(chosen(runs)))


def drawing(found: dict[Cell, tuple[float, list[Run]]]) -> Callable[[Any], Any]:
    """Return what draws the test losses, a panel a method, a bar a rule and number of workers, the seeds as dots."""

    def draw(pyplot: Any) -> Any:
        methods = list(dict.fromkeys(method for method, _, _ in found))
        counts = list(dict.fromkeys(workers for _, workers, _ in found))
        figure, panels = pyplot.subplots(1, len(methods), figsize=(10, 4), squeeze=False, layout="constrained")
        for axes, method in zip(panels[0], methods, strict=True):
            for k, rule in enumerate(RULES):
                losses = [[run.loss for run in found[method, workers, rule][1]] for workers in counts]
                places = np.arange(len(counts)) + (k - 1) * 0.27
                axes.bar(places, [np.mean(some) for some in losses], 0.25, label=rule)
                for place, some in zip(places, losses, strict=True):
                    axes.plot([place] * len(some), some, "k.", markersize=4)
            axes.set(title=method, xticks=range(len(counts)), xticklabels=counts, xlabel="workers", ylabel="test loss")
        panels[0][0].legend(title="zeros")
        return figure

    return draw


if __name__ == "__main__":
    main("zeros_and_ties", __doc__, experiment)
