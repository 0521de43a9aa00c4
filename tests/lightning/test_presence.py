"""A gradient is there or not by what a rank computed, whatever DDP makes of it: as on one machine."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from signsgd_core import Reference, Zeros
from signsgd_lightning import Signum, enable_majority_vote
from tests.workers import Workers

UNUSED, STATIC = {"find_unused_parameters": True}, {"static_graph": True}
STEPS = 4

Backward = Callable[[Any, nn.Module, Any, Tensor, int, int], None]
"""(what to call, the module itself, no_sync, x, rank, step): leaves gradients on the module's parameters."""


class _Undefined(torch.autograd.Function):
    """Hands on nothing where it is told to: the node before it is reached with an undefined gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: bool) -> Tensor:
        ctx.drop = drop
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None if ctx.drop else gradients[0]), None


class Heads(nn.Module):
    """A trunk and two heads; `call` says which of them are computed, and how."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(5, 1)
        if tied:
            self.b.weight = self.a.weight
        self.call = "both"

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x).tanh()
        if self.call in ("a", "b"):
            return getattr(self, self.call)(h)
        if self.call == "detached":
            return {"a": self.a(h), "b": [self.b(h).detach(), h]}
        if self.call.startswith("checkpoint"):
            reentrant = self.call.endswith("reentrant")
            return checkpoint(self.a, h, use_reentrant=reentrant), checkpoint(self.b, h, use_reentrant=reentrant)
        if self.call.startswith("undefined"):
            return self.a(h) + _Undefined.apply(self.b(h), self.call.endswith("yes"))  # type: ignore[no-untyped-call]
        return self.a(h), {"b": self.b(h)}


def _loss(y: Tensor, target: float) -> Tensor:
    return (y - target).square().mean()


def _descend(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def _own_output(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """Both heads are computed; each rank's loss takes its own."""
    a, rest = call(x)
    _descend(_loss(a if rank == 0 else rest["b"], 1 - 2 * rank))


def _changing_hands(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    a, rest = call(x)
    _descend(_loss(a if (rank + t) % 2 == 0 else rest["b"], t - rank))


def _computed_alone(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """Each rank computes one head, another from step to step; at the last nobody computes b."""
    net.call = "a" if t == STEPS - 1 or (rank + t) % 2 else "b"
    _descend(_loss(call(x), 1.0))


def _own_head_always(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    net.call = "ab"[rank % 2]
    _descend(_loss(call(x), 1.0))


def _detached(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """A dict with a list in it, of which a part is detached, and the loss of one rank takes the trunk alone."""
    net.call = "detached"
    y = call(x)
    _descend(_loss(y["a"], 2.0) if rank == 0 else _loss(y["b"][1], 0.5))


def _undefined(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """On one rank the gradient of b is undefined, though its hooks fire; no setting of DDP is needed for that."""
    net.call = "undefined: yes" if rank == 1 else "undefined: no"
    _descend(_loss(call(x), 1.0))


def _by_hand(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """One rank assigns gradients by `torch.autograd.grad`, of its own head alone at odd steps."""
    with no_sync():
        a, rest = call(x)
        losses = [_loss(a, 1.0), _loss(rest["b"], -1.0)][: 1 + (t + 1) % 2]
        parameters = list(net.parameters())
        tasks = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    for p, *gradients in zip(parameters, *tasks, strict=True):
        there = [g for g in gradients if g is not None]
        p.grad = sum(there[1:], start=there[0]) if there else None


def _accumulated(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """Two backward passes, of which the first does not synchronise; rank 0 uses b in the first, rank 1 in none."""
    first, second = x.chunk(2)
    with no_sync():
        a, rest = call(first)
        _descend(_loss(rest["b"] if rank == 0 else a, 1.0))
    _descend(_loss(call(second)[0], -1.0))


def _synchronised_twice(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """As `_accumulated`, but both synchronise: between them nobody may have made gradients up."""
    first, second = x.chunk(2)
    a, rest = call(first)
    _descend(_loss(rest["b"] if rank == 0 else a, 1.0))
    _descend(_loss(call(second)[0], -1.0))


def _kept_zeros(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    """Gradients are zeroed instead of removed, so what was computed once is there ever after, as on one machine."""
    net.zero_grad(set_to_none=False)
    _changing_hands(call, net, no_sync, x, rank, t)


def _changed_after(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    _own_output(call, net, no_sync, x, rank, t)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    if rank == 1 and net.a.weight.grad is None:  # weight decay of the user's own, where there was no gradient
        net.a.weight.grad = 0.25 * net.a.weight.detach()


def _checkpointed(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    net.call = "checkpoint"
    a, b = call(x)
    _descend(_loss(a if (rank + t) % 2 == 0 else b, 1.0))


def _checkpointed_reentrant(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    net.call = "checkpoint, reentrant"
    a, b = call(x.requires_grad_())
    _descend(_loss(a, 1.0) + _loss(b, -1.0))


def _several_forwards(call: Any, net: Any, no_sync: Any, x: Tensor, rank: int, t: int) -> None:
    first, second = x.chunk(2)
    (a, _), (_, rest) = call(first), call(second)
    _descend(_loss(a, 1.0) + _loss(rest["b"], -1.0))


CASES: dict[str, tuple[Backward, dict[str, Any]]] = {
    "own of two outputs": (_own_output, UNUSED),
    "outputs that change hands": (_changing_hands, UNUSED),
    "heads that change hands, and one unused": (_computed_alone, UNUSED),
    "a static graph": (_own_head_always, STATIC),
    "dict, list, detached": (_detached, UNUSED),
    "an undefined gradient": (_undefined, {}),
    "assigned by hand": (_by_hand, UNUSED),
    "assigned by hand, usual settings": (_by_hand, {}),
    "accumulated under no_sync": (_accumulated, UNUSED),
    "accumulated, synchronised twice": (_synchronised_twice, UNUSED),
    "zeroed in place": (_kept_zeros, UNUSED),
    "clipped, and one added": (_changed_after, UNUSED),
    "activation checkpoints": (_checkpointed, UNUSED),
    "activation checkpoints, static": (_checkpointed_reentrant, STATIC),
    "reentrant activation checkpoints": (_checkpointed_reentrant, {}),
    "several forward passes": (_several_forwards, {}),
}


def _train(backward: Backward, settings: dict[str, Any], zeros: Zeros, tied: bool) -> list[str]:
    """Train under a vote and, on the twin, by the reference; return which parameters differ after which step."""
    torch.manual_seed(0)
    net, rank = Heads(tied), dist.get_rank()
    twin = copy.deepcopy(net)
    ddp = DistributedDataParallel(net, **settings)
    optimizer = Signum(ddp.parameters(), lr=0.125, betas=(0.5, 0.5), zeros=zeros)
    enable_majority_vote(ddp, optimizer)
    start = [p.detach().numpy().copy() for p in net.parameters()]
    reference = Reference(start, dist.get_world_size(), 0.125, betas=(0.5, 0.5), zeros=zeros)
    differ = []
    for t in range(STEPS):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * t + rank))
        for call, module, no_sync in ((ddp, net, ddp.no_sync), (twin, twin, contextlib.nullcontext)):
            module.zero_grad(set_to_none=backward is not _kept_zeros)
            backward(call, module, no_sync, x.clone(), rank, t)
        own = [None if p.grad is None else p.grad.numpy().copy() for p in twin.parameters()]
        gradients: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gradients, own)
        optimizer.step()
        reference.step(gradients)
        for (name, p), q, expected in zip(net.named_parameters(), twin.parameters(), reference.parameters, strict=True):
            if not np.array_equal(p.detach().numpy(), expected):
                differ.append(f"step {t}, {name}")
            q.data.copy_(p.detach())
    return differ


@pytest.mark.parametrize("case", CASES)
def test_as_on_one_machine(case: str, workers: Workers) -> None:
    backward, settings = CASES[case]
    for ranks, view, zeros in zip((2, 3, 2), (False, True, True), get_args(Zeros), strict=True):
        found = workers.run(ranks, _train, backward, {**settings, "gradient_as_bucket_view": view}, zeros, False)
        assert found == [[]] * ranks, zeros


@pytest.mark.parametrize(
    "case", ["own of two outputs", "accumulated under no_sync", "reentrant activation checkpoints"]
)
def test_tied_weights(case: str, workers: Workers) -> None:
    backward, settings = CASES[case]
    settings = STATIC if backward is _checkpointed_reentrant else settings  # DDP's own demand
    assert workers.run(2, _train, backward, settings, "alternate", True) == [[]] * 2
