"""What every kernel can do, and how one without loops of its own casts and applies: chunk by chunk in torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

from ..segments import Segment, cover

Note = Callable[[Tensor], None]
"""Is shown every gradient as it came."""


class Kernel(ABC):
    """What a device does its own way; ballots are uint8 of shape (…, planes, bytes)."""

    CHUNK: int
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

    def cast(
        self,
        segments: Sequence[Segment],
        lo: int,
        hi: int,
        zeros: Zeros,
        step: int,
        worker: int,
        out: Tensor,
        note: Note | None = None,
    ) -> None:
        """Take gradients into momenta and write this worker's ballot: steps 1-4 of [lo, hi) of the long vector.

        Args:
            segments: laid out; one without a gradient casts something that the teller masks.
            lo: first coordinate, a multiple of 8 after the ballot's own first.
            hi: the one after the last.
            zeros: the zero rule.
            step: `t`.
            worker: `i`.
            out: zeros, uint8 of shape (planes, at least ⌈(hi − lo)/8⌉).
            note: is shown every gradient.
        """
        chunk = min(self.CHUNK, hi - lo)
        staging = torch.empty(chunk, device=out.device)
        for first in range(lo, hi, chunk):
            last = min(first + chunk, hi)
            for segment, a, b in cover(segments, first, last):
                place = staging[segment.start + a - first : segment.start + b - first]
                if not segment.present:
                    place.zero_()
                    continue
                c, gradient = segment.directions(a, b)
                place.copy_(c)
                if note is not None:
                    note(gradient)
            self.pack(staging[: last - first], zeros, step, worker, out[:, (first - lo) // 8 : -(-(last - lo) // 8)])

    def apply(self, segments: Sequence[Segment], lo: int, hi: int, verdict: Tensor) -> None:
        """Move the parameters by a verdict, uint8 of shape (planes, bytes): steps 7 and 8 of [lo, hi)."""
        chunk = min(self.CHUNK, hi - lo)
        for first in range(lo, hi, chunk):
            last = min(first + chunk, hi)
            signs = self.unpack(verdict[:, (first - lo) // 8 :], last - first)
            for segment, a, b in cover(segments, first, last):
                segment.apply(a, b, signs[segment.start + a - first : segment.start + b - first])

    def alone(self, segments: Sequence[Segment], zeros: Zeros, step: int) -> None:
        """Take all steps of segments that have a gradient by their own ballot, as a worker without others does."""
        bit = core.zero_bit(zeros, step)
        for segment in segments:
            length = segment.parameter.numel()
            for lo in range(0, length, min(self.CHUNK, max(length, 1))):
                hi = min(lo + self.CHUNK, length)
                c, _ = segment.directions(lo, hi)
                verdict = c.sign()
                if bit is not None:
                    verdict = verdict.masked_fill(c == 0, 1 - 2 * bit)
                segment.apply(lo, hi, verdict)
