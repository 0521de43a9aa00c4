"""What momentum warmup changes: Signum with and without it, on a noisy quadratic and on digits, early and at the end.

python -m benchmarks.papers.warmup

Warmup is Theorem 3's of the 2018 paper (arXiv 1802.04434): for the first C(β) steps momentum gathers, but the ballot is
the gradient's sign. As there, the learning rate of step k is δ/√(k+1). Every cell of the table has the best δ of one
grid at its own step, so early and late losses may be of different trainings. The quadratic is ½‖x‖² in 100 dimensions
from x ~ N(0, 1) with noise of N(0, 1) in every gradient; half of the seeds choose δ, the other half is printed. On the
digits the loss on a validation set chooses, that on the test set is printed.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.papers import digits
from benchmarks.papers.common import Array, Outcome, best, beyond, main, mean_std, rate_text
from signsgd_core import Reference
from signsgd_core.settings import WarmupSteps
from signsgd_core.update import warmup_steps

DIMENSIONS = 100
BETAS, WORKERS = (0.9, 0.99), (1, 4)
WARMUPS: dict[str, WarmupSteps] = {"off": 0, "on": "auto"}
RATES = {
    "quadratic": tuple(0.01 * 2**k for k in range(8)),  # .01 to 1.28
    "digits": tuple(0.005 * 2**k for k in range(7)),  # .005 to .32
}


class Key(NamedTuple):
    """What a training is of; `rate` is δ."""

    problem: str
    workers: int
    beta: float
    warmup: str
    rate: float


class Curve(NamedTuple):
    """Mean loss by which δ is chosen, shape (points,), and loss to print, shape (points, seeds)."""

    choice: Array
    loss: Array


Curves = dict[Key, Curve]


def reference(parameters: list[Array], key: Key) -> Reference:
    """Return the workers of a training."""
    betas, warmup = (key.beta, key.beta), WARMUPS[key.warmup]
    return Reference(parameters, key.workers, key.rate, betas, warmup_steps=warmup)


def rate_at(key: Key) -> Callable[[int], float]:
    """Return the learning rate of each step, δ/√(k+1)."""
    return lambda step: key.rate / (step + 1) ** 0.5


def quadratics(keys: list[Key], points: list[int], seeds: int) -> Curves:
    """Train all with the same noise, all seeds as rows of one tensor."""
    random = np.random.default_rng(0)
    start = random.standard_normal((2 * seeds, DIMENSIONS), np.float32)
    runs = {key: reference([start], key) for key in keys}
    losses = {key: np.empty((len(points), 2 * seeds)) for key in keys}
    for step in tqdm(range(max(points)), "quadratic", leave=False):
        noise = random.standard_normal((max(WORKERS), *start.shape), np.float32)
        for key, run in runs.items():
            run.lr = rate_at(key)(step)
            run.step([[run.parameters[0] + own] for own in noise[: key.workers]])
            if step + 1 in points:
                losses[key][points.index(step + 1)] = 0.5 * (run.parameters[0] ** 2).sum(1)
    return {key: Curve(loss[:, :seeds].mean(1), loss[:, seeds:]) for key, loss in losses.items()}


def perceptrons(keys: list[Key], points: list[int], seeds: int) -> Curves:
    """Train every perceptron with each seed."""
    data = digits.load()
    losses = {key: np.empty((2, len(points), seeds)) for key in keys}
    for key, seed in tqdm(list(product(keys, range(seeds))), "digits", leave=False):
        model = digits.perceptron(seed)
        run = reference(digits.parameters(model), key)
        for _ in digits.training(model, run, data.train, seed, max(points), rate_at(key)):
            if run.t in points:
                found = [digits.measure(model, split)[0] for split in (data.validation, data.test)]
                losses[key][:, points.index(run.t), seed] = found
    return {key: Curve(validation.mean(1), test) for key, (validation, test) in losses.items()}


def chosen(curves: Curves, cell: tuple[str, int, float, str], point: int) -> Key:
    """Return the training of the best rate at a point."""
    tried = {key.rate: float(curve.choice[point]) for key, curve in curves.items() if key[:4] == cell}
    return Key(*cell, best(tried))


def table(curves: Curves, points: list[int], shown: list[int]) -> Iterator[str]:
    """Return a line a problem, number of workers, β and step, and what is beyond the seeds' spread."""
    header = f"{'warmup off':>19}{'at δ':>8}{'on':>19}{'at δ':>8}   beyond spread"
    yield f"{'':<11}{'M':<3}{'β':<6}{'C(β)':<6}{'step':>6}{header}"
    apart = []
    for (problem, workers, beta), step in product(dict.fromkeys(key[:3] for key in curves), shown):
        point = points.index(step)
        keys = [chosen(curves, (problem, workers, beta, warmup), point) for warmup in WARMUPS]
        off, on = (curves[key].loss[point] for key in keys)
        line = f"{problem:<11}{workers:<3}{beta:<6}{warmup_steps(beta):<6}{step:>6}"
        for key, losses in zip(keys, (off, on), strict=True):
            line += f"{mean_std(losses):>19}{rate_text(key.rate, RATES[problem]):>8}"
        verdict = "no"
        if beyond(off, on):
            verdict = "on is better" if on.mean() < off.mean() else "off is better"
            apart.append(verdict)
        yield f"{line}   {verdict}"
    counts = ", ".join(f"{verdict} in {apart.count(verdict)}" for verdict in sorted(set(apart)))
    yield f"of all lines: {counts or 'nothing is beyond the spread of the seeds'}"


def experiment(short: bool) -> Outcome:
    """Train on both problems with and without warmup."""
    steps, seeds = (60, 2) if short else (1_500, 3)
    shown = [10, steps] if short else [20, 100, steps]
    points = sorted({*shown, *np.geomspace(1, steps, 25 if short else 40).astype(int).tolist()})
    curves: Curves = {}
    for problem, train, repeats in (("quadratic", quadratics, 10), ("digits", perceptrons, seeds)):
        rates = RATES[problem][3::3] if short else RATES[problem]
        cells = product([problem], WORKERS, BETAS, WARMUPS, rates)
        curves |= train([Key(*cell) for cell in cells], points, repeats)
    lines = [
        f"{steps:,} steps; quadratic: 10 seeds, digits: {seeds}; loss, mean ± standard deviation; beyond spread: the",
        "means are further apart than both standard deviations together; * δ is at the edge of its grid",
        "",
        *table(curves, points, shown),
    ]
    return Outcome(lines, drawing(curves, points))


def drawing(curves: Curves, points: list[int]) -> Callable[[Any], Any]:
    """Return what draws the loss against steps, δ tuned for the end: a panel a problem and β."""

    def draw(pyplot: Any) -> Any:
        figure, panels = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained", sharex=True)
        for axes, (problem, beta) in zip(panels.flat, product(RATES, BETAS), strict=True):
            for workers, warmup in product(WORKERS, WARMUPS):
                key = chosen(curves, (problem, workers, beta, warmup), -1)
                color, style = f"C{WORKERS.index(workers)}", "-" if warmup == "on" else "--"
                label = f"M = {workers}, warmup {warmup}, δ = {key.rate:.2g}"
                axes.plot(points, curves[key].loss.mean(1), style, color=color, linewidth=1.2, label=label)
            axes.axvline(warmup_steps(beta), color="black", linewidth=0.6)
            axes.set(title=f"{problem}, β = {beta}, C(β) = {warmup_steps(beta)}", xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        for axes in panels[:, 0]:
            axes.set_ylabel("loss, mean of the seeds")
        return figure

    return draw


if __name__ == "__main__":
    main("warmup", __doc__, experiment)
