"""A device without loops of its own: whole buckets at a time in tensor operations, so nothing is copied to the host."""

import torch
from torch import Tensor

import signsgd_core as core
from signsgd_core import Zeros

from .staged import Kernel


class DeviceKernel(Kernel):
    """Tensor operations."""

    TILE = 1 << 62
    """No tiles: a device works best on whole tensors."""

    def pack(self, directions: Tensor, zeros: Zeros, step: int, worker: int, out: Tensor) -> None:
        """Pack the signs of a vector; see `Kernel.pack`."""
        bit = core.zero_bit(zeros, step, worker)
        out[0] = _packbits(~(directions > 0) if bit == 1 else directions < 0)
        if zeros == "abstain":
            out[1] = _packbits((directions > 0) | (directions < 0))

    def unpack(self, ballot: Tensor, length: int) -> Tensor:
        """Unpack bits into signs; see `Kernel.unpack`."""
        bits = (ballot.unsqueeze(-1) >> _places(ballot.device)) & 1
        planes = bits.flatten(1)[:, :length].float()
        signs = 1 - 2 * planes[0]
        return signs * planes[1] if len(planes) == 2 else signs

    def verdict(self, ballots: Tensor, zeros: Zeros, step: int, masks: Tensor | None) -> Tensor:
        """Return the verdict on a shard; see `Kernel.verdict`."""
        return torch.stack(core.verdict(_words(ballots), zeros, step, _mask_words(masks))).view(torch.uint8)

    def count_ties(self, ballots: Tensor, masks: Tensor | None) -> int:
        """Return how many tallies are tied; see `Kernel.count_ties`."""
        return self.count_bits(core.majority(_words(ballots), _mask_words(masks))[1].view(torch.uint8))

    def count_bits(self, words: Tensor) -> int:
        """Return how many bits are set; see `Kernel.count_bits`."""
        return int(((words.unsqueeze(-1) >> _places(words.device)) & 1).sum())


def _packbits(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8))
    return (padded.view(-1, 8) << _places(bits.device)).sum(-1, dtype=torch.uint8)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _words(ballots: Tensor) -> list[list[Tensor]]:
    return [list(ballot) for ballot in ballots.view(torch.int64)]


def _mask_words(masks: Tensor | None) -> list[Tensor] | None:
    return None if masks is None else list(masks.view(torch.int64))
