"""Flat views: coordinates of a parameter in row-major order, wherever their memory is; steps 1-3, 7 and 8 on them."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core.adversaries import Adversary, check_lie

from .memory import resolved
from .state import ENTRIES, MOMENTUM, VERDICT_MOMENTUM, Entry


@dataclass
class FlatView:
    """Some coordinates of a parameter, all of them or a slice.

    Attributes:
        parameter: what has the coordinates: `x`, floating point, any shape.
        group: the parameter group it belongs to, with its settings.
        state: the optimizer's; entries appear there when first needed.
        present: whether this rank has a gradient for it.
        inverse_scale: factor on the gradient, where a gradient scaler asks for one.
        start: its first coordinate in the long vector of all views.
        sent: what counts as its gradient, where that is not the parameter's own.
        shape: of the model's parameter that this is all of, where `parameter` is flat.
        orthogonal: whether its gradient is a polar factor, so that step 2b is done.
        owner: the model's parameter, where `parameter` is the local shard of it.
        magnitude: how far a round of local steps moves each coordinate, in place of the factor of step 8.
    """

    parameter: Tensor
    group: dict[str, Any]
    state: Mapping[Tensor, MutableMapping[str, Tensor]]
    present: bool
    inverse_scale: Tensor | None = None
    start: int = 0
    sent: Tensor | None = None
    shape: torch.Size | None = None
    orthogonal: bool = False
    owner: Tensor | None = None
    magnitude: float | None = None

    @property
    def stop(self) -> int:
        """The coordinate after its last, in the long vector."""
        return self.start + self.parameter.numel()

    @property
    def model_parameter(self) -> Tensor:
        """The model's parameter, wherever its memory is."""
        return self.parameter if self.owner is None else self.owner

    @cached_property
    def x(self) -> Tensor:
        """The parameter, flat: a view where its memory is row-major, else a copy."""
        return self.parameter.detach().reshape(-1)

    @cached_property
    def raw_gradient(self) -> Tensor:
        """The gradient in memory that holds its value, of the parameter's shape or flat; an adversary's is its lie."""
        gradient = self.parameter.grad if self.sent is None else self.sent
        assert gradient is not None
        return resolved(gradient.detach())

    @cached_property
    def flat_gradient(self) -> Tensor:
        """The gradient as it is, flat."""
        return self.raw_gradient.reshape(-1)

    def gradient(self, lo: int, hi: int) -> Tensor:
        """Return the gradient in [lo, hi), float32, without a gradient scaler's factor."""
        gradient = self.flat_gradient[lo:hi].float()
        return gradient if self.inverse_scale is None else gradient * self.inverse_scale

    @property
    def factor(self) -> float:
        """The factor on the gradient as it is: a gradient scaler's, negative to go up."""
        scale = 1.0 if self.inverse_scale is None else float(self.inverse_scale)
        return -scale if self.group["maximize"] else scale

    def entry(self, entry: Entry) -> Tensor | None:
        """Return an entry of the state, row-major, created where there is none; None where no setting needs it."""
        if not entry.needed(self.group):
            return None
        return entry.of(self.state[self.parameter], self.parameter, self.group)

    def create_state(self) -> None:
        """Create the entries that the settings need, as zeros; of an empty shard they are there, too."""
        for entry in ENTRIES:
            self.entry(entry)

    @property
    def momentum(self) -> Tensor | None:
        """`m`, row-major; None with β1 = 0."""
        return self.entry(MOMENTUM)

    @property
    def verdict_momentum(self) -> Tensor | None:
        """`u`, row-major; None with γ = 0."""
        return self.entry(VERDICT_MOMENTUM)

    @cached_property
    def matrices(self) -> core.Matrices:
        """How the parameter is matrices, where its group is orthogonalized."""
        return core.matrices(self.shape or self.parameter.shape, self.group["matrices"])

    @property
    def scale(self) -> float:
        """The factor on the verdict, or its momentum, in step 8: ``1/√fan_in`` of a matrix, else 1."""
        if self.magnitude is not None:
            return self.magnitude
        return self.matrices.scale if self.group["orthogonalize"] else 1.0

    @property
    def by_gradient(self) -> bool:
        """Whether the ballot is the gradient's sign, while the momentum settles."""
        steps = self.group["warmup_steps"]
        return bool(self.group["step"] < (core.warmup_steps(self.group["betas"][1]) if steps == "auto" else steps))

    def lie(self, adversary: Adversary) -> None:
        """Put what an adversary sends in the gradient's place; without anything to send it abstains."""
        sent = adversary(self.flat_gradient.float().cpu().numpy().reshape(self.parameter.shape))
        self.present = sent is not None
        if sent is not None:
            check_lie(sent, self.parameter.shape)
            self.sent = torch.from_numpy(np.array(sent)).to(self.parameter.device)
            del self.flat_gradient, self.raw_gradient

    def slice(self, first: int, last: int) -> "FlatView":
        """Return coordinates [first, last) as a view of their own, on the same memory, without what is private."""
        x = self.x[first:last]
        entries = {}
        for entry in ENTRIES:
            value = None if entry.private else self.entry(entry)
            if value is not None:
                entries[entry.name] = value.view(-1)[first:last]
        sent = self.flat_gradient[first:last] if self.present else None
        shape = self.parameter.shape if last - first == self.parameter.numel() else None
        return FlatView(x, self.group, {x: entries}, self.present, self.inverse_scale, sent=sent, shape=shape)

    def shared(self) -> list[Tensor]:
        """Return what is the same on all ranks, as far as it is there: the parameter, its verdict momentum."""
        entries = self.state.get(self.parameter, {})
        return [self.parameter, *(entries[name] for name in self.shared_names())]

    def shared_names(self) -> list[str]:
        """Return which entries of the state are there that are the same on all ranks."""
        entries = self.state.get(self.parameter, {})
        return [entry.name for entry in ENTRIES if not entry.private and entry.name in entries]

    def directions(self, lo: int, hi: int) -> Tensor:
        """Take the gradient into the momentum and return what to vote with: steps 1-3.

        Args:
            lo: first coordinate, counted from the view's own first.
            hi: the one after the last.

        Returns:
            The direction, float32.
        """
        gradient = self.gradient(lo, hi)
        g = torch.nan_to_num(-gradient if self.group["maximize"] else gradient, nan=0.0, posinf=0.0, neginf=0.0)
        beta1, beta2 = self.group["betas"]
        momentum = self.momentum
        if momentum is None:
            return g
        m = momentum.view(-1)[lo:hi]
        exact = m.float()  # a narrower momentum rounds once, when it is stored
        c = core.direction(exact, g, beta1)
        m.copy_(c if beta1 == beta2 else core.update_momentum(exact, g, beta2))
        return g if self.by_gradient else c

    def apply(self, lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameter by the verdict, float32 of `hi − lo` coordinates: steps 7 and 8."""
        group, u, mean = self.group, verdict, self.verdict_momentum
        if mean is not None:
            mean = mean.view(-1)[lo:hi]
            u = core.update_verdict_momentum(mean, verdict, group["verdict_momentum"])
            mean.copy_(u)
        x = self.x[lo:hi]
        exact = torch.promote_types(x.dtype, torch.float32)  # half types round once, at the end
        if self.scale != 1.0:
            u = self.scale * u
        x.copy_(core.update_parameters(x.to(exact), u.to(exact), float(group["lr"]), group["weight_decay"]))

    def finish(self) -> None:
        """Write the coordinates back where they were a copy, and tell autograd, which does not see compiled loops."""
        torch.autograd.graph.increment_version(self.model_parameter)
        if not self.parameter.is_contiguous() and self.x.data_ptr() != self.parameter.data_ptr():
            self.parameter.copy_(self.x.view_as(self.parameter))


def lay_out(views: Sequence[FlatView]) -> int:
    """Give each view its place in the long vector and return the vector's length."""
    length = 0
    for view in views:
        view.start = length
        length = view.stop
    return length


def cover(views: Sequence[FlatView], lo: int, hi: int) -> Iterator[tuple[FlatView, int, int]]:
    """Yield the views that have coordinates in [lo, hi) of the long vector, with their own first and last."""
    first = max(bisect_right(views, lo, key=lambda view: view.start) - 1, 0)
    for view in views[first:]:
        if view.start >= hi:
            return
        a, b = max(lo, view.start), min(hi, view.stop)
        if a < b:
            yield view, a - view.start, b - view.start
