"""What a vote looked like from one rank."""

from dataclasses import dataclass, field

from torch import Tensor

from .kernels import Kernel


@dataclass
class VoteStatistics:
    """Counts of one vote or several, taken from the packed bits.

    Attributes:
        coordinates: on how many this rank voted.
        disagreements: on how many of them its ballot was not the verdict.
        compared: how many coordinates had a verdict at the vote before, too.
        flips: on how many of those the verdict changed.
        tallied: how many coordinates this rank counted as teller of its shards.
        ties: on how many of those the tally was tied.
        nonfinite: gradient entries of this rank that were NaN or ±Inf.
        last: the last verdict of each block, by the block's first coordinate.
        parameters: what that vote was about.
    """

    coordinates: int = 0
    disagreements: int = 0
    compared: int = 0
    flips: int = 0
    tallied: int = 0
    ties: int = 0
    nonfinite: int = 0
    last: dict[int, Tensor] = field(default_factory=dict, repr=False)
    parameters: list[int] = field(default_factory=list, repr=False)

    def begin(self, parameters: list[int]) -> None:
        """Take note of the parameters that are voted on; the last verdict on others says nothing about them."""
        if parameters != self.parameters:
            self.last, self.parameters = {}, parameters

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

    def count_verdict(
        self, kernel: Kernel, block: int, length: int, ballots: Tensor, verdict: Tensor, mask: Tensor | None
    ) -> None:
        """Count where this rank's ballots of a block, uint8 of shape (planes, bytes), are not the verdict.

        Args:
            kernel: for the device of the bits.
            block: the block's first coordinate.
            length: how many coordinates of it are real; the rest is padding.
            ballots: this rank's.
            verdict: of the same shape.
            mask: bit 0 where this rank did not vote, shape (1, bytes); None where it voted everywhere.
        """
        differ = _differences(ballots, verdict)
        padding = 8 * ballots.shape[-1] - length
        self.coordinates += length if mask is None else kernel.count_bits(mask) - padding
        self.disagreements += kernel.count_bits(differ if mask is None else differ & mask)
        if block in self.last:
            self.compared += length
            self.flips += kernel.count_bits(_differences(self.last[block], verdict))
        self.last[block] = verdict


def _differences(a: Tensor, b: Tensor) -> Tensor:
    differ = a ^ b
    return differ[0] if len(differ) == 1 else differ[0] | differ[1]
