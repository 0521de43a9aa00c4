"""How a round is taken: once, or again and again where workers are lost."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ..views import FlatView
from ..vote import StepInput
from ..vote.topology import Verdict

Displaced = tuple[list[FlatView], list[float]]
"""What to vote on, and the magnitudes of it."""


class Outcome(NamedTuple):
    """What a vote on displacements came to; nothing was changed by it.

    Attributes:
        given: what it was about.
        verdicts: none where nobody moved.
        magnitudes: of every tensor.
        means: floating-point buffers, each with what it is to become.
        all_early: whether all ranks close the round early.
    """

    given: StepInput
    verdicts: list[Verdict]
    magnitudes: list[float]
    means: list[tuple[Tensor, Tensor]]
    all_early: bool


class Taker(Protocol):
    """Takes a round, again and again where workers are lost."""

    def take(self, attempt: Callable[[], Outcome]) -> Outcome | None:
        """Return what an attempt came to; None where the round is not to be committed."""

    def end(self, tell: Callable[[], None]) -> None:
        """Tell the observers that a round was committed."""


class Once:
    """Takes a round once."""

    def take(self, attempt: Callable[[], Outcome]) -> Outcome | None:
        """Return what the attempt came to."""
        return attempt()

    def end(self, tell: Callable[[], None]) -> None:
        """Tell the observers."""
        tell()
