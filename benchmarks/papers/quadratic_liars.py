"""How many of 27 voters may invert their gradients on a noisy quadratic, under the vote and under fp32 averaging.

python -m benchmarks.papers.quadratic_liars

f(x) = ½‖x‖² in 1,000 dimensions from x ~ N(0, 1), so from about 500; every worker's gradient has noise of N(0, 1) in
each coordinate, as in the 2019 paper's toy problem (arXiv 1810.05291, figure 1). All seeds are rows of one tensor, and
all runs see the same noise. The first half of the seeds chooses the constant learning rate by the loss of the last
tenth of the steps: once without liars for all rows, and once for each; the second half is what is printed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.papers.common import Array, Averaging, Outcome, best, main, mean_std, rate_text
from signsgd_core import Reference
from signsgd_core.adversaries import Adversary, invert

WORKERS, DIMENSIONS = 27, 1_000
RATES = {
    "vote": tuple(10 ** (k / 4) for k in range(-12, 0)),  # .001 to .56
    "averaging": tuple(10 ** (k / 4) for k in range(-10, 2)),  # .0032 to 1.8
}


def shout(gradient: Any) -> Any:
    """Return a hundred times the opposite of the gradient."""
    return 100 * invert(gradient)


COLUMNS: dict[str, dict[int, Adversary]] = {
    **{f"{count}": dict.fromkeys(range(count), invert) for count in (0, 3, 6, 9, 11, 12, 13)},
    "1, ×100": {0: shout},
}
"""How many invert -> worker -> what it makes of its gradient."""

Curves = dict[tuple[str, str, float], Array]
"""(column, method, learning rate) -> loss, shape (steps, seeds)."""


def run(columns: list[str], rates: dict[str, tuple[float, ...]], steps: int, seeds: int) -> Curves:
    """Return the loss of every step of every run."""
    random = np.random.default_rng(0)
    start = random.standard_normal((seeds, DIMENSIONS), np.float32)
    runs: dict[tuple[str, str, float], Reference | Averaging] = {}
    for column in columns:
        for rate in rates["vote"]:
            runs[column, "vote", rate] = Reference([start], WORKERS, rate, betas=(0, 0), adversaries=COLUMNS[column])
        for rate in rates["averaging"]:
            runs[column, "averaging", rate] = Averaging([start], WORKERS, rate, COLUMNS[column])
    curves = {key: np.empty((steps, seeds)) for key in runs}
    for step in tqdm(range(steps), leave=False):
        noise = random.standard_normal((WORKERS, seeds, DIMENSIONS), np.float32)
        for key, one in runs.items():
            (x,) = one.parameters
            with np.errstate(over="ignore", invalid="ignore"):  # where averaging diverges
                curves[key][step] = 0.5 * (x.astype(np.float64) ** 2).sum(1)
                one.step([[x + own] for own in noise])
    return curves


def last(curve: Array) -> Array:
    """Return each seed's mean loss of the last tenth of the steps."""
    mean: Array = curve[-len(curve) // 10 :].mean(0)
    return mean


def choose(curves: Curves, column: str, method: str) -> float:
    """Return the best rate of a method in a column by the first half of the seeds."""
    tried = {key[2]: last(curve) for key, curve in curves.items() if key[:2] == (column, method)}
    return best({rate: losses[: len(losses) // 2].mean() for rate, losses in tried.items()})


def cell(curves: Curves, key: tuple[str, str, float]) -> str:
    """Return the loss at the end of the second half of the seeds."""
    losses = last(curves[key])[curves[key].shape[1] // 2 :]
    return "diverges" if not np.isfinite(losses).all() or losses.mean() > 1e6 else mean_std(losses, 2)


def table(curves: Curves, columns: list[str], rates: dict[str, tuple[float, ...]]) -> Iterator[str]:
    """Return the lines."""
    yield f"{'inverters of ' + str(WORKERS):<12}" + "".join(
        f"{method + ', fixed rate':>24}{'tuned':>18}{'at rate':>9}" for method in rates
    )
    for column in columns:
        line = f"{column:<12}"
        if column.isdigit():
            line = f"{column:<4}{int(column) / WORKERS:>4.0%}    "
        for method, tried in rates.items():
            own = choose(curves, column, method)
            fixed = choose(curves, columns[0], method)
            line += f"{cell(curves, (column, method, fixed)):>24}{cell(curves, (column, method, own)):>18}"
            line += f"{rate_text(own, tried):>9}"
        yield line


def experiment(short: bool) -> Outcome:
    """Train every column by both methods at all rates."""
    steps, seeds = (150, 4) if short else (1_000, 10)
    columns = ["0", "9", "13", "1, ×100"] if short else list(COLUMNS)
    rates = {method: tried[2::3] if short else tried for method, tried in RATES.items()}
    curves = run(columns, rates, steps, seeds)
    fixed = ", ".join(f"{choose(curves, '0', method):.3g} ({method})" for method in rates)
    lines = [
        f"{WORKERS} workers, {DIMENSIONS:,} dimensions, {steps:,} steps, {seeds // 2} seeds to choose the rate,"
        f" {seeds // 2} others in the table:",
        "loss of the last tenth of the steps, mean ± standard deviation; it starts at 500;",
        f"fixed rates, the best without inverters: {fixed}; * at the edge of the grid",
        "",
        *table(curves, columns, rates),
    ]
    return Outcome(lines, drawing(curves, columns, rates))


def drawing(curves: Curves, columns: list[str], rates: dict[str, tuple[float, ...]]) -> Callable[[Any], Any]:
    """Return what draws the loss against steps, a panel a method and choice of its rate, a curve a column."""

    def draw(pyplot: Any) -> Any:
        figure, panels = pyplot.subplots(
            2, len(rates), figsize=(10, 7.5), sharex=True, sharey=True, layout="constrained"
        )
        colors = [*pyplot.get_cmap("viridis")(np.linspace(0, 0.9, len(columns) - 1)).tolist(), "red"]
        for row, tuned in zip(panels, (False, True), strict=True):
            for axes, method in zip(row, rates, strict=True):
                for column, color in zip(columns, colors, strict=True):
                    rate = choose(curves, column if tuned else columns[0], method)
                    curve = curves[column, method, rate]
                    axes.plot(curve[:, curve.shape[1] // 2 :].mean(1), color=color, linewidth=1, label=column)
                axes.set(
                    title=f"{method}, rate {'tuned for each' if tuned else 'fixed'}", yscale="log", ylim=(0.1, 2e3)
                )
                axes.grid(alpha=0.3)
        for axes in panels[-1]:
            axes.set_xlabel("step")
        panels[0][0].set_ylabel("loss, mean of the seeds")
        panels[0][0].legend(title=f"inverters of {WORKERS}", fontsize=8)
        return figure

    return draw


if __name__ == "__main__":
    main("quadratic_liars", __doc__, experiment)
