"""What users do between the backward pass and the step, by workers that come and go."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from signsgd_core.adversaries import invert

from .elastic import SIZES, TIMEOUT, gradient

SETTINGS: dict[str, Any] = {"lr": 2.0**-6, "betas": (0.5, 0.5)}
ADVERSARIES = {1: invert}
STEPS = 8


def use(path: Path, lighthouse: str, scaled: bool) -> None:
    """Accumulate two backward passes, clip or scale, and step; write a line for every step."""
    import torch
    from torch import nn

    from signsgd_lightning import Signum, enable_elastic_vote

    random = torch.Generator().manual_seed(os.getpid())
    model = nn.ParameterList([torch.rand(size, generator=random) for size in SIZES])
    optimizer = Signum(model.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    vote = enable_elastic_vote(
        model,
        optimizer,
        lighthouse=lighthouse,
        min_workers=3,
        timeout=timedelta(seconds=TIMEOUT),
        state={"scaler": scaler},
        hostname="127.0.0.1",
        adversaries=ADVERSARIES,
    )
    while vote.step < STEPS:
        vote.begin()
        before, scale = [x.tolist() for x in model], scaler.get_scale()
        optimizer.zero_grad()
        for half in range(2):
            given = gradient(2 * vote.next_batch + half)
            if scaled and vote.step == 3:
                given[0][0] = np.inf
            loss = torch.stack([(x * torch.from_numpy(g)).sum() for x, g in zip(model, given, strict=True)]).sum()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not scaled:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        gradients = [(x.grad / scale).tolist() for x in model]
        scaler.step(optimizer)
        scaler.update()
        line = {"step": vote.step, "number": vote.number, "before": before, "gradients": gradients}
        line |= {"after": [x.tolist() for x in model], "scale": scaler.get_scale()}
        with path.open("a") as log:
            log.write(json.dumps(line) + "\n")
    vote.close()


def schedule_by_numpy(path: Path, lighthouse: str, odd: bool) -> None:
    """Set the learning rate to a number of NumPy's, and to be odd a setting that is no plain value."""
    import torch
    from torch import nn

    from signsgd_lightning import Signum, enable_elastic_vote

    model = nn.ParameterList([torch.zeros(3)])
    optimizer = Signum(model.parameters(), betas=(0.0, 0.0))
    timeout = timedelta(seconds=TIMEOUT)
    vote = enable_elastic_vote(
        model, optimizer, lighthouse=lighthouse, min_workers=1, timeout=timeout, hostname="127.0.0.1"
    )
    if odd:
        optimizer.param_groups[0]["path"] = path
    while vote.step < 60:
        optimizer.param_groups[0]["lr"] = 2.0**-6 * (1 + np.cos(vote.step / 60))
        model[0].grad = torch.ones(3)
        optimizer.step()
        with path.open("a") as log:
            log.write(json.dumps({"step": vote.step, "workers": vote.workers, "after": model[0].tolist()}) + "\n")
        time.sleep(0.05)
    vote.close()
