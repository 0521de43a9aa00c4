"""Workers that come and go and take local steps, and the judge of their rounds."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from signsgd_core import LocalReference
from signsgd_core.adversaries import Adversary

from .elastic import LR, SIZES, TIMEOUT, Crew, gradient

OUTER: dict[str, Any] = {"outer_lr": 0.5, "outer_momentum": 0.5}


@dataclass
class Rounds:
    """What a worker does.

    Attributes:
        rounds: until which it trains.
        sync_every: `H`.
        stuck: in which round its second step never ends, if in any.
        pause: seconds a step takes.
        closure: whether gradients are computed in one.
        min_workers: of the vote.
        dtype: of the parameters.
        adversaries: number in the quorum -> what it makes of its displacements.
        flip: after which round a parameter changes on this worker alone, if after any.
        verify: after how many rounds, each time, the workers look for that; 0 for never.
    """

    rounds: int = 8
    sync_every: int = 3
    stuck: int = -1
    pause: float = 0.0
    closure: bool = True
    min_workers: int = 2
    dtype: str = "float32"
    adversaries: dict[int, Adversary] = field(default_factory=dict)
    flip: int = -1
    verify: int = 0


def train_rounds(path: Path, lighthouse: str, task: Rounds) -> None:
    """Train; write a line for every round that this worker took steps of."""
    import torch
    from torch import nn

    from signsgd_lightning import enable_elastic_local_steps

    random = torch.Generator().manual_seed(os.getpid())  # each starts elsewhere
    model = nn.ParameterList([torch.rand(size, generator=random) for size in SIZES]).to(getattr(torch, task.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 ** (k % 3))
    before: list[Any] = []
    moved: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: moved.__setitem__(slice(None), [x.tolist() for x in model]))
    local = enable_elastic_local_steps(
        model,
        optimizer,
        sync_every=task.sync_every,
        lighthouse=lighthouse,
        min_workers=task.min_workers,
        timeout=timedelta(seconds=TIMEOUT),
        state={"schedule": schedule},
        hostname="127.0.0.1",
        verify_every_n_rounds=task.verify,
        adversaries=task.adversaries,
        **OUTER,
    )
    drawn: list[int] = []
    lr = [0.0]

    def closure() -> torch.Tensor:
        if not local.is_open:
            before[:] = [x.tolist() for x in model]
            lr[0] = optimizer.param_groups[0]["lr"]
        if local.rounds == task.stuck and local.is_open:
            path.with_suffix(".stuck").touch()
            time.sleep(100)
        drawn.append(local.next_batch)
        optimizer.zero_grad()
        loss = torch.stack([(x * torch.from_numpy(g)).sum() for x, g in zip(model, gradient(drawn[-1]), strict=True)])
        loss.sum().backward()  # type: ignore[no-untyped-call]
        return loss.sum()

    with path.open("a", buffering=1) as log:
        while local.rounds < task.rounds:
            reached = local.rounds
            if task.closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            if not local.is_open:
                schedule.step()
                bits = hashlib.md5(b"".join(x.detach().float().numpy().tobytes() for x in model)).hexdigest()
                line = {"step": local.rounds, "workers": local.workers, "number": local.number, "bits": bits}
                line |= {"before": before, "moved": moved, "after": [x.tolist() for x in model], "drawn": drawn}
                line |= {"batches": local.batches, "lr": lr[0]}
                if local.rounds > reached:
                    log.write(json.dumps(line) + "\n")
                drawn.clear()
                if local.rounds == task.flip:
                    with torch.no_grad():
                        model[0][0] += 1
            time.sleep(task.pause)
    local.close()


def judge_rounds(
    workers: Crew,
    exact: bool = True,
    dtype: npt.DTypeLike = np.float32,
    adversaries: Mapping[int, Adversary] | None = None,
) -> list[tuple[int, int]]:
    """Demand the same bits of all, those of `LocalReference`, and that no batch was drawn twice.

    Args:
        workers: that wrote lines.
        exact: False where some were killed behind a vote, so that what they voted is written nowhere.
        dtype: of the parameters.
        adversaries: those of the rounds.

    Returns:
        How many workers voted in each round, and how many of them had taken steps.
    """
    living = [workers.step(name) for name, process in enumerate(workers.processes) if process.is_alive()]
    last = min(filter(None, living), default=10**6)  # in later rounds some are about to write their lines
    rounds: dict[int, list[dict[str, Any]]] = {}
    for name in range(len(workers.processes)):
        for line in workers.log(name):
            if line["step"] <= last:
                rounds.setdefault(line["step"], []).append(line)
    assert sorted(rounds) == list(range(1, len(rounds) + 1))
    start = [np.array(x, dtype) for x in rounds[1][0]["before"]]
    most = max(lines[0]["workers"] for lines in rounds.values())
    reference = LocalReference(start, most, **OUTER, zeros="alternate", adversaries=adversaries)
    drawn: list[int] = []
    sizes = []
    for number, lines in sorted(rounds.items()):
        for key in ("bits", "before", "workers", "batches", "lr"):
            assert all(line[key] == lines[0][key] for line in lines), (number, key)
        size = lines[0]["workers"]
        moved = [reference.parameters] * size
        for line in lines:
            moved[line["number"]] = [np.array(x, dtype) for x in line["moved"]]
            drawn += line["drawn"]
        sizes.append((size, len(lines)))
        assert max(drawn) < lines[0]["batches"]
        if not exact:
            continue
        reference._vote.workers = size
        reference._vote.momenta = [[np.zeros_like(x) for x in reference.parameters] for _ in range(size)]
        reference.close(moved)
        for x, given in zip(reference.parameters, lines[0]["after"], strict=True):
            np.testing.assert_array_equal(x, np.array(given, dtype), f"after round {number}")
    assert len(drawn) == len(set(drawn))
    return sizes
