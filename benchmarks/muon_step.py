"""What a step of SignMuon costs beside torch's Muon and AdamW, on one worker, and beside forward and backward pass.

python -m benchmarks.muon_step --out benchmarks/results

Muon is `torch.optim.Muon` for the hidden matrices and AdamW for the rest, SignMuon `signsgd_lightning.Signum` in the
groups of `signmuon_groups`: the same matrices. Torch's Muon computes in bfloat16, which not every CPU has; a second row
has its code in float32. Rounds are interleaved and medians are compared, on the CPU of processor time, so that other
processes count little, on a GPU of the time until it is done. Gradients are there before the clock starts.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from signsgd_lightning import Signum

from .machine import machine
from .papers.methods import Job, Muon, give_gradients, hidden_groups, muon_optimizers
from .papers.tasks import GPT, resnet

Model = tuple[nn.Module, Callable[[nn.Module], Tensor]]
"""A model, and its loss on a batch of one worker of four."""


def gpt(width: int, layers: int) -> Model:
    """Return a GPT with 4 sequences of 64 bytes."""
    x = torch.randint(256, (4, 65))
    return GPT(width, layers, 64), lambda m: functional.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def small_resnet() -> Model:
    """Return the ResNet-8 with 32 images."""
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return resnet(16, 8, 3, 10), lambda m: functional.cross_entropy(m(x), y)


MODELS: dict[str, Callable[[], Model]] = {
    "GPT 3x128": lambda: gpt(128, 3),
    "GPT 4x256": lambda: gpt(256, 4),
    "ResNet-8": small_resnet,
    "GPT 12x768": lambda: gpt(768, 12),
}
"""The last is too large for a CPU, and not among those that are measured where none is named."""


def steps(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return a step of each optimizer on a model that has gradients."""
    found: dict[str, Callable[[], object]] = {}
    found["AdamW"] = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1).step
    of_cpu = {} if next(model.parameters()).is_cuda else {"Muon in float32": Muon}
    for name, kind in {"Muon, torch's bfloat16": torch.optim.Muon, **of_cpu}.items():
        optimizers, cuts = muon_optimizers(model, Job("", "Muon", 1e-4, 0.1, other_lr=1e-4), kind)
        give_gradients(cuts)
        found[name] = partial(_step_all, optimizers)
    found["SignMuon"] = Signum(hidden_groups(model, Job("", "SignMuon", 1e-4, other_lr=1e-4)), weight_decay=0.1).step
    found["verdict momentum"] = Signum(model.parameters(), 1e-4, (0, 0), 0.1, verdict_momentum=0.8).step
    return found


def _step_all(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def clock(device: str) -> float:
    """Return the processor time, or the time when a GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, rounds: int, device: str) -> dict[str, float]:
    """Return the median seconds of each part of a step."""
    torch.manual_seed(0)
    with torch.device(device):
        model, loss = MODELS[name]()
    loss(model).backward()  # type: ignore[no-untyped-call]
    weights = list(model.parameters())
    jobs = {"forward and backward": lambda: torch.autograd.grad(loss(model), weights), **steps(model)}
    times: dict[str, list[float]] = {job: [] for job in jobs}
    for k in tqdm(range(rounds + 2), name, leave=False):
        for job, run in jobs.items():
            begin = clock(device)
            run()
            if k >= 2:
                times[job].append(clock(device) - begin)
    return {job: median(seconds) for job, seconds in times.items()}


def table(measured: dict[str, dict[str, float]]) -> Iterator[str]:
    """Return the lines."""
    yield f"{'ms, median':<36}" + "".join(f"{name:>12}" for name in measured)
    rows = next(iter(measured.values()))
    for job in rows:
        yield f"{job:<36}" + "".join(f"{1e3 * seconds[job]:>12.2f}" for seconds in measured.values())
    for other in [job for job in rows if job.startswith(("Muon", "AdamW"))]:
        ratios = [seconds["SignMuon"] / seconds[other] for seconds in measured.values()]
        yield f"{f'SignMuon to {other}':<36}" + "".join(f"{ratio:>12.2f}" for ratio in ratios)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.muon_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS)[:-1])
    parser.add_argument("--device", default="cpu", help='such as "cuda" (default: %(default)s)')
    parser.add_argument("--out", type=Path, help="folder for the table (default: save nothing)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "" if options.device == "cpu" else f"{torch.cuda.get_device_name()}, "
    where = f"{device}{machine()}, torch {torch.__version__}"
    command = " ".join([parser.prog, *sys.argv[1:]])
    measured = {name: measure(name, options.rounds, options.device) for name in options.models}
    lines = [f"{where}, threads: {options.threads}; {command}", *table(measured)]
    print("\n".join(lines))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "muon_step.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
