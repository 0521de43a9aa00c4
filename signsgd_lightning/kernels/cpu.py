"""CPU: NumPy on the tensors' own memory, in blocks that stay in the core's cache."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

CHUNK = 65_536
_WORDS = 8_192
"""Words of 64 coordinates tallied at a time: some ten temporaries of 64 KiB."""

Words = npt.NDArray[np.uint64]


def pack(directions: Tensor, zeros: Zeros, step: int, worker: int, out: Tensor) -> None:
    """Write the signs of float32 `directions` to `out`, uint8 of shape (planes, ⌈length/8⌉)."""
    core.pack(directions.numpy(), zeros, step, worker, out=out.numpy())


def unpack(ballot: Tensor, length: int) -> Tensor:
    """Return `length` coordinates of a verdict as float32 −1, +1, and 0 where nobody voted."""
    return torch.from_numpy(core.unpack(ballot.numpy(), length))


def verdict(ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
    """Return the majority's ballot of `ballots`, shape (workers, planes, a multiple of 8 bytes)."""
    out = torch.empty_like(ballots[0])
    words = out.numpy().view(np.uint64)
    for cut, block, mask in _blocks(ballots, masks):
        for plane, bits in zip(words, core.verdict(block, zeros, step, mask), strict=True):
            plane[cut] = bits
    return out


def count_ties(ballots: Tensor, masks: Tensor | None) -> int:
    """Return in how many coordinates exactly half of the votes are negative, those without a vote included."""
    return sum(int(np.bitwise_count(core.majority(block, mask)[1]).sum()) for _, block, mask in _blocks(ballots, masks))


def count_bits(words: Tensor) -> int:
    """Return how many bits are set in uint8 `words`, any shape of a multiple of 8 bytes."""
    return int(np.bitwise_count(words.numpy().reshape(-1).view(np.uint64)).sum(dtype=np.int64))


def packbits(bits: Tensor) -> Tensor:
    """Pack a bool tensor along its last axis, little-endian, 8 to a byte."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def unpackbits(words: Tensor, length: int) -> Tensor:
    """Return the first `length` bits along the last axis of what `packbits` packed, as bool."""
    return torch.from_numpy(np.unpackbits(words.numpy(), axis=-1, count=length, bitorder="little")).bool()


def _blocks(ballots: Tensor, masks: Tensor | None) -> Iterator[tuple[slice, list[list[Words]], list[Words] | None]]:
    words = ballots.numpy().view(np.uint64)
    mask_words = None if masks is None else masks.numpy().view(np.uint64)
    for lo in range(0, words.shape[-1], _WORDS):
        cut = slice(lo, lo + _WORDS)
        block = [[plane[cut] for plane in ballot] for ballot in words]
        yield cut, block, None if mask_words is None else [mask[cut] for mask in mask_words]
