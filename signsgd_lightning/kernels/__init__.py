"""What a device does best its own way: packing signs, tallying ballots, unpacking a verdict.

One module a device, all with the same functions; `signsgd_core` judges each of them bit for bit.
"""

from typing import Protocol

import torch
from torch import Tensor

from signsgd_core import Zeros

from . import cpu, cuda


class Kernel(Protocol):
    """The functions that every kernel module has; ballots are uint8 of shape (…, planes, bytes)."""

    CHUNK: int
    """Coordinates worked on at a time."""

    def pack(self, directions: Tensor, zeros: Zeros, step: int, worker: int, out: Tensor) -> None:
        """Write the signs of float32 `directions` to `out`, uint8 of shape (planes, ⌈length/8⌉)."""

    def unpack(self, ballot: Tensor, length: int) -> Tensor:
        """Return `length` coordinates of a verdict as float32 −1, +1, and 0 where nobody voted."""

    def verdict(self, ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
        """Return the majority's ballot of `ballots`, shape (workers, planes, a multiple of 8 bytes)."""

    def count_ties(self, ballots: Tensor, masks: Tensor | None) -> int:
        """Return in how many coordinates exactly half of the votes are negative, those without a vote included."""

    def count_bits(self, words: Tensor) -> int:
        """Return how many bits are set in uint8 `words`, any shape of a multiple of 8 bytes."""


def for_device(device: torch.device) -> Kernel:
    """Return the kernel module for a device."""
    return cpu if device.type == "cpu" else cuda
