"""One worker of gpt_over_wire.py: trains the GPT one way; rank 0 writes down losses, seconds and bytes."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.wire_worker import join, sent_bytes
from signsgd_lightning import enable_local_steps, enable_majority_vote

from .methods import CLIPPED, Job, averaged_step, scaling, voted, voting_optimizer
from .tasks import Text
from .training import schedule

POINTS = 20
"""How often the loss on the rest of the text is looked at, off the clock."""
EXACT = 10
"""PowerSGD's first steps, which are in full precision."""

Hook = Callable[[DistributedDataParallel], None]
"""Registers how DDP sends gradients."""


def as_they_are(ddp: DistributedDataParallel) -> None:
    """Nothing to register."""


def half(ddp: DistributedDataParallel) -> None:
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def low_rank(rank: int) -> Hook:
    def register(ddp: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=EXACT)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return register


DDP: dict[str, Any] = {"gradient_as_bucket_view": True, "bucket_cap_mb": 1 << 12}
"""One bucket: with several the PowerSGD hooks of the ranks reduce in orders that differ, and Gloo mistakes them."""

ADAMW, MUON, LOCAL = f"AdamW .95{CLIPPED}", f"Muon{CLIPPED}", "local steps"
EVERY = 16
"""Steps between votes of local steps, whose inner optimizer is Muon."""
METHODS: dict[str, tuple[str, Hook | None]] = {
    "AdamW, DDP fp32": (ADAMW, as_they_are),
    "AdamW, fp16 hook": (ADAMW, half),
    "AdamW, PowerSGD rank 1": (ADAMW, low_rank(1)),
    "AdamW, PowerSGD rank 4": (ADAMW, low_rank(4)),
    "Muon, DDP fp32": (MUON, as_they_are),
    "verdict momentum .8, vote": ("verdict momentum 0.8", as_they_are),
    "SignMuon, vote": ("SignMuon", as_they_are),
    f"Muon, vote every {EVERY} steps": (LOCAL, None),
}
"""Each one's method of methods.py, and what DDP sends where that averages; None for workers that step apart."""


def set_up(model: nn.Module, job: Job, hook: Hook | None) -> tuple[nn.Module, Callable[[float], None]]:
    """Return what gradients are computed through, and what takes a step by them at a share of the learning rate."""
    if hook is None:
        return model, stepping_apart(model, job)
    ddp = DistributedDataParallel(model, **DDP)
    return ddp, stepping(ddp, job, hook)


def stepping(ddp: DistributedDataParallel, job: Job, hook: Hook) -> Callable[[float], None]:
    """Return what takes a step of a model in DDP at a share of the learning rate: by sent gradients, or by a vote."""
    if not voted(job.method):
        hook(ddp)
        return averaged_step(ddp.module, job)
    optimizer = voting_optimizer(ddp.module, job)
    enable_majority_vote(ddp, optimizer)
    scale = scaling([optimizer])

    def step(share: float) -> None:
        scale(share)
        optimizer.step()

    return step


def stepping_apart(model: nn.Module, job: Job) -> Callable[[float], None]:
    """Return what takes a local step, and votes after every `EVERY`-th and the last."""
    inner = averaged_step(model, job._replace(method=MUON))
    counter = torch.optim.SGD(model.parameters(), lr=0.0)  # moves nothing: Muon has parts of the parameters
    local, left = enable_local_steps(model, counter, sync_every=EVERY), iter(reversed(range(job.steps)))

    def step(share: float) -> None:
        local.open()
        inner(share)
        counter.step()
        if next(left) == 0:
            local.close_round()

    return step


def train(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Train; return (step, loss) along the way, and the seconds and bytes of every step."""
    task = Text(options.text, options.width, options.layers, options.context)
    method, hook = METHODS[options.method]
    job = Job("", method, options.lr, 0.1, options.workers, options.steps, options.seed, options.other_lr)
    torch.manual_seed(job.seed)
    model = task.model()
    trained, take_step = set_up(model, job, hook)
    source = np.random.default_rng([job.seed, options.rank])
    losses, seconds, sent = list[tuple[int, float]](), list[float](), list[int]()
    for step in tqdm(range(job.steps), options.title, disable=options.rank > 0, leave=False):
        batch = task.batch(options.batch_size, source)
        dist.barrier()
        before, begin = sent_bytes(), time.perf_counter()
        trained.zero_grad()
        task.loss(trained, batch).backward()  # type: ignore[no-untyped-call]
        take_step(schedule(step, job.steps))
        dist.barrier()  # the slowest counts
        seconds.append(time.perf_counter() - begin)
        sent.append(sent_bytes() - before)
        if options.score and is_point(step + 1, job.steps, hook):
            losses.append((step + 1, task.score(model) if options.rank == 0 else 0.0))
    return {"losses": losses, "seconds": seconds, "bytes": sent}


def is_point(step: int, steps: int, hook: Hook | None) -> bool:
    """Tell whether the loss is looked at after a step: where workers step apart, they must have met."""
    if hook is None:
        return step % EVERY == 0 or step == steps
    return step * POINTS // steps > (step - 1) * POINTS // steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("rank", "workers", "steps", "batch-size", "width", "layers", "context", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("master", "title", "method"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("text", "found"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--other-lr", type=float)
    parser.add_argument("--score", action="store_true", help="look at the loss, too")
    options = parser.parse_args()
    join(options)
    found = train(options)
    if options.rank == 0:
        options.found.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
