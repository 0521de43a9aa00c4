"""What each part of a step costs beside a copy of the same tensors, and a whole step beside torch's optimizers.

python -m benchmarks.kernels

Parts take the compiled loops and NumPy's in turn. Rounds are interleaved, so that a busy machine slows all of them;
medians are compared. On a GPU parts are timed by its own clock, its cache cleared; whole steps by the wall, from one
idle moment to the next.
"""

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.machine import machine
from signsgd_lightning import Signum
from signsgd_lightning.kernels import DEVICE, Kernel, NativeKernel, NumpyKernel, build, for_device
from signsgd_lightning.views import FlatView, lay_out

WORKERS = 8
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.9), "weight_decay": 0.1}
BYTES = {
    "copy": 8.0,
    "gradient to ballot, no momentum": 4.125,
    "momentum and ballot": 12.125,
    "momentum in bfloat16 and ballot": 8.125,
    f"tally of {WORKERS} workers": (WORKERS + 1) / 8,
    "apply": 8.125,
    "apply with weight decay": 8.125,
    "apply with decay and verdict momentum": 16.125,
}
"""What a parameter must be read and written at the least."""

CACHE = 1 << 28
"""Bytes that no GPU's cache holds."""

Jobs = dict[str, Callable[[], Any]]
Clock = Callable[[Callable[[], Any]], float]
"""Runs a job and returns the seconds that it took."""


def parts(kernel: Kernel, size: int, device: torch.device) -> Jobs:
    """What a voted step does but for the exchange, each as a function of no arguments."""
    views = {}
    kinds: dict[str, dict[str, Any]] = {
        "Signum": {},
        "signSGD": {"betas": (0.0, 0.0), "weight_decay": 0.0},
        "narrow": {"momentum_dtype": torch.bfloat16},
        "verdict momentum": {"betas": (0.0, 0.0), "verdict_momentum": 0.8},
    }
    for name, chosen in kinds.items():
        p = nn.Parameter(torch.randn(size, device=device))
        p.grad = torch.randn_like(p)
        views[name] = [FlatView(p, Signum([p], **SETTINGS | chosen).param_groups[0], {p: {}}, True)]
        lay_out(views[name])
    ballot = torch.zeros(1, -(-size // 64) * 8, dtype=torch.uint8, device=device)
    ballots = torch.randint(0, 256, (WORKERS, *ballot.shape), dtype=torch.uint8, device=device)

    def cast(name: str) -> Callable[[], None]:
        return lambda: kernel.cast(views[name], 0, size, "alternate", 0, 0, ballot.zero_())

    def apply(name: str) -> Callable[[], None]:
        return lambda: kernel.apply(views[name], 0, size, ballot)

    return {
        "gradient to ballot, no momentum": cast("signSGD"),
        "momentum and ballot": cast("Signum"),
        "momentum in bfloat16 and ballot": cast("narrow"),
        f"tally of {WORKERS} workers": lambda: kernel.verdict(ballots, "alternate", 0, None),
        "apply": apply("signSGD"),
        "apply with weight decay": apply("Signum"),
        "apply with decay and verdict momentum": apply("verdict momentum"),
    }


def steps(size: int, device: torch.device) -> Jobs:
    """Whole steps of optimizers that work alone, of a network's usual mixture of large and small tensors."""
    kinds: dict[str, Callable[[list[Tensor]], Any]] = {
        "AdamW(fused)": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW(foreach)": lambda p: torch.optim.AdamW(p, foreach=True),
        "SGD(momentum, fused)": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
        "SGD(momentum, foreach)": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
        "Signum (0, 0)": lambda p: Signum(p, betas=(0, 0), weight_decay=0.1),
        "Signum (.9, .9)": lambda p: Signum(p, weight_decay=0.1),
        "Signum (.9, .9), bfloat16": lambda p: Signum(p, weight_decay=0.1, momentum_dtype=torch.bfloat16),
        "Signum (.9, .99), Lion": lambda p: Signum(p, betas=(0.9, 0.99), weight_decay=0.1),
        "Signum (0, 0), verdict momentum": lambda p: Signum(p, betas=(0, 0), verdict_momentum=0.8, weight_decay=0.1),
    }
    if importlib.util.find_spec("lion_pytorch"):
        from lion_pytorch import Lion

        kinds["Lion of lion-pytorch"] = lambda p: Lion(p, weight_decay=0.1)
    jobs: Jobs = {}
    for name, make in kinds.items():
        parameters: list[Tensor] = [nn.Parameter(torch.randn(n, device=device)) for n in _sizes(size)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        jobs[name] = make(parameters).step
    return jobs


def _sizes(total: int) -> list[int]:
    """Sixteen equal tensors, and a hundred of a thousand entries."""
    small = [1000] * 100 if total > 10**6 else []
    return [*[(total - sum(small)) // 16] * 16, *small]


def by_the_wall(device: torch.device) -> Clock:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def clock(job: Callable[[], Any]) -> float:
        wait()
        begin = time.perf_counter()
        job()
        wait()
        return time.perf_counter() - begin

    return clock


def by_the_gpu() -> Clock:
    """The time between two events on the GPU; clearing its cache takes it long enough for the job to be launched."""
    clearing = torch.empty(CACHE, dtype=torch.uint8, device="cuda")

    def clock(job: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        clearing.zero_()
        begin.record()
        job()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return clock


def measure(jobs: Jobs, rounds: int, title: str, clock: Clock) -> dict[str, float]:
    """Return the median seconds of each job, all of them in turn, `rounds` times after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in tqdm(range(rounds + 1), title, leave=False):
        for name, job in jobs.items():
            took = clock(job)
            if number:
                seconds[name].append(took)
    return {name: median(times) for name, times in seconds.items()}


def table(title: str, found: dict[str, float], unit: str) -> str:
    """Return the lines; where the bytes are known with the bandwidth, in that of the copy."""
    known = unit in BYTES
    lines = [f"{title:<58}{'ms':>9}{'ratio':>8}" + f"{'bandwidth':>11}" * known]
    for name, took in found.items():
        ratio = took / found[unit]
        share = f"{BYTES[name.rsplit(', ', 1)[0]] / BYTES[unit] / ratio:>11.2f}" if known else ""
        lines.append(f"{name:<58}{1e3 * took:>9.3f}{ratio:>8.2f}{share}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only there; without it wherever there is one")
    parser.add_argument("--out", type=Path, help="folder for kernels.txt and kernels.png")
    chosen = parser.parse_args()
    library = build.load()
    command = " ".join(["python", "-m", "benchmarks.kernels", *sys.argv[1:]])
    said = [
        f"{machine()}, torch {torch.__version__}",
        f"{command}: {chosen.parameters:,} parameters, median of {chosen.rounds} rounds",
    ]
    kernels: dict[str, Kernel] = {} if library is None else {"compiled": NativeKernel(library)}
    runs: list[tuple[str, torch.device, int, dict[str, Kernel]]] = [
        (f"CPU, {n} thread{'s' * (n > 1)}", torch.device("cpu"), n, {**kernels, "NumPy": NumpyKernel()})
        for n in sorted({1, torch.get_num_threads()})
    ]
    if torch.cuda.is_available():
        there = torch.device("cuda")
        of_device = {"in force": for_device(there), "tensor operations": DEVICE}
        runs.append((torch.cuda.get_device_name(), there, 1, of_device))
    plotted = {}
    for title, device, threads, of in runs:
        if chosen.device not in (None, device.type):
            continue
        torch.set_num_threads(threads)
        source = torch.randn(chosen.parameters, device=device)
        to = torch.empty_like(source)
        jobs: Jobs = {"copy": functools.partial(to.copy_, source)}
        for kind, kernel in of.items():
            jobs |= {f"{name}, {kind}": job for name, job in parts(kernel, chosen.parameters, device).items()}
        clock = by_the_gpu() if device.type == "cuda" else by_the_wall(device)
        plotted[f"{title}: parts beside a copy"] = found = measure(jobs, chosen.rounds, title, clock)
        said.append(table(f"\n{title}: parts, beside a copy of a vector", found, "copy")[1:])
        del jobs
        whole = measure(steps(chosen.parameters, device), chosen.rounds, f"{title}, steps", by_the_wall(device))
        plotted[f"{title}: steps beside AdamW(fused)"] = whole
        said.append(table(f"\n{title}: step() alone, beside AdamW(fused)", whole, "AdamW(fused)")[1:])
    if importlib.util.find_spec("lion_pytorch") is None:
        said.append("lion-pytorch is not installed, so it is not in the table")
    print("\n".join(said))
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "kernels.txt").write_text("\n".join(said) + "\n")
        draw(plotted, chosen.out / "kernels.png")


def draw(plotted: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(len(plotted), 1, figsize=(9, 3.2 * len(plotted)), layout="constrained")
    for axes, (title, found) in zip(all_axes, plotted.items(), strict=True):
        unit = next(iter(found.values()))
        axes.barh(list(found), [time / unit for time in found.values()])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
