"""The option table that the generic tests of `Signum` run over, and what they train with."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from signsgd_lightning import Signum

Options = dict[str, Any]
Snapshot = list[tuple[Tensor, dict[str, Tensor]]]

OPTIONS: tuple[Options, ...] = (
    {"betas": (0.0, 0.0)},  # signSGD
    {},  # Signum
    {"betas": (0.9, 0.99)},  # Lion
    {"betas": (0.0, 0.0), "verdict_momentum": 0.8},
    {"betas": (0.5, 0.5), "verdict_momentum": 0.5},
    {"weight_decay": 0.1},
    {"betas": (0.0, 0.0), "verdict_momentum": 0.8, "weight_decay": 0.1},
    {"warmup_steps": 4},
    {"betas": (0.5, 0.5), "warmup_steps": "auto"},
    {"maximize": True},
    {"betas": (0.0, 0.0), "zeros": "alternate"},
    {"betas": (0.0, 0.0), "zeros": "positive"},
    {"zeros": "abstain", "verdict_momentum": 0.8},
    {"zeros": "alternate"},
    {"zeros": "positive"},
    {"momentum_dtype": torch.bfloat16},
    {"betas": (0.9, 0.99), "momentum_dtype": torch.bfloat16, "verdict_momentum": 0.5},
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name(options: Options) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()).replace(" ", "") or "default"


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix, a vector, a scalar and an empty one."""
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in ((5, 3), (7,), (), (0, 2))]


def copies(originals: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in originals]


def take_step(optimizer: Signum, t: int) -> None:
    """Step with the gradients that belong to number `t`, a sixth of their entries zero."""
    random = torch.Generator().manual_seed(100 + t)
    for group in optimizer.param_groups:
        for p in group["params"]:
            gradient = torch.randn(p.shape, generator=random)
            p.grad = (gradient * (torch.rand(p.shape, generator=random) > 1 / 6)).to(p.dtype)
    optimizer.step()


def share_gradients(source: Iterable[Tensor], optimizer: Signum) -> None:
    """Give the parameters of an optimizer the very gradients that others have."""
    for p, q in zip(source, optimizer.param_groups[0]["params"], strict=True):
        q.grad = p.grad


def snapshot(optimizer: Signum) -> Snapshot:
    """Every parameter with its state, copied."""
    return [
        (p.detach().clone(), {key: value.clone() for key, value in optimizer.state.get(p, {}).items()})
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    """Parameters and momenta are equal bit for bit, dtypes included."""
    for (p, p_state), (q, q_state) in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert p_state.keys() == q_state.keys()
        for key, value in p_state.items():
            torch.testing.assert_close(value, q_state[key], rtol=0, atol=0)


def assert_same(one: Signum, other: Signum) -> None:
    assert_equal(snapshot(one), snapshot(other))
