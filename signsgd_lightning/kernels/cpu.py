"""CPU: NumPy on the tensors' own memory, in tiles that stay in the core's cache."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

from .staged import Kernel

_WORDS = 8_192
"""Words of 64 coordinates tallied at a time: some ten temporaries of 64 KiB."""

Words = npt.NDArray[np.uint64]


class NumpyKernel(Kernel):
    """NumPy, where no compiler is."""

    TILE = 65_536

    def pack(self, directions: Tensor, zeros: Zeros, step: int, worker: int, out: Tensor) -> None:
        """Pack the signs of a vector in NumPy on the tensors' own memory; see `Kernel.pack`."""
        core.pack(directions.numpy(), zeros, step, worker, out=out.numpy())

    def unpack(self, ballot: Tensor, length: int) -> Tensor:
        """Unpack bits into signs; see `Kernel.unpack`."""
        return torch.from_numpy(core.unpack(ballot.numpy(), length))

    def verdict(self, ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
        """Return the verdict on a shard in tiles of words; see `Kernel.verdict`."""
        out = torch.empty_like(ballots[0])
        words = out.numpy().view(np.uint64)
        for cut, tile, mask in _tiles(ballots, masks):
            for plane, bits in zip(words, core.verdict(tile, zeros, step, mask), strict=True):
                plane[cut] = bits
        return out

    def count_ties(self, ballots: Tensor, masks: Tensor | None) -> int:
        """Return how many tallies are tied; see `Kernel.count_ties`."""
        return sum(
            int(np.bitwise_count(core.majority(tile, mask)[1]).sum()) for _, tile, mask in _tiles(ballots, masks)
        )

    def count_bits(self, words: Tensor) -> int:
        """Return how many bits are set; see `Kernel.count_bits`."""
        return int(np.bitwise_count(words.numpy().reshape(-1).view(np.uint64)).sum(dtype=np.int64))


def packbits(bits: Tensor) -> Tensor:
    """Pack a bool tensor along its last axis, little-endian, 8 to a byte."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def unpackbits(words: Tensor, length: int) -> Tensor:
    """Return the first `length` bits along the last axis of what `packbits` packed, as bool."""
    return torch.from_numpy(np.unpackbits(words.numpy(), axis=-1, count=length, bitorder="little")).bool()


def _tiles(ballots: Tensor, masks: Tensor | None) -> Iterator[tuple[slice, list[list[Words]], list[Words] | None]]:
    words = ballots.numpy().view(np.uint64)
    mask_words = None if masks is None else masks.numpy().view(np.uint64)
    for lo in range(0, words.shape[-1], _WORDS):
        cut = slice(lo, lo + _WORDS)
        tile = [[plane[cut] for plane in ballot] for ballot in words]
        yield cut, tile, None if mask_words is None else [mask[cut] for mask in mask_words]
