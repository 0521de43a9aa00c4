"""A training during which every worker is killed and replaced twice, beside one that nobody disturbs.

python -m benchmarks.papers.churn --out benchmarks/results/papers

Four processes train a perceptron on scikit-learn's digits with SignMuon under an elastic vote. One in turn is killed by
SIGKILL and started anew, eight times in a run, so that three or four are there; a newcomer's momenta start at zero.
Every seed has another model and another order of the images.
"""

import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from ..elastic_vote import WORKERS, Lighthouse, end_all, quiet
from .common import command_line, heading, mean_std, publish

BATCH, TRAINED, LAST = 32, 1347, 30
LOST = [0, 1, 2, 3] * 2
"""Which place loses its worker, one after the other."""
CALM, DISTURBED = "undisturbed", "every worker lost twice"


class Line(NamedTuple):
    """What a worker says of a step: its place, the step, how many voted, and its batch's loss."""

    place: int
    step: int
    workers: int
    loss: float


class Run(NamedTuple):
    """What workers said of a training, and test loss and accuracy at its end."""

    lines: list[Line]
    loss: float
    accuracy: float

    @property
    def curve(self) -> tuple[list[int], list[float]]:
        """Steps, and the workers' mean loss there."""
        steps = sorted({line.step for line in self.lines})
        return steps, [float(np.mean([line.loss for line in self.lines if line.step == step])) for step in steps]

    @property
    def last(self) -> float:
        """Mean training loss of the last steps."""
        return float(np.mean(self.curve[1][-LAST:]))


def work(place: int, seed: int, steps: int, min_workers: int, lighthouse: str, results: Any) -> None:
    """Be the worker of a place: say what came of every step, and at the end the test."""
    from signsgd_lightning import ElasticBatches, Signum, enable_elastic_vote, signmuon_groups

    quiet()
    torch.manual_seed(seed)
    digits, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = digits.float() / 16
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = Signum(signmuon_groups(net, 0.02))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    settings: dict[str, Any] = {"timeout": timedelta(seconds=10), "hostname": "127.0.0.1", "min_workers": min_workers}
    vote = enable_elastic_vote(net, optimizer, lighthouse=lighthouse, state={"schedule": schedule}, **settings)
    batches = ElasticBatches(TRAINED, BATCH, vote, seed)

    def closure() -> Tensor:
        batch = next(batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    while vote.step < steps:
        loss = optimizer.step(closure)
        schedule.step()
        results.send(Line(place, vote.step, vote.workers, loss.item()))
        time.sleep(0.03)  # a model that takes longer
    vote.close()
    with torch.no_grad():
        logits, wanted = net(x[TRAINED:]), y[TRAINED:]
        test = nn.functional.cross_entropy(logits, wanted).item()
        results.send((test, (logits.argmax(1) == wanted).float().mean().item()))


def train(context: Any, seed: int, steps: int, lost: list[int]) -> Run:
    """Train, while the workers of some places are killed and replaced, evenly over the steps."""
    lighthouse, everybody, open_ends = Lighthouse(context), list[Any](), list[Any]()
    here: dict[int, Any] = {}
    lines, tests = list[Line](), list[tuple[float, float]]()

    def start(place: int) -> None:
        end, other = context.Pipe(duplex=False)  # one for each, since a killed worker may leave half a message
        least = 2 if lost else WORKERS
        here[place] = context.Process(target=work, args=(place, seed, steps, least, lighthouse.address, other))
        here[place].start()
        other.close()
        everybody.append(here[place])
        open_ends.append(end)

    def listen(until: Callable[[], bool]) -> None:
        while not until():
            ready: list[Any] = wait(open_ends, timeout=120)
            if not ready:
                raise TimeoutError("the workers do not come further")
            for end in ready:
                try:
                    said = end.recv()
                except EOFError:
                    open_ends.remove(end)
                else:
                    (lines if isinstance(said, Line) else tests).append(said)

    def reached(places: list[int], step: int) -> bool:
        return all(any(line.place == place and line.step >= step for line in lines[-400:]) for place in places)

    try:
        for place in range(WORKERS):
            start(place)
        for k, place in enumerate(lost):
            others = [other for other in range(WORKERS) if other != place]
            at = (k + 1) * steps // (len(lost) + 1)
            listen(partial(reached, others, at))
            here[place].kill()
            listen(partial(reached, others, at + 5))
            start(place)
        listen(lambda: len(tests) == WORKERS)
    finally:
        end_all(everybody, [lighthouse])
    if len(set(tests)) > 1:
        raise AssertionError(f"the workers do not hold the same model at the end: {tests}")
    return Run(lines, *tests[0])


def draw(calm: list[Run], disturbed: list[Run], pyplot: Any) -> Any:
    """Return a figure: who voted when in the first disturbed run, and the training loss of all."""
    figure, (who, what) = pyplot.subplots(2, sharex=True, figsize=(8, 5.5), layout="constrained")
    for place in range(WORKERS):
        steps = [line.step for line in disturbed[0].lines if line.place == place]
        who.plot(steps, [place] * len(steps), "|", markersize=14)
    who.set(
        ylabel="place",
        yticks=range(WORKERS),
        ylim=(-0.5, WORKERS - 0.5),
        title="Who voted when, in one of the disturbed runs",
    )
    for runs, color, label in ((calm, "tab:blue", CALM), (disturbed, "tab:red", DISTURBED)):
        for k, run in enumerate(runs):
            what.plot(*run.curve, color=color, alpha=0.5, linewidth=0.8, label=None if k else label)
    what.set(xlabel="step", ylabel="training loss", yscale="log", title=f"{len(calm)} seeds each")
    what.legend()
    what.grid(alpha=0.3)
    return figure


def table(calm: list[Run], disturbed: list[Run], steps: int) -> list[str]:
    """Return the lines."""
    lines = [
        f"digits, perceptron 64-128-128-10, SignMuon, {steps} steps of {WORKERS} workers with {BATCH} images each",
        f"{'':<28}{'workers a step':>15}{f'loss, last {LAST} steps':>22}{'test loss':>17}{'accuracy':>15}",
    ]
    for name, runs in ((CALM, calm), (DISTURBED, disturbed)):
        voted = np.mean([line.workers for run in runs for line in run.lines])
        lines.append(
            f"{name:<28}{voted:>15.2f}{mean_std([run.last for run in runs], 4):>22}"
            f"{mean_std([run.loss for run in runs]):>17}{mean_std([run.accuracy for run in runs], 1, '%'):>15}"
        )
    return [*lines, f"mean and standard deviation of {len(calm)} seeds"]


def main() -> None:
    """Train, print the table, and draw."""
    parser = command_line("churn", __doc__)
    options = parser.parse_args()
    seeds, steps = (2, 60) if options.short else (5, 300)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "signsgd_lightning.elastic", "sklearn.datasets"])
    calm, disturbed = (
        [train(context, seed, steps, lost) for seed in tqdm(range(seeds), name, disable=None)]
        for name, lost in ((CALM, []), (DISTURBED, LOST[:2] if options.short else LOST))
    )
    lines = [heading("churn"), *table(calm, disturbed, steps)]
    publish("churn", lines, lambda pyplot: draw(calm, disturbed, pyplot), options.out)


if __name__ == "__main__":
    main()
