"""What the scripts of this folder share: the command line, the saved table and figure, and SGD beside the vote."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from signsgd_core.adversaries import Adversary
from signsgd_core.update import update_parameters

from ..machine import machine

Array = npt.NDArray[Any]


class Outcome(NamedTuple):
    """What an experiment came to: the lines of its table, and a function that draws it, given pyplot."""

    lines: list[str]
    draw: Callable[[Any], Any]


class Averaging:
    """SGD by the mean of all workers' gradients, with the interface of `signsgd_core.Reference`.

    Args:
        parameters: the tensors, floating point; copied.
        workers: M; with one it is plain SGD.
        lr: learning rate.
        adversaries: worker -> what it sends instead of its gradient.
    """

    def __init__(
        self, parameters: Sequence[Array], workers: int, lr: float, adversaries: Mapping[int, Adversary] | None = None
    ) -> None:
        self.parameters = [np.array(x) for x in parameters]
        self.workers, self.lr, self.adversaries = workers, lr, dict(adversaries or {})

    def step(self, gradients: Sequence[Sequence[Array]]) -> None:
        """Take one step, ``x ← x − lr·mean(g_i)``."""
        honest: Adversary = np.asarray
        for k, x in enumerate(self.parameters):
            sent = [self.adversaries.get(i, honest)(gradients[i][k]) for i in range(self.workers)]
            with np.errstate(over="ignore", invalid="ignore"):  # where it diverges
                self.parameters[k] = update_parameters(x, np.mean(sent, axis=0, dtype=x.dtype), self.lr, 0.0)


def mean_std(values: npt.ArrayLike, digits: int = 3, unit: str = "") -> str:
    """Return mean ± standard deviation of some runs.

    Example:
        >>> mean_std([0.97, 0.99], digits=1, unit="%")
        '98.0 ± 1.4%'
    """
    v = np.asarray(values, np.float64) * (100 if unit == "%" else 1)
    return f"{v.mean():.{digits}f} ± {v.std(ddof=1):.{digits}f}{unit}"


def beyond(one: npt.ArrayLike, other: npt.ArrayLike) -> bool:
    """Return whether two means are further apart than the runs' standard deviations together: a crude test.

    Example:
        >>> beyond([1.0, 1.1], [2.0, 2.1]), beyond([1.0, 2.0], [1.5, 2.5])
        (True, False)
    """
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return bool(abs(a.mean() - b.mean()) > a.std(ddof=1) + b.std(ddof=1))


def best(scores: Mapping[float, float]) -> float:
    """Return the learning rate of the lowest score; one that is not finite never is.

    Example:
        >>> best({0.1: 2.0, 1.0: 1.0, 10.0: float("nan")})
        1.0
    """
    return min(scores, key=lambda rate: scores[rate] if np.isfinite(scores[rate]) else np.inf)


def rate_text(rate: float, rates: Iterable[float]) -> str:
    """Return a learning rate as text, with a star if it is the smallest or largest that was tried."""
    tried = list(rates)
    return f"{rate:.3g}{'*' if len(tried) > 1 and rate in (min(tried), max(tried)) else ''}"


def command_line(name: str, document: str | None) -> argparse.ArgumentParser:
    """Return what every script's command line has: whether to be short, and where to save.

    Args:
        name: of the script and of the files that it saves.
        document: its docstring; the first line is the help.
    """
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.papers.{name}", description=(document or "").splitlines()[0]
    )
    parser.add_argument("--short", action="store_true", help="a minute at most, for tests: what it prints means little")
    parser.add_argument("--out", type=Path, help="folder for table, figure and trainings (default: save nothing)")
    return parser


def main(name: str, document: str | None, experiment: Callable[[bool], Outcome]) -> None:
    """Run an experiment from the command line: print its table and, with --out, save it and its figure.

    Args:
        name: of the script and of the files that it saves.
        document: its docstring; the first line is the help.
        experiment: takes whether it is to be short.
    """
    parser = command_line(name, document)
    options = parser.parse_args()
    begin = time.perf_counter()
    lines, draw = experiment(options.short)
    command = " ".join([parser.prog, *sys.argv[1:]])
    lines = [f"{machine()}, one process: {command}: {time.perf_counter() - begin:.0f} s", *lines]
    publish(name, lines, draw, options.out)


def heading(name: str) -> str:
    """Return the machine and the command, the first line of a table."""
    command = " ".join([f"python -m benchmarks.papers.{name}", *sys.argv[1:]])
    # no processor, since trainings that are kept may have run on several
    return f"{platform.machine()}, {os.cpu_count()} cores; {command}"


def publish(name: str, lines: Sequence[str], draw: Callable[[Any], Any], out: Path | None) -> None:
    """Print a table and, given a folder, save it there, and its figure beside it."""
    print("\n".join(lines))
    if out is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.txt").write_text("\n".join(lines) + "\n")
    figure = draw(pyplot)
    figure.savefig(out / f"{name}.png", dpi=120)
    pyplot.close(figure)
