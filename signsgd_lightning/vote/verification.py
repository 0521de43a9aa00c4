"""Do all ranks hold the same bits? Digests of parameters and verdict momenta, compared between all ranks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from signsgd_core.wire import DIGEST_BYTES, Digests, digest, find_difference

from ..memory import as_bytes, plain
from ..views import FlatView
from .agreement import Purpose, meet
from .observers import Observer
from .transport import Message

if TYPE_CHECKING:
    from .vote import Vote


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
    verify(vote, views, step, f"before step {step}" if step else "before the first vote", _FIRST)


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
    others = "one another" if len(ranks) == everyone.world_size else "the other ranks"
    who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
    name = vote.name_of(views[number].model_parameter)
    raise RanksDifferError(
        f"{when} {who} from {others} in {name}, or in its verdict momentum: {remedy}",
        ranks,
        step,
        name,
    )


def _digest(values: Sequence[Tensor]) -> bytes:
    return digest(as_bytes(plain(v.detach()).cpu()).numpy() for v in values)
