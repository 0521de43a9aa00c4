"""Two weights, and steps by gradients that a test chooses."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def line(dtype: torch.dtype = torch.float32, value: float = 1.0) -> Any:
    """Two weights."""
    net = nn.Linear(2, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        net.weight.fill_(value)
    return net


def step(optimizer: Any, gradient: list[float]) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.tensor([gradient], dtype=p.dtype)
    optimizer.step()


class Behind:
    """Holds an optimizer and moves parameters behind its step, as Lookahead does; each rank elsewhere."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(dist.get_rank())
