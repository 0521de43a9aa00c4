"""One worker of wire.py: a step under every way to exchange gradients, in turn; rank 0 writes down what all saw."""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.network import Network
from signsgd_lightning import Signum, enable_local_steps, enable_majority_vote, kernels
from signsgd_lightning.views import lay_out
from signsgd_lightning.vote import StepInput
from signsgd_lightning.vote.options import VoteBetween

NONE, OURS, OVERLAPPED = "no exchange", "majority vote (ours)", "ours, overlap=True"
LOCAL, MEAN, EVERY = "ours, local steps, H = 1", "fp32 mean, H = 1", (4, 16, 64)
"""Steps of a rank's own and then a round; for longer rounds the times follow, since a step between has no exchange."""
WIDTH, LR = 1000, 1e-4
ROUNDS, SLOW_ROUNDS, SLOW = 9, 3, 2.0
"""Rounds, and of a step that takes longer than so many seconds."""

LIMIT = timedelta(seconds=120)
"""For a rank that hangs."""

TakeStep = Callable[[Tensor], None]


def square_layers(parameters: int) -> nn.Sequential:
    """Return a perceptron of about so many parameters, the same on all ranks, whose layers keep the signal's size."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(max(1, round(parameters / WIDTH**2))):
        linear = nn.Linear(WIDTH, WIDTH)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        model.extend([linear, nn.ReLU()])
    return model


def bf16_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Torch's own, which DDP knows by its name and refuses over Gloo."""
    return default_hooks.bf16_compress_hook(state, bucket)


def averaging(model: nn.Module, hook: Any = None, state: Any = None, exchange: bool = True, **of_ddp: Any) -> TakeStep:
    """Return SGD's step on the mean gradients, sent as DDP's hook says; or on its own ones alone."""
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **of_ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if hook:
        ddp.register_comm_hook(state, hook)

    def take_step(x: Tensor) -> None:
        optimizer.zero_grad()
        if exchange:
            ddp(x).square().mean().backward()
        else:
            with ddp.no_sync():
                ddp(x).square().mean().backward()
        optimizer.step()

    return take_step


def power_sgd(model: nn.Module, rank: int) -> TakeStep:
    """Return the step with low-rank gradients; the first two are exact, which is the least that torch allows.

    All in one bucket: with several the ranks' hooks reduce in orders that differ, and Gloo takes one for another.
    """
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    return averaging(model, powerSGD_hook.powerSGD_hook, state, bucket_cap_mb=1 << 12)


class Gathering:
    """The vote without shards: every worker gets every ballot and counts all."""

    def step(self, given: StepInput) -> None:
        """Take one step by the majority's verdict."""
        views, _, zeros, step = given
        length, device = lay_out(views), views[0].parameter.device
        kernel = kernels.for_device(device)
        ballot = torch.zeros(1, -(-length // 64) * 8, dtype=torch.uint8, device=device)
        kernel.cast(views, 0, length, zeros, step, dist.get_rank(), ballot)
        ballots = torch.zeros(dist.get_world_size(), *ballot.shape, dtype=torch.uint8)
        dist.all_gather(list(ballots), ballot.cpu())
        kernel.apply(views, 0, length, kernel.verdict(ballots.to(device), zeros, step, None))
        for view in views:
            view.finish()


def voting(
    model: nn.Module, sharded: bool = True, vote_between: VoteBetween = "ranks", overlap: bool = False
) -> TakeStep:
    """Return Signum's step by majority vote."""
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = Signum(model.parameters(), lr=LR, zeros="alternate")
    enable_majority_vote(ddp, optimizer, vote_between=vote_between, overlap=overlap)
    if not sharded:
        optimizer.vote = Gathering()  # type: ignore[assignment]

    def take_step(x: Tensor) -> None:
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()

    return take_step


def voting_on_displacements(model: nn.Module) -> TakeStep:
    """Return SGD's step on this rank's own gradients, and a round of local steps after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    enable_local_steps(model, optimizer, sync_every=1)
    return alone(model, optimizer, lambda: None)


def averaging_parameters(model: nn.Module) -> TakeStep:
    """Return SGD's step on this rank's own gradients, and the mean of all parameters after each, as local SGD does."""
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    return alone(
        model, torch.optim.SGD(model.parameters(), lr=LR), lambda: averager.average_parameters(model.parameters())
    )


def alone(model: nn.Module, optimizer: torch.optim.Optimizer, then: Callable[[], None]) -> TakeStep:
    """Return a step on this rank's own gradients, and what follows."""

    def take_step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        then()

    return take_step


def schemes(parameters: int, device: str) -> dict[str, tuple[TakeStep, int]]:
    """Every way to exchange gradients, each with a model of its own, and how many steps it takes to warm up."""

    def model(parameters: int) -> nn.Module:
        return square_layers(parameters).to(device)

    return {
        NONE: (averaging(model(parameters), exchange=False), 2),
        "DDP fp32": (averaging(model(parameters)), 2),
        "DDP fp16 hook": (averaging(model(parameters), default_hooks.fp16_compress_hook), 2),
        "DDP bf16 hook": (averaging(model(parameters), bf16_hook), 2),
        "PowerSGD rank 1": (power_sgd(model(parameters), 1), 4),
        "PowerSGD rank 4": (power_sgd(model(parameters), 4), 4),
        "1-bit all-gather": (voting(model(parameters), sharded=False), 2),
        OURS: (voting(model(parameters)), 2),
        OVERLAPPED: (voting(model(parameters), overlap=True), 2),
        MEAN: (averaging_parameters(model(parameters)), 2),
        LOCAL: (voting_on_displacements(model(parameters)), 2),
    }


def once_in(sync_every: int, with_exchange: float, without: float) -> float:
    """Return what a step costs on average where one of so many has an exchange."""
    return without + (with_exchange - without) / sync_every


def sent_bytes() -> int:
    """Return what this worker's interface has sent so far, headers and acknowledgements included."""
    return int(Path(f"/sys/class/net/{Network.interface}/statistics/tx_bytes").read_text())


def measure(take_step: TakeStep, x: Tensor) -> tuple[float, int]:
    """Return the seconds that a step took here, and the bytes that this worker's interface sent meanwhile."""
    dist.barrier()
    before, begin = sent_bytes(), time.perf_counter()
    take_step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    dist.barrier()  # the last one's bytes have left, too
    return took, sent_bytes() - before


def round_trip() -> float:
    """Return the seconds that a byte takes from rank 0 to rank 1 and back."""
    times, byte = [], torch.zeros(1)
    for _ in range(50):
        begin = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(byte, 1)
            dist.recv(byte, 1)
        elif dist.get_rank() == 1:
            dist.recv(byte, 0)
            dist.send(byte, 0)
        times.append(time.perf_counter() - begin)
    return median(times)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Take all steps and return the medians: of the slowest worker's seconds, and of a worker's bytes."""
    of = schemes(options.parameters, options.device)
    x = torch.randn(options.batch_size, WIDTH, generator=torch.Generator().manual_seed(options.rank)).to(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in of}
    sent: dict[str, list[float]] = {name: [] for name in of}
    trip = round_trip()
    idle = median(measure(lambda _: None, x)[1] for _ in range(9))  # the barriers' own
    bar = tqdm(total=sum(ROUNDS + steps for _, steps in of.values()), desc=options.title, disable=options.rank > 0)
    for name, (take_step, steps) in of.items():
        bar.set_postfix_str(f"{name}, to warm up")
        for _ in range(steps):
            take_step(x)
            bar.update()
    names = list(of)
    for k in range(ROUNDS):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            bar.update()
            past = seconds[name]
            if len(past) >= SLOW_ROUNDS and median(past) > SLOW:
                continue
            bar.set_postfix_str(name)
            took, count = measure(of[name][0], x)
            slowest, total = torch.tensor(took, dtype=torch.float64), torch.tensor(count - idle, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            dist.all_reduce(total)
            past.append(float(slowest))
            sent[name].append(float(total) / options.workers)
    bar.close()
    rows = {name: {"seconds": median(seconds[name]), "bytes": median(sent[name])} for name in of}
    for name, sync_every in itertools.product((MEAN, LOCAL), EVERY):
        each = {what: once_in(sync_every, rows[name][what], rows[NONE][what]) for what in rows[name]}
        rows[name.replace("H = 1", f"H = {sync_every}")] = each
    return {
        "round_trip": trip,
        "parameters": sum(p.numel() for p in square_layers(options.parameters).parameters()),
        "schemes": rows,
    }


def join(options: argparse.Namespace) -> None:
    """Meet the other workers at rank 0's, each on one thread."""
    torch.set_num_threads(1)
    address = f"tcp://{options.master}:29500"
    dist.init_process_group("gloo", address, LIMIT, world_size=options.workers, rank=options.rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("rank", "workers", "parameters", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("device", "master", "title", "found"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    join(options)
    found = run(options)
    if options.rank == 0:
        Path(options.found).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
