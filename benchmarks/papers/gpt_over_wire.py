"""A GPT over slow cables: loss against steps, bytes and wall clock, by votes, and by AdamW and Muon over DDP.

python -m benchmarks.papers.gpt_over_wire --text FILE --out benchmarks/results/papers
python -m benchmarks.papers.gpt_over_wire --text FILE --out benchmarks/results/papers --mbits 50 --delay 40 --two-sites

Four worker processes, each in a network namespace of its own (see benchmarks/wire.py); it takes root and iproute2. The
loss at a step does not depend on the network, and the time of a step not on the loss. So each method trains once over
cables of 10 Gbit/s, for the losses, and takes its first steps once more over the slow ones, for seconds and bytes; the
median behind PowerSGD's exact steps stands for all further ones; of local steps the mean of whole rounds. The workers
share the machine's cores. What a worker's arithmetic takes with a core to itself is measured by one worker alone, and
from that is reckoned what a run would take if each had one. Learning rates are tuned in one process, on half the layers
and half as many steps; AdamW's serves its compressed forms.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.network import available
from benchmarks.wire import Cell, work

from .common import command_line, heading, publish
from .gpt_worker import ADAMW, EVERY, EXACT, LOCAL, METHODS, MUON
from .methods import Job
from .search import missing, tune
from .tasks import Text, add_arguments, text_of
from .training import Store

WORKERS, LIMIT = 4, 3_600
"""LIMIT: seconds for a run."""
FAST_CABLES = Cell(10_000, 0, WORKERS, 0)
"""Over which losses are found."""
START: dict[str, tuple[float, float | None]] = {
    ADAMW: (2e-3, None),
    MUON: (0.04, 5e-3),
    "verdict momentum 0.8": (4e-3, None),
    "SignMuon": (0.08, 1e-3),
    LOCAL: (0.04, 5e-3),
}
"""Where the search begins, at the rates of the GPT in signmuon.py: of matrices or of all, and of the rest."""
DECAYS, RUNS, MOST = (0.1,), 5, 14
"""Weight decay, no choice; runs of tuning for each method, and at most, where the best is still at an edge."""
DDP, OURS, APART = "AdamW, DDP fp32", "SignMuon, vote", f"Muon, vote every {EVERY} steps"
SHORT = (DDP, OURS, APART)
SHORTER = 5
"""SignMuon trains once more in so many times fewer steps."""


class Way(NamedTuple):
    """A method over the slow cables.

    Attributes:
        job: its learning rates and steps.
        losses: (step, loss) along the way.
        seconds: of its first steps.
        sent: bytes that a worker sent in each, or on average.
        alone: seconds of a step of one worker with a core to itself, who sends nothing.
    """

    job: Job
    losses: list[tuple[int, float]]
    seconds: list[float]
    sent: list[int] | list[float]
    alone: float

    def apart(self, steps: float) -> float:
        """Return the seconds that so many steps would take if each worker had a core to itself."""
        return cost(self.seconds, steps) - steps * max(0.0, WORKERS / (os.cpu_count() or 1) - 1) * self.alone

    def reached(self, loss: float) -> float:
        """Return at which step a loss was first reached, between points in a straight line."""
        if self.losses[0][1] <= loss:
            return self.losses[0][0]
        for (before, above), (after, below) in itertools.pairwise(self.losses):
            if below <= loss:
                return before + (above - loss) / (above - below) * (after - before)
        return float("nan")


def cost(values: list[float] | list[int], steps: float) -> float:
    """Return what so many steps take: the first as measured, each further one the median of those behind them.

    Example:
        >>> cost([5] * EXACT + [1, 2, 9], EXACT + 2) == EXACT * 5 + 2 * 2
        True
    """
    first = np.cumsum([0, *values[:EXACT]])
    return float(np.interp(steps, range(len(first)), first)) + max(0.0, steps - EXACT) * median(values[EXACT:])


class Race(NamedTuple):
    """What all runs over the network have in common; `batch_size` is a worker's, `timed` steps are on the clock."""

    text: Path
    shape: tuple[int, int, int]
    batch_size: int
    slow: Cell
    timed: int

    def losses(self, method: str, job: Job) -> list[tuple[int, float]]:
        """Train to the end."""
        return [(step, loss) for step, loss in self._work(FAST_CABLES, method, job, "--score")["losses"]]

    def over_slow_cables(self, method: str, job: Job, losses: list[tuple[int, float]]) -> Way:
        """Take the first steps, by one worker and by all."""
        job = job._replace(steps=self.timed if job.sync_every is None else EXACT + 2 * job.sync_every)
        alone = self._work(FAST_CABLES._replace(workers=1), method, job)["seconds"]
        found = self._work(self.slow, method, job)
        seconds, sent = (
            values if job.sync_every is None else level(values) for values in (found["seconds"], found["bytes"])
        )
        return Way(job._replace(steps=losses[-1][0]), losses, seconds, sent, median(alone[EXACT:]))

    def _work(self, cell: Cell, method: str, job: Job, *more: str) -> dict[str, Any]:
        module = ["benchmarks.papers.gpt_worker", "--method", method, "--text", str(self.text.resolve()), "--seed", "1"]
        module += ["--steps", str(job.steps), "--batch-size", str(self.batch_size), "--lr", str(job.lr), *more]
        module += [] if job.other_lr is None else ["--other-lr", str(job.other_lr)]
        for name, size in zip(("width", "layers", "context"), self.shape, strict=True):
            module += [f"--{name}", str(size)]
        return work(cell, module, f"{method}, {cell.mbits:,} Mbit/s, M = {cell.workers}", LIMIT)


def level(values: list[float]) -> list[float]:
    """Return the first values, and the mean of all others, which are whole rounds."""
    return [*values[:EXACT], fmean(values[EXACT:])]


def start(task: Text, method: str) -> Job:
    """Return where the search of a method begins."""
    lr, other_lr = START[method]
    job = Job(task.key, method, lr, DECAYS[0], WORKERS, other_lr=other_lr)
    if method != LOCAL:
        return job
    return job._replace(method=MUON, sync_every=EVERY, exchange="vote", outer_lr=1.0, outer_momentum=0.0)


def tuned(task: Text, steps: int, store: Store) -> tuple[dict[str, Job], str]:
    """Return the best point of each method of methods.py, and a line on how it was found."""
    starts = {method: start(task, method)._replace(steps=steps) for method in START}
    store.run(task, [job for begin in starts.values() for job in (begin, *missing(begin, DECAYS, {}))], "tuning")
    found = {method: tune(task, store, begin, DECAYS, RUNS, MOST) for method, begin in starts.items()}
    runs = ", ".join(f"{method} {len(scores)}" for method, (_, scores) in found.items())
    edges = ", ".join(method for method, (job, scores) in found.items() if missing(job, DECAYS, scores)) or "none"
    said = f"tuned on {task.shape[1]} layers and {steps} steps, one seed; runs: {runs}; best at an edge: {edges}"
    return {method: job for method, (job, _) in found.items()}, said


def race(of: Race, jobs: dict[str, Job]) -> dict[str, Way]:
    """Return all runs, the losses of all first, so that only the rest needs a quiet machine."""
    losses = {method: of.losses(method, job) for method, job in jobs.items()}
    fewer = jobs[OURS]._replace(steps=max(1, jobs[OURS].steps // SHORTER))
    shorter = of.losses(OURS, fewer)
    ways = {method: of.over_slow_cables(method, job, losses[method]) for method, job in jobs.items()}
    return ways | {f"{OURS}, {fewer.steps} steps": ways[OURS]._replace(job=fewer, losses=shorter)}


def table(ways: dict[str, Way]) -> Iterator[str]:
    """Return the lines: what each came to, and what it took to AdamW's loss."""
    whole, aim = ways[DDP], ways[DDP].losses[-1][1]
    yield (
        f"{'':<28}{'lr':>7}{'other':>8}{'steps':>7}{'loss':>8}{'MB sent':>9}{'s':>7}{'ms/step':>9}{'alone':>7}"
        f"   to the loss of {DDP}, {aim:.3f}:"
    )
    for name, way in ways.items():
        job, steps = way.job, way.reached(aim)
        share = cost(way.seconds, steps) / cost(whole.seconds, whole.job.steps)
        apart = way.apart(steps) / whole.apart(whole.job.steps)
        took = f"{steps:.0f} steps, {cost(way.seconds, steps):.0f} s, {share:.3f} of its time; apart {apart:.3f}"
        yield (
            f"{name:<28}{job.lr:>7.2g}{'' if job.other_lr is None else f'{job.other_lr:.2g}':>8}{job.steps:>7}"
            f"{way.losses[-1][1]:>8.3f}{cost(way.sent, job.steps) / 1e6:>9.1f}{cost(way.seconds, job.steps):>7.0f}"
            f"{1e3 * median(way.seconds[EXACT:]):>9.0f}{1e3 * way.alone:>7.0f}"
            f"   {'not reached' if np.isnan(steps) else took}"
        )
    yield "s: all steps by the time of the first; alone: ms of one worker's arithmetic with a core to itself;"
    yield f"apart: the share reckoned with a core for each of the {WORKERS} workers instead of {os.cpu_count()} for all"


def draw(ways: dict[str, Way], pyplot: Any) -> Any:
    """Return a figure of the loss against steps, bytes and seconds."""
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    for name, way in ways.items():
        steps, losses = zip(*(way.losses[1:] or way.losses), strict=True)
        sent, seconds = ([cost(of, step) for step in steps] for of in (way.sent, way.seconds))
        for axes, values in zip(panels, (steps, np.array(sent) / 1e6, seconds), strict=True):
            axes.plot(values, losses, linestyle="-" if "vote" in name else "--", label=name)
    for axes, label in zip(panels, ("steps", "megabytes sent by a worker", "seconds"), strict=True):
        axes.set(xlabel=label, xscale="linear" if label == "steps" else "log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss on the rest of the text, nats a byte")
    panels[0].legend(fontsize=8)
    return figure


def main() -> None:
    parser = command_line("gpt_over_wire", __doc__)
    add_arguments(parser)
    parser.add_argument("--mbits", type=int, default=100, help="Mbit/s of a cable (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.0, help="ms added to a round trip")
    parser.add_argument("--two-sites", action="store_true", help="the cable is between two halves of the workers")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 64 bytes of each worker")
    parser.add_argument("--timed", type=int, default=25, help="steps over the slow cables (default: %(default)s)")
    options = parser.parse_args()
    if not available():
        parser.error("network namespaces are needed: run it as root, with iproute2 installed")
    if options.timed <= EXACT:
        parser.error(f"--timed must be above {EXACT}: so many steps of PowerSGD are exact")
    slow = Cell(options.mbits, options.delay, WORKERS, 0, options.two_sites)
    of = Race(text_of(options), (options.width, options.layers, 64), options.batch_size, slow, options.timed)
    steps, methods, store = options.steps, tuple(METHODS), Store(options.out)
    if options.short:
        of, steps, methods = of._replace(shape=(32, 1, 64), batch_size=2, timed=EXACT + 3), 15, SHORT
    width, layers, context = of.shape
    half = Text(of.text, width, max(1, layers // 2), context, WORKERS * of.batch_size)
    jobs, said = {method: start(half, method) for method in START}, "not tuned"
    if not options.short:
        jobs, said = tuned(half, steps // 2, store)
    ways = race(of, {method: jobs[METHODS[method][0]]._replace(steps=steps) for method in methods})
    parameters = sum(p.numel() for p in Text(of.text, *of.shape).model().parameters())
    lines = [
        heading("gpt_over_wire"),
        f"{slow.network()}, {parameters:,} parameters, steps of {WORKERS} x {of.batch_size} x 64 bytes, one "
        f"seed; losses trained at 10 Gbit/s, {of.timed} steps timed; bytes at the interface",
        said,
        *table(ways),
    ]
    name = "gpt_two_sites" if options.two_sites else "gpt_over_wire"
    publish(name, lines, lambda pyplot: draw(ways, pyplot), options.out)


if __name__ == "__main__":
    main()
