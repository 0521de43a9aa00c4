"""What is watched of a vote: statistics for a monitor, and whether the ranks are still the same."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from signsgd_core.wire import DIGEST_BYTES, Digests, digest, find_difference

from ..kernels import Kernel
from ..memory import as_bytes, plain
from ..views import FlatView
from .agreement import Purpose, meet
from .transport import Message

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


class RanksDifferError(RuntimeError):
    """Parameters or verdict momenta are not the same on all ranks.

    Attributes:
        ranks: those that differ from the most others.
        step: after which it was found; that of the first vote, before it was taken.
        parameter: the name of the first that differs.
    """

    def __init__(self, message: str, ranks: list[int] | None = None, step: int = 0, parameter: str = "") -> None:
        super().__init__(message)
        self.ranks, self.step, self.parameter = ranks or [], step, parameter


class Verification(Observer):
    """Makes sure that all ranks hold the same bits, once in so many steps.

    Args:
        every_n_steps: how often.
    """

    counts = False

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def end(self, vote: "Vote", views: Sequence[FlatView], step: int) -> None:
        """Compare, where it is time.

        Raises:
            RanksDifferError: if the ranks differ, on all of them.
            PeerLostError: if a rank does not answer.
        """
        if (step + 1) % self.every_n_steps == 0:
            verify(vote, views, step, f"after step {step}", _LATER)


_LATER = (
    "memory failed there, or code changed parameters on that rank alone. Restart all ranks from the last checkpoint."
)
_FIRST = (
    "all must start from the same values. Load weights and states on every rank, before the model is wrapped, and let "
    "DDP broadcast all parameters (init_sync=True, none ignored). With local steps, call LocalSteps.open where "
    "something else than the optimizers moves parameters first."
)


def verify_first(vote: "Vote", views: Sequence[FlatView], step: int) -> None:
    """Make sure, before anything is voted on, that all ranks start from the same bits.

    Raises:
        RanksDifferError: if not, on all of them; then nothing was changed.
        PeerLostError: if a rank does not answer.
    """
    verify(vote, views, step, "before the first vote", _FIRST)


def verify(vote: "Vote", views: Sequence[FlatView], step: int, when: str, remedy: str) -> None:
    """Make sure that all ranks hold the same parameters and verdict momenta, bit for bit.

    Args:
        vote: among whose ranks.
        views: all parameters of the optimizer.
        step: `t`.
        when: in words.
        remedy: what is wrong then, and what to do.

    Raises:
        RanksDifferError: if not, on all of them.
        PeerLostError: if a rank does not answer.
    """
    everyone = vote.topology.everyone
    device = everyone.wire(views[0].parameter.device)
    own = np.stack([np.frombuffer(_digest(view.shared()), np.uint8) for view in views])[None]

    def compare(whole: Digests) -> Digests:
        headers = meet(everyone, Purpose.VERIFY, device, whole.tobytes())
        return vote.topology.side_by_side(headers[:, None, :DIGEST_BYTES]).numpy()

    def collect(each: Digests) -> Digests:
        rows = everyone.gather(torch.from_numpy(each[0].copy()).to(device), Message.DIGESTS)
        return vote.topology.side_by_side(rows.cpu()).numpy()

    found = find_difference(own, compare, collect)
    if found is None:
        return
    (place, number), rows = divmod(found[0], len(views)), found[1]
    ranks = sorted(vote.topology.rank_of(row, place) for row in rows)
    who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
    name = vote.name_of(views[number].model_parameter)
    raise RanksDifferError(
        f"{when} {who} from the other ranks in {name}, or in its verdict momentum: {remedy}",
        ranks,
        step,
        name,
    )


def _digest(values: Sequence[Tensor]) -> bytes:
    return digest(as_bytes(plain(v.detach()).cpu()).numpy() for v in values)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    differ = a ^ b
    return differ[0] if len(differ) == 1 else differ[0] | differ[1]
