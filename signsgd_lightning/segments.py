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


@dataclass
class Segment:
    """One parameter's coordinates, in row-major order whatever its memory layout.

    Attributes:
        parameter: `x`, floating point, any shape.
        group: the parameter group it belongs to, with its settings.
        state: the optimizer's; the momenta appear there when first needed, float32.
        present: whether this rank has a gradient for it.
        inverse_scale: factor on the gradient, where a gradient scaler asks for one.
        start: its first coordinate in the long vector.
    """

    parameter: Tensor
    group: dict[str, Any]
    state: MutableMapping[Tensor, dict[str, Tensor]]
    present: bool
    inverse_scale: Tensor | None = None
    start: int = 0

    @property
    def stop(self) -> int:
        """The coordinate after its last."""
        return self.start + self.parameter.numel()

    @cached_property
    def x(self) -> Tensor:
        """The parameter, flat: a view where its memory is row-major, else a copy."""
        return self.parameter.detach().reshape(-1)

    @cached_property
    def _gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad.detach().reshape(-1)

    def lie(self, adversary: Adversary) -> None:
        """Put what an adversary sends in the gradient's place; without anything to send it abstains."""
        sent = adversary(self._gradient.float().cpu().numpy().reshape(self.parameter.shape))
        self.present = sent is not None
        if sent is not None:
            self._gradient = torch.from_numpy(np.array(sent)).to(self.parameter.device).reshape(-1)

    def shared(self) -> list[Tensor]:
        """Return what is the same on all ranks: the parameter, and its verdict momentum where there is one."""
        average = self.state.get(self.parameter, {}).get("verdict_momentum")
        return [self.parameter] if average is None else [self.parameter, average]

    def directions(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Take the gradient into the momentum and return what to vote with: steps 1-3.

        Args:
            lo: first coordinate, counted from the segment's own first.
            hi: the one after the last.

        Returns:
            The direction, float32, and the gradient as it came, to count what was not finite.
        """
        gradient = self._gradient[lo:hi].float()
        if self.inverse_scale is not None:
            gradient = gradient * self.inverse_scale
        g = torch.nan_to_num(-gradient if self.group["maximize"] else gradient, nan=0.0, posinf=0.0, neginf=0.0)
        beta1, beta2 = self.group["betas"]
        if beta1 == 0:
            return g, gradient  # c = g: a momentum would never be read
        m = self._state("momentum")[lo:hi]
        c = core.direction(m, g, beta1)
        m.copy_(c if beta1 == beta2 else core.update_momentum(m, g, beta2))
        return (c if self.group["step"] >= self._warmup_steps else g), gradient

    def apply(self, lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameter by the verdict, float32 of `hi − lo` coordinates: steps 7 and 8."""
        group, u = self.group, verdict
        if group["verdict_momentum"]:
            average = self._state("verdict_momentum")[lo:hi]
            u = core.update_verdict_momentum(average, verdict, group["verdict_momentum"])
            average.copy_(u)
        x = self.x[lo:hi]
        exact = torch.promote_types(x.dtype, torch.float32)  # half types round once, at the end
        x.copy_(core.update_parameters(x.to(exact), u.to(exact), float(group["lr"]), group["weight_decay"]))

    def finish(self) -> None:
        """Write the coordinates back where they were a copy."""
        if self.x.data_ptr() != self.parameter.data_ptr():
            self.parameter.copy_(self.x.view_as(self.parameter))

    @property
    def _warmup_steps(self) -> int:
        steps = self.group["warmup_steps"]
        return core.warmup_steps(self.group["betas"][1]) if steps == "auto" else steps

    def _state(self, name: str) -> Tensor:
        state, p = self.state[self.parameter], self.parameter
        if name not in state:
            state[name] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        return state[name].view(-1)


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
