"""What is watched of a vote: any observer, and statistics for a monitor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels import Kernel
from ..views import FlatView

if TYPE_CHECKING:
    from .vote import Vote


class Observer:
    """Is told what happens in a vote; whatever it does changes nothing of it.

    Attributes:
        counts: whether ballots and verdicts are to be shown to it, which costs a little.
    """

    counts = True

    def begin(self, views: Sequence[FlatView]) -> None:
        """A vote on these views begins."""

    def gradient(self, gradient: Tensor) -> None:
        """A gradient of this rank, as it came, is taken into a ballot."""

    def tally(self, kernel: Kernel, ballots: Tensor, masks: Tensor | None, length: int) -> None:
        """This rank counts its shard: `length` coordinates of everybody's ballots, the rest of them padding."""

    def verdict(self, kernel: Kernel, lo: int, length: int, ballot: Tensor, bits: Tensor, mask: Tensor | None) -> None:
        """A bucket's verdict is there.

        Args:
            kernel: for the device of the bits.
            lo: the bucket's first coordinate.
            length: how many coordinates of it are real; the rest is padding.
            ballot: this rank's, uint8 of shape (planes, bytes).
            bits: the verdict, of the same shape.
            mask: bit 0 where this rank did not vote, shape (1, bytes); None where it voted everywhere.
        """

    def end(self, vote: "Vote", views: Sequence[FlatView], step: int) -> None:
        """The step is taken on all views of the optimizer."""


def note_for(observers: Sequence[Observer]) -> Callable[[Tensor], None] | None:
    """Return what shows the observers a gradient, None where nobody watches."""
    if not observers:
        return None

    def note(gradient: Tensor) -> None:
        for observer in observers:
            observer.gradient(gradient)

    return note


class VoteStatistics(Observer):
    """Counts of one vote or several, taken from the packed bits.

    Attributes:
        coordinates: on how many this rank voted.
        disagreements: on how many of them its ballot was not the verdict.
        compared: how many coordinates had a verdict at the vote before, too.
        flips: on how many of those the verdict changed.
        tallied: how many coordinates this rank counted, in its shards.
        ties: on how many of those the tally was tied.
        nonfinite: gradient entries of this rank that were NaN or ±Inf.
    """

    def __init__(self) -> None:
        self.coordinates = self.disagreements = self.compared = self.flips = self.tallied = self.ties = 0
        self.nonfinite = 0
        self._last, self._parameters = dict[int, Tensor](), list[int]()

    def take(self, names: Sequence[str]) -> list[float]:
        """Return counts by name, and start over; the last verdict is kept, to compare the next with."""
        counts = [float(getattr(self, name)) for name in names]
        last, parameters = self._last, self._parameters
        VoteStatistics.__init__(self)
        self._last, self._parameters = last, parameters
        return counts

    def begin(self, views: Sequence[FlatView]) -> None:
        """Take note of the parameters; the last verdict on others says nothing about them."""
        parameters = [id(view.parameter) for view in views]
        if parameters != self._parameters:
            self._last, self._parameters = {}, parameters

    def gradient(self, gradient: Tensor) -> None:
        """Count the entries that are not finite."""
        if not gradient.sum().isfinite():  # five times cheaper than to look at each, and as good if there is none
            self.nonfinite += int(gradient.numel() - gradient.isfinite().sum())

    def tally(self, kernel: Kernel, ballots: Tensor, masks: Tensor | None, length: int) -> None:
        """Count the ties."""
        padding = 8 * ballots.shape[-1] - length
        self.ties += kernel.count_ties(ballots, masks)
        if len(ballots[0]) == 2:
            self.ties -= padding  # where nobody votes the tally is tied
        self.tallied += length

    def verdict(self, kernel: Kernel, lo: int, length: int, ballot: Tensor, bits: Tensor, mask: Tensor | None) -> None:
        """Count where this rank's ballot is not the verdict, and where the verdict is not the last one."""
        differ = _differences(ballot, bits)
        padding = 8 * ballot.shape[-1] - length
        self.coordinates += length if mask is None else kernel.count_bits(mask) - padding
        self.disagreements += kernel.count_bits(differ if mask is None else differ & mask)
        bits = bits[:, : 8 * -(-length // 64)]  # there is less padding, or more, where workers come and go
        if lo in self._last:
            self.compared += length
            self.flips += kernel.count_bits(_differences(self._last[lo], bits))
        self._last[lo] = bits


def _differences(a: Tensor, b: Tensor) -> Tensor:
    differ = a ^ b
    return differ[0] if len(differ) == 1 else differ[0] | differ[1]
