"""What tests of documented uses share: a net, a backward pass, a voter, and what an action is told."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote

from .models import small_net

SIGNUM: dict[str, Any] = {"lr": 0.125, "betas": (0.5, 0.5)}


def net_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return small_net()


def backward(model: nn.Module, t: int, rank: int | None = None) -> None:
    model.zero_grad()
    seed = 100 * t + (dist.get_rank() if rank is None else rank)
    model(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


def voter(model: nn.Module | None = None, **options: Any) -> tuple[DistributedDataParallel, Signum]:
    ddp = DistributedDataParallel(net_of() if model is None else model)
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer, **options)
    return ddp, optimizer


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
