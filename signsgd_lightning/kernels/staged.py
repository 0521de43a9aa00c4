"""What every kernel can do, and how one without loops of its own casts and applies: tile by tile in torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

from ..views import FlatView, cover


class Kernel(ABC):
    """What a device does its own way; ballots are uint8 of shape (…, planes, bytes)."""

    TILE: int
    """Coordinates worked on at a time."""

    @abstractmethod
    def pack(self, directions: Tensor, zeros: Zeros, step: int, worker: int, out: Tensor) -> None:
        """Write the signs of float32 `directions` to `out`, uint8 of shape (planes, ⌈length/8⌉)."""

    @abstractmethod
    def unpack(self, ballot: Tensor, length: int) -> Tensor:
        """Return `length` coordinates of a verdict as float32 −1, +1, and 0 where nobody voted."""

    @abstractmethod
    def verdict(self, ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
        """Return the majority's ballot of `ballots`, shape (workers, planes, a multiple of 8 bytes)."""

    @abstractmethod
    def count_ties(self, ballots: Tensor, masks: Tensor | None) -> int:
        """Return in how many coordinates exactly half of the votes are negative, those without a vote included."""

    @abstractmethod
    def count_bits(self, words: Tensor) -> int:
        """Return how many bits are set in uint8 `words`, any shape of a multiple of 8 bytes."""

    def displace(self, start: Tensor, end: Tensor) -> float:
        """Write ``start − end`` over `end` and return the sum of its finite magnitudes: L1 and L2 of local steps."""
        torch.sub(start, end, out=end)
        total = torch.linalg.vector_norm(end, 1, dtype=torch.float64)
        if not total.isfinite():
            total = torch.nan_to_num(end, 0.0, 0.0, 0.0).abs().sum(dtype=torch.float64)
        return float(total)

    def cast(
        self,
        views: Sequence[FlatView],
        lo: int,
        hi: int,
        zeros: Zeros,
        step: int,
        worker: int,
        out: Tensor,
    ) -> None:
        """Take gradients into momenta and write this worker's ballot: steps 1-4 of [lo, hi) of the long vector.

        Args:
            views: laid out; one without a gradient casts bits that the tally masks.
            lo: first coordinate, a multiple of 8 after the ballot's own first.
            hi: the one after the last.
            zeros: the zero rule.
            step: `t`.
            worker: `i`.
            out: zeros, uint8 of shape (planes, at least ⌈(hi − lo)/8⌉).
        """
        size = min(self.TILE, hi - lo)
        staging = torch.empty(size, dtype=torch.float32, device=out.device)
        for first in range(lo, hi, size):
            last = min(first + size, hi)
            for view, a, b in cover(views, first, last):
                place = staging[view.start + a - first : view.start + b - first]
                if not view.present:
                    place.zero_()
                    continue
                place.copy_(view.directions(a, b))
            self.pack(staging[: last - first], zeros, step, worker, out[:, (first - lo) // 8 : -(-(last - lo) // 8)])

    def apply(self, views: Sequence[FlatView], lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameters by a verdict, uint8 of shape (planes, bytes): steps 7 and 8 of [lo, hi)."""
        size = min(self.TILE, hi - lo)
        for first in range(lo, hi, size):
            last = min(first + size, hi)
            signs = self.unpack(verdict[:, (first - lo) // 8 :], last - first)
            for view, a, b in cover(views, first, last):
                view.apply(a, b, signs[view.start + a - first : view.start + b - first])

    def alone(self, views: Sequence[FlatView], zeros: Zeros, step: int) -> None:
        """Take all steps of views that have a gradient by their own ballot, as a worker without others does."""
        bit = core.zero_bit(zeros, step)
        for view in views:
            length = view.parameter.numel()
            for lo in range(0, length, min(self.TILE, max(length, 1))):
                hi = min(lo + self.TILE, length)
                c = view.directions(lo, hi)
                verdict = c.sign()
                if bit is not None:
                    verdict = verdict.masked_fill(c == 0, 1 - 2 * bit)
                view.apply(lo, hi, verdict)
