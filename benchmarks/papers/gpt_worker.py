"""One worker of gpt_over_wire.py: trains the GPT one way; rank 0 writes down loss, bytes and seconds along the way."""

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
from signsgd_lightning import Signum, enable_majority_vote

from .tasks import Text
from .training import schedule

POINTS = 15
"""How often the loss on the rest of the text is looked at, off the clock."""


def adamw(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(ddp.parameters(), lr=lr, weight_decay=0.1)


def compressed(hook: Any) -> Callable[[DistributedDataParallel, float], torch.optim.Optimizer]:
    def build(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
        ddp.register_comm_hook(None, hook)
        return adamw(ddp, lr)

    return build


def low_rank(rank: int) -> Callable[[DistributedDataParallel, float], torch.optim.Optimizer]:
    def build(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=10)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return adamw(ddp, lr)

    return build


def voting(**settings: Any) -> Callable[[DistributedDataParallel, float], torch.optim.Optimizer]:
    def build(ddp: DistributedDataParallel, lr: float) -> torch.optim.Optimizer:
        optimizer = Signum(ddp.parameters(), lr=lr, weight_decay=0.1, **settings)
        enable_majority_vote(ddp, optimizer)
        return optimizer

    return build


DDP: dict[str, Any] = {"gradient_as_bucket_view": True, "bucket_cap_mb": 1 << 12}
"""One bucket: with several the PowerSGD hooks of the ranks reduce in orders that differ, and Gloo mistakes them."""

METHODS = {
    "AdamW, DDP fp32": adamw,
    "AdamW, fp16 hook": compressed(default_hooks.fp16_compress_hook),
    "AdamW, PowerSGD rank 1": low_rank(1),
    "AdamW, PowerSGD rank 4": low_rank(4),
    "Signum (.9, .9), vote": voting(),
    "verdict momentum .8, vote": voting(betas=(0, 0), verdict_momentum=0.8),
}


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Train and return the points of the curve."""
    task = Text(options.text, options.width, options.layers, options.context)
    torch.manual_seed(0)
    model: nn.Module = task.model()
    ddp = DistributedDataParallel(model, **DDP)
    optimizer = METHODS[options.method](ddp, options.lr)
    source = np.random.default_rng([options.seed, options.rank])
    points, seconds, sent = [{"step": 0.0, "seconds": 0.0, "bytes": 0.0, "loss": task.score(model)}], 0.0, 0
    for step in tqdm(range(options.steps), options.title, disable=options.rank > 0, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(step, options.steps)
        batch = task.batch(options.batch_size, source)
        dist.barrier()
        before, begin = sent_bytes(), time.perf_counter()
        optimizer.zero_grad()
        task.loss(ddp, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        dist.barrier()  # the slowest counts
        seconds, sent = seconds + time.perf_counter() - begin, sent + sent_bytes() - before
        if (step + 1) * POINTS // options.steps > step * POINTS // options.steps:
            loss = task.score(model) if options.rank == 0 else 0.0
            points.append({"step": step + 1.0, "seconds": seconds, "bytes": float(sent), "loss": loss})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("rank", "workers", "steps", "batch-size", "width", "layers", "context", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("master", "title", "method"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("text", "found"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True)
    options = parser.parse_args()
    join(options)
    points = train(options)
    if options.rank == 0:
        options.found.write_text(json.dumps({"points": points}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
