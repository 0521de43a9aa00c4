"""Where signs beat gradients and where they lose: a quadratic with sparse noise, and two with a sparse gradient.

python -m benchmarks.papers.toy_sparse_noise

f(x) = ½‖x‖² in 100 dimensions. "sparse noise" is the 2018 paper's toy problem (arXiv 1802.04434, figure A.1): x starts
dense, and the gradient of one coordinate has noise of N(0, 100²). "sparse gradient" is its mirror image: x starts as
far away, but along one coordinate, and every coordinate has noise of N(0, 1); "and loud noise": of N(0, 10²), in all as
much as the first. All repeats are rows of one tensor, for signs and SGD take every coordinate by itself. The first half
of the repeats chooses each method's constant learning rate from a grid of as many; the second half is what is printed.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.papers.common import Array, Averaging, Outcome, best, main, rate_text
from signsgd_core import Reference
from signsgd_core.analysis.geometry import density

DIMENSIONS = 100
RATES = {
    "signSGD": tuple(10 ** (k / 4) for k in range(-15, -2)),  # 1.8e-4 to .18
    "SGD": tuple(10 ** (k / 4) for k in range(-18, -5)),  # 3.2e-5 to .032
}
AIMS = ("mean of all steps", "last tenth of steps")
"""What is tuned for: the theorems bound means over all steps."""

Curves = dict[float, Array]  # learning rate -> loss, shape (steps, repeats)


class Problem(NamedTuple):
    """Where x starts, shape (repeats, dimensions), and the noise's standard deviation of each coordinate."""

    start: Array
    noise: Array


def problems(repeats: int, random: np.random.Generator) -> dict[str, Problem]:
    """Return the problems; all start at a distance of about 10 from the minimum."""
    one = np.eye(1, DIMENSIONS, dtype=np.float32)[0]
    along = np.tile(DIMENSIONS**0.5 * one, (repeats, 1)).astype(np.float32)
    return {
        "sparse noise": Problem(random.standard_normal((repeats, DIMENSIONS), np.float32), 100 * one),
        "sparse gradient": Problem(along, np.ones_like(one)),
        "sparse gradient and loud noise": Problem(along, np.full_like(one, 10)),
    }


def ratios(x: Array, noise: Array) -> tuple[float, float]:
    """Return R2 = φ(σ)/φ(g) and R1 = √φ(L)/φ(g), medians over the repeats; g = x and L = 1 here."""
    gradient = float(np.median([density(row) for row in x]))
    return density(noise) / gradient, density(np.ones(DIMENSIONS)) ** 0.5 / gradient


def train(
    method: str, rates: Iterable[float], problem: Problem, steps: int, seed: int
) -> tuple[Curves, dict[float, Array]]:
    """Return the loss of every step, and the last x, at each learning rate; all see the same noise."""
    random = np.random.default_rng(seed)
    runs: dict[float, Reference | Averaging] = {
        rate: Reference([problem.start], 1, rate, betas=(0, 0))
        if method == "signSGD"
        else Averaging([problem.start], 1, rate)
        for rate in rates
    }
    curves = {rate: np.empty((steps, len(problem.start))) for rate in runs}
    for step in tqdm(range(steps), method, leave=False):
        noise = problem.noise * random.standard_normal(problem.start.shape, np.float32)
        for rate, run in runs.items():
            (x,) = run.parameters
            curves[rate][step] = 0.5 * (x**2).sum(1)
            run.step([[x + noise]])
    return curves, {rate: run.parameters[0] for rate, run in runs.items()}


def score(curve: Array, aim: str) -> Array:
    """Return each repeat's loss, as the aim has it."""
    mean: Array = (curve if aim == AIMS[0] else curve[-len(curve) // 10 :]).mean(0)
    return mean


def quartiles(values: Array) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def rows(name: str, problem: Problem, curves: dict[str, Curves], ends: dict[str, dict[float, Array]]) -> Iterator[str]:
    """Return the lines of one problem."""
    half = len(problem.start) // 2
    r2, r1 = ratios(problem.start, problem.noise)
    yield f"{name}: at the start R2 = {r2:.3g}, R1 = {r1:.3g}, loss {quartiles(0.5 * (problem.start**2).sum(1))}"
    for aim in AIMS:
        for method in RATES:
            tried = curves[method]
            rate = best({rate: score(curve[:, :half], aim).mean() for rate, curve in tried.items()})
            cells = [f"{quartiles(score(tried[rate][:, half:], kind)):>27}" for kind in AIMS]
            r2, r1 = ratios(ends[method][rate][half:], problem.noise)
            yield f"  {method:<10}{aim:<22}{rate_text(rate, tried):>9}" + "".join(cells) + f"{r2:>10.3g}{r1:>9.3g}"


def experiment(short: bool) -> Outcome:
    """Train both methods on every problem."""
    steps, repeats = (1_000, 8) if short else (10_000, 40)
    rates = {method: tried[::2] if short else tried for method, tried in RATES.items()}
    header = f"\n  {'':<10}{'tuned for':<22}{'rate':>9}" + "".join(f"{'loss, ' + aim:>27}" for aim in AIMS)
    lines = [
        f"{DIMENSIONS} dimensions, {steps:,} steps, {repeats // 2} repeats to choose among {len(rates['SGD'])} rates,"
        f" {repeats // 2} others in the table:",
        "median [quartiles]; * the rate is at the edge of its grid",
        f"{header}{'R2 end':>10}{'R1 end':>9}",
    ]
    drawn = {}
    for seed, (name, problem) in enumerate(problems(repeats, np.random.default_rng(0)).items()):
        trained = {method: train(method, rates[method], problem, steps, seed + 1) for method in RATES}
        curves = {method: one[0] for method, one in trained.items()}
        lines += rows(name, problem, curves, {method: one[1] for method, one in trained.items()})
        drawn[name] = curves
    return Outcome(lines, drawing(drawn, repeats // 2))


def drawing(drawn: dict[str, dict[str, Curves]], half: int) -> Callable[[Any], Any]:
    """Return what draws the loss against steps, a panel a problem, each method tuned for the mean of all steps."""

    def draw(pyplot: Any) -> Any:
        figure, panels = pyplot.subplots(1, len(drawn), figsize=(13, 4.2), layout="constrained")
        for axes, (name, curves) in zip(panels, drawn.items(), strict=True):
            for method, tried in curves.items():
                rate = best({rate: curve[:, :half].mean() for rate, curve in tried.items()})
                low, middle, high = np.quantile(tried[rate][:, half:], [0.25, 0.5, 0.75], axis=1)
                (line,) = axes.plot(middle, linewidth=1, label=f"{method}, lr {rate:.2g}")
                axes.fill_between(range(len(middle)), low, high, color=line.get_color(), alpha=0.25, linewidth=0)
            axes.set(title=name, yscale="log", xlabel="step", ylabel="loss, median and quartiles")
            axes.grid(alpha=0.3)
            axes.legend()
        return figure

    return draw


if __name__ == "__main__":
    main("toy_sparse_noise", __doc__, experiment)
