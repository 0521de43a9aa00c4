"""Which way to exchange gradients is fastest on your network, by how much, and at which bandwidth that changes.

python -m signsgd_lightning.breakeven --bandwidth 1G --latency 0.1 --workers 8 --parameters 25e6 --step-ms 150

The work of every exchange is measured here, on tensors of that size; the network is what the options say, and the step
is measured unless given. `signsgd_core.network.costs` is the model. Of the other schemes' work only what they cannot do
without is measured, so it errs in their favour; it says nothing about what each does to accuracy. Every worker is taken
to have a machine like this one to itself, and PowerSGD to see layers 1,000 wide.
"""

import argparse
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from signsgd_core.network.costs import (
    GATHER,
    OURS,
    ROUND,
    SCHEMES,
    Cost,
    break_even,
    fastest,
    flat,
    once_in,
    sync_every,
    vote_work,
)

from . import Signum, kernels
from .views import FlatView, lay_out

LARGEST = 1 << 24
"""Parameters measured at most; the work of more is in proportion."""

ROUNDS, WIDTH, BATCH_SIZE = 5, 1000, 64
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

Job = tuple[Callable[[], Any], float]
"""What to time, and of how many parameters (or coordinates of ballots) it is the work."""


def vote_jobs(size: int, workers: int) -> dict[str, Job]:
    """Return what a vote does beside its exchange, each once on `size` parameters."""
    x = nn.Parameter(torch.randn(size))
    x.grad = torch.randn(size)
    group = Signum([x], weight_decay=0.1).param_groups[0] | {"step": 0}
    views = [FlatView(x, group, {x: {}}, True)]
    lay_out(views)
    kernel, words = kernels.for_device(x.device), -(-size // 64)
    ballot = torch.zeros(1, 8 * words, dtype=torch.uint8)
    shard, start, end = -(-words // workers), torch.randn(size), torch.randn(size)
    ballots = torch.randint(0, 256, (workers, 1, 8 * shard), dtype=torch.uint8)
    return {
        "cast": (lambda: kernel.cast(views, 0, size, "alternate", 0, 0, ballot), size),
        "tally": (lambda: kernel.verdict(ballots, "alternate", 0, None), workers * 64 * shard),
        "apply": (lambda: kernel.apply(views, 0, size, ballot), size),
        "displace": (lambda: (kernel.displace(start, end), end.copy_(start)), size),
    }


def averaging_jobs(size: int) -> dict[str, Job]:
    """Return what the other schemes do beside their exchange: into a bucket, add what comes, and back."""
    gradient, bucket, other = torch.randn(size), torch.empty(size), torch.randn(size)

    def average(dtype: torch.dtype) -> Callable[[], Any]:
        coming = other.to(dtype)
        return lambda: gradient.copy_(bucket.copy_(gradient).to(dtype).add_(coming))

    side = min(WIDTH, math.isqrt(size))
    layers = size // side**2
    matrices, error = torch.randn(layers, side, side), torch.empty(layers, side, side)

    def power_sgd(rank: int) -> Callable[[], Any]:
        start = torch.randn(layers, side, min(rank, side))

        def job() -> None:
            p = torch.linalg.qr(matrices @ start)[0]
            error.copy_(matrices).sub_(p @ (matrices.transpose(1, 2) @ p).transpose(1, 2))

        return job

    dtypes = {"DDP fp32": torch.float32, "DDP fp16 hook": torch.float16, "DDP bf16 hook": torch.bfloat16}
    jobs: dict[str, Job] = {name: (average(dtype), size) for name, dtype in dtypes.items()}
    return jobs | {f"PowerSGD rank {rank}": (power_sgd(rank), matrices.numel()) for rank in (1, 4)}


def message_job(count: int = 1000) -> Job:
    """Return that many short messages through a socket of this machine, the least that any exchange costs."""

    def job() -> None:
        here, there = socket.socketpair()
        with here, there:
            for _ in range(count):
                here.send(bytes(64))
                there.recv(64)

    return job, count


def step_job(size: int) -> Job:
    """Return forward, backward and SGD of a perceptron of about so many parameters."""
    side = min(WIDTH, math.isqrt(size))
    layers = size // side**2
    model = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(layers)])
    optimizer, x = torch.optim.SGD(model.parameters(), lr=1e-4), torch.randn(BATCH_SIZE, side)

    def job() -> None:
        optimizer.zero_grad()
        out: Tensor = model(x)
        torch.autograd.backward(out.square().mean())
        optimizer.step()

    return job, layers * side**2


def measure(parameters: int, workers: int, with_step: bool) -> dict[str, float]:
    """Return the seconds per parameter, or per message, of every job: medians, after one round to warm up."""
    size = min(parameters, LARGEST)
    jobs = vote_jobs(size, workers) | averaging_jobs(size) | {"message": message_job()}
    jobs |= {"step": step_job(size)} if with_step else {}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in tqdm(range(ROUNDS + 1), "measuring this machine", leave=False):
        for name, (job, _) in jobs.items():
            begin = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(times) / jobs[name][1] for name, times in seconds.items()}


def costs_of(options: argparse.Namespace, work: Mapping[str, float], compute: float) -> dict[str, Cost]:
    """Return every scheme's cost; a vote's work is charged in full, though it takes the optimizer's place."""
    parts = (work["cast"], work["tally"], work["apply"])
    works = dict(work) | {name: vote_work(name, options.workers, *parts) for name in (GATHER, OURS)}
    d, m, latency, each = options.parameters, options.workers, options.latency / 1e3, work["message"]
    return {name: flat(name, d, m, latency, compute, works[name], per_message=each) for name in SCHEMES}


def round_cost(options: argparse.Namespace, work: Mapping[str, float], compute: float) -> Cost:
    """Return the cost of a step that closes a round of local steps."""
    own = work["displace"] + vote_work(OURS, options.workers, work["cast"], work["tally"], work["apply"])
    latency = options.latency / 1e3
    return flat(ROUND, options.parameters, options.workers, latency, compute, own, per_message=work["message"])


def report_local_steps(options: argparse.Namespace, one: Cost, compute: float) -> str:
    """Return what local steps cost for some numbers of steps between votes, and which number this network asks for."""
    advised = sync_every(one, compute, options.bandwidth)
    lines = ["", "local steps, a vote on where each worker went every H steps:"]
    for every in sorted({4, 16, 64, advised}):
        cost = once_in(every, one, compute)
        took = 1e3 * cost.seconds(options.bandwidth)
        lines.append(f"{f'H = {every}':<24}{took:>12,.1f}{'':>12}{cost.bits / 8e6:>12,.3f}")
    said = f"sync_every={advised} costs 5% of a step at most at {_rate(options.bandwidth)}"
    return "\n".join([*lines, f"{said}; the loss after as many steps rises with it"])


def report(options: argparse.Namespace, costs: Mapping[str, Cost]) -> str:
    """Return the table, and where the answer changes."""
    seconds = {name: cost.seconds(options.bandwidth) for name, cost in costs.items()}
    first, second = sorted(seconds, key=lambda name: seconds[name])[:2]
    lines = [f"{'':<24}{'step, ms':>12}{'of fastest':>12}{'MB sent':>12}  beside ours"]
    for name, cost in costs.items():
        took, beside = seconds[name], "" if name == OURS else _beside_ours(cost, costs[OURS])
        row = f"{name:<24}{1e3 * took:>12,.1f}{took / seconds[first]:>11.2f}×{cost.bits / 8e6:>12,.3f}  {beside}"
        lines.append(row.rstrip())
    ahead = seconds[second] / seconds[first]
    lines += ["", f"fastest at {_rate(options.bandwidth)}: {first}, {ahead:.2f} times as fast as {second}"]
    for start, name in fastest(costs):
        lines.append(f"  from {_rate(start)} on: {name}" if start else f"  on the slowest links: {name}")
    return "\n".join(lines)


def save_plot(options: argparse.Namespace, costs: Mapping[str, Cost], path: Path) -> None:
    """Save every scheme's step time against bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    rates = [10 ** (6 + k / 20) for k in range(121)]
    for name, cost in costs.items():
        axes.plot(rates, [cost.seconds(rate) for rate in rates], label=name, linewidth=2.5 if name == OURS else 1.2)
    axes.axvline(options.bandwidth, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="bandwidth, bits per second", ylabel="seconds a step")
    axes.set_title(f"{options.workers} workers, {options.parameters:,} parameters", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, save the plot."""
    program, description = "python -m signsgd_lightning.breakeven", (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(program, description=description)
    add = parser.add_argument
    add("--bandwidth", type=_bandwidth, default=1e9, metavar="RATE", help="bit/s of a worker's link (default: 1G)")
    add("--latency", type=_milliseconds, default=0.1, metavar="MS", help="of a message one way (default: %(default)s)")
    add("--workers", type=_workers, default=4, help="that exchange (default: %(default)s)")
    add("--parameters", type=_parameters, default=10_000_000, help="of the model (default: %(default)s)")
    add("--step-ms", type=_step, metavar="MS", help="without exchange (default: a perceptron's, measured)")
    add("--out", type=_folder, default=Path("signsgd_demo"), help="where to save the plot (default: %(default)s)")
    options = parser.parse_args(arguments)
    work = measure(options.parameters, options.workers, options.step_ms is None)
    compute = work["step"] * options.parameters if options.step_ms is None else options.step_ms / 1e3
    costs = costs_of(options, work, compute)
    source = f"a perceptron's, batch {BATCH_SIZE}, measured" if options.step_ms is None else "given"
    parts = ", ".join(f"{name} {1e9 * work[name]:.2f}" for name in ("cast", "tally", "apply"))
    print(f"{options.workers} workers, {options.parameters:,} parameters, {options.latency:g} ms a message")
    print(f"step without exchange: {1e3 * compute:.1f} ms ({source}); work of a vote, ns per parameter: {parts}\n")
    print(report(options, costs))
    print(report_local_steps(options, round_cost(options, work, compute), compute))
    path = options.out / "breakeven.png"
    try:
        save_plot(options, costs, path)
    except ModuleNotFoundError:
        print("no plot, which needs matplotlib: pip install 'signsgd[demo]'")
    else:
        print(f"plot: {path}")


def _beside_ours(cost: Cost, ours: Cost) -> str:
    bandwidth = break_even(ours, cost)
    if bandwidth is None:
        return "never faster" if ours.fixed <= cost.fixed and ours.bits <= cost.bits else "never slower"
    return f"faster {'above' if ours.bits < cost.bits else 'below'} {_rate(bandwidth)}"


def _rate(bandwidth: float) -> str:
    units = (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3), ("bit/s", 1.0))
    name, unit = next((one for one in units if bandwidth >= one[1]), units[-1])
    return f"{float(f'{bandwidth / unit:.3g}'):,g} {name}"


def _bandwidth(text: str) -> float:
    value = _number(text[:-1] if text[-1:] in SUFFIXES else text) * SUFFIXES.get(text[-1:], 1)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be bits per second, more than 0, such as 1e9, 100M or 1G, got {text!r}")
    return value


def _milliseconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be milliseconds, 0 or more, such as 0.1, got {text!r}")
    return value


def _step(text: str) -> float:
    value = _milliseconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be milliseconds, more than 0, such as 150, got {text!r}")
    return value


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of 2 or more, since one worker sends nothing, got {text!r}"
        )
    return int(text)


def _parameters(text: str) -> int:
    value = _number(text)
    if not 1 <= value < math.inf or value != int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, such as 25000000 or 25e6, got {text!r}")
    return int(value)


def _folder(text: str) -> Path:
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a folder, and {text!r} is a file")
    return Path(text)


def _number(text: str) -> float:
    with suppress(ValueError):
        return float(text)
    return math.nan


if __name__ == "__main__":
    main()
