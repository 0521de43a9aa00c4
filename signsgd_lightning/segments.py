"""All parameters of an optimizer as one long vector, in the order of the parameter groups; steps 1-3, 7 and 8 on it."""

from bisect import bisect_right
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core.adversaries import Adversary

from .memory import is_plain, plain


@dataclass
class Segment:
    """One parameter's coordinates, in row-major order whatever its memory layout.

    Attributes:
        parameter: `x`, floating point, any shape.
        group: the parameter group it belongs to, with its settings.
        state: the optimizer's; the momenta appear there when first needed.
        present: whether this rank has a gradient for it.
        inverse_scale: factor on the gradient, where a gradient scaler asks for one.
        start: its first coordinate in the long vector.
        sent: what counts as its gradient, where that is not the parameter's own.
    """

    parameter: Tensor
    group: dict[str, Any]
    state: MutableMapping[Tensor, dict[str, Tensor]]
    present: bool
    inverse_scale: Tensor | None = None
    start: int = 0
    sent: Tensor | None = None

    @property
    def stop(self) -> int:
        """The coordinate after its last."""
        return self.start + self.parameter.numel()

    @cached_property
    def x(self) -> Tensor:
        """The parameter, flat: a view where its memory is row-major, else a copy."""
        return self.parameter.detach().reshape(-1)

    @cached_property
    def raw_gradient(self) -> Tensor:
        """The gradient in memory that holds its value, of the parameter's shape or flat; an adversary's is its lie."""
        gradient = self.parameter.grad if self.sent is None else self.sent
        assert gradient is not None
        return plain(gradient.detach())

    @cached_property
    def flat_gradient(self) -> Tensor:
        """The gradient as it is, flat."""
        return self.raw_gradient.reshape(-1)

    def lie(self, adversary: Adversary) -> None:
        """Put what an adversary sends in the gradient's place; without anything to send it abstains."""
        sent = adversary(self.flat_gradient.float().cpu().numpy().reshape(self.parameter.shape))
        self.present = sent is not None
        if sent is not None:
            self.sent = torch.from_numpy(np.array(sent)).to(self.parameter.device)
            del self.flat_gradient, self.raw_gradient

    def part(self, first: int, last: int) -> "Segment":
        """Return its coordinates [first, last) as a segment of their own, on the same memory, without the momentum."""
        x, average = self.x[first:last], self.average
        entries = {} if average is None else {"verdict_momentum": average[first:last]}
        sent = self.flat_gradient[first:last] if self.present else None
        return Segment(x, self.group, {x: entries}, self.present, self.inverse_scale, sent=sent)

    def shared(self) -> list[Tensor]:
        """Return what is the same on all ranks: the parameter, and its verdict momentum where there is one."""
        average = self.state.get(self.parameter, {}).get("verdict_momentum")
        return [self.parameter] if average is None else [self.parameter, average]

    def gradient(self, lo: int, hi: int) -> Tensor:
        """Return the gradient in [lo, hi), float32, without a gradient scaler's factor."""
        gradient = self.flat_gradient[lo:hi].float()
        return gradient if self.inverse_scale is None else gradient * self.inverse_scale

    @property
    def factor(self) -> float:
        """By what the gradient as it is is multiplied."""
        scale = 1.0 if self.inverse_scale is None else float(self.inverse_scale)
        return -scale if self.group["maximize"] else scale

    @property
    def kept_momentum(self) -> Tensor | None:
        """`m`, row-major; None with β1 = 0, where c = g and it would never be read."""
        return self._state("momentum", momentum_dtype(self.group)) if self.group["betas"][0] > 0 else None

    @property
    def kept_average(self) -> Tensor | None:
        """`u`, row-major; None with γ = 0."""
        return self._state("verdict_momentum", torch.float32) if self.group["verdict_momentum"] else None

    @cached_property
    def momentum(self) -> Tensor | None:
        """`m`, flat."""
        return None if self.kept_momentum is None else self.kept_momentum.view(-1)

    @cached_property
    def average(self) -> Tensor | None:
        """`u`, flat."""
        return None if self.kept_average is None else self.kept_average.view(-1)

    @property
    def by_gradient(self) -> bool:
        """Whether the gradient's sign is voted with, while the momentum settles."""
        steps = self.group["warmup_steps"]
        return bool(self.group["step"] < (core.warmup_steps(self.group["betas"][1]) if steps == "auto" else steps))

    def directions(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Take the gradient into the momentum and return what to vote with: steps 1-3.

        Args:
            lo: first coordinate, counted from the segment's own first.
            hi: the one after the last.

        Returns:
            The direction, float32, and the gradient as it came, to count what was not finite.
        """
        gradient = self.gradient(lo, hi)
        g = torch.nan_to_num(-gradient if self.group["maximize"] else gradient, nan=0.0, posinf=0.0, neginf=0.0)
        beta1, beta2 = self.group["betas"]
        if self.momentum is None:
            return g, gradient
        m = self.momentum[lo:hi]
        exact = m.float()  # a narrower momentum rounds once, when it is stored
        c = core.direction(exact, g, beta1)
        m.copy_(c if beta1 == beta2 else core.update_momentum(exact, g, beta2))
        return (g if self.by_gradient else c), gradient

    def apply(self, lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameter by the verdict, float32 of `hi − lo` coordinates: steps 7 and 8."""
        group, u = self.group, verdict
        if self.average is not None:
            average = self.average[lo:hi]
            u = core.update_verdict_momentum(average, verdict, group["verdict_momentum"])
            average.copy_(u)
        x = self.x[lo:hi]
        exact = torch.promote_types(x.dtype, torch.float32)  # half types round once, at the end
        x.copy_(core.update_parameters(x.to(exact), u.to(exact), float(group["lr"]), group["weight_decay"]))

    def finish(self) -> None:
        """Write the coordinates back where they were a copy, and tell autograd, which does not see compiled loops."""
        torch.autograd.graph.increment_version(self.parameter)
        if not self.parameter.is_contiguous() and self.x.data_ptr() != self.parameter.data_ptr():
            self.parameter.copy_(self.x.view_as(self.parameter))

    def _state(self, name: str, dtype: torch.dtype) -> Tensor:
        state = self.state[self.parameter]
        value = state.get(name)
        if value is None:
            p = self.parameter
            value = state[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        elif value.shape != self.parameter.shape:
            raise RuntimeError(
                f"the {name} of a parameter of shape {tuple(self.parameter.shape)} must have its shape, got "
                f"{tuple(value.shape)}: load what gather_state returned, not the state_dict() of one rank of a node"
            )
        elif value.dtype is not dtype or not value.is_contiguous() or not is_plain(value):
            value = state[name] = plain(value, f"the {name} of a parameter").to(dtype).contiguous()
        return value


def momentum_dtype(group: dict[str, Any]) -> torch.dtype:
    """Return what a parameter group keeps its momenta in; one that was saved before there was a choice does not say."""
    return group.get("momentum_dtype") or torch.float32


def lay_out(segments: Sequence[Segment]) -> int:
    """Give each segment its place in the long vector and return the vector's length."""
    length = 0
    for segment in segments:
        segment.start = length
        length = segment.stop
    return length


def cover(segments: Sequence[Segment], lo: int, hi: int) -> Iterator[tuple[Segment, int, int]]:
    """Yield the segments that have coordinates in [lo, hi) of the long vector, with their own first and last."""
    first = max(bisect_right(segments, lo, key=lambda segment: segment.start) - 1, 0)
    for segment in segments[first:]:
        if segment.start >= hi:
            return
        a, b = max(lo, segment.start), min(hi, segment.stop)
        if a < b:
            yield segment, a - segment.start, b - segment.start
