"""What a vote looked like from one rank."""

from dataclasses import dataclass, field

from torch import Tensor

from .kernels import Kernel


@dataclass
class VoteStatistics:
    """Counts of one vote or several, taken from the packed bits.

    Attributes:
        coordinates: how many were voted on.
        disagreements: on how many of them this rank's ballot was not the verdict.
        compared: how many had a verdict at the vote before, too.
        flips: on how many of those the verdict changed.
        tallied: how many coordinates this rank counted as teller of its shards.
        ties: on how many of those the tally was tied.
        nonfinite: gradient entries of this rank that were NaN or ±Inf.
        last: the last verdict of each block, by the block's first coordinate.
    """

    coordinates: int = 0
    disagreements: int = 0
    compared: int = 0
    flips: int = 0
    tallied: int = 0
    ties: int = 0
    nonfinite: int = 0
    last: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def count_gradient(self, gradient: Tensor) -> None:
        """Count the entries that are not finite."""
        if not gradient.sum().isfinite():  # five times cheaper than to look at each, and as good if there is none
            self.nonfinite += int(gradient.numel() - gradient.isfinite().sum())

    def count_tally(self, kernel: Kernel, ballots: Tensor, masks: Tensor | None, length: int) -> None:
        """Count the ties in this rank's shard, of which `length` coordinates are real and the rest is padding."""
        padding = 8 * ballots.shape[-1] - length
        self.ties += kernel.count_ties(ballots, masks)
        if len(ballots[0]) == 2:
            self.ties -= padding  # where nobody votes the tally is tied
        self.tallied += length

    def count_verdict(self, kernel: Kernel, block: int, length: int, ballots: Tensor, verdict: Tensor) -> None:
        """Count where this rank's ballots of a block, uint8 of shape (planes, bytes), are not the verdict."""
        self.coordinates += length
        self.disagreements += _differences(kernel, ballots, verdict)
        last = self.last.get(block)
        if last is not None and last.shape == verdict.shape:
            self.compared += length
            self.flips += _differences(kernel, last, verdict)
        self.last[block] = verdict


def _differences(kernel: Kernel, a: Tensor, b: Tensor) -> int:
    differ = a ^ b
    return kernel.count_bits(differ[0] if len(differ) == 1 else differ[0] | differ[1])
