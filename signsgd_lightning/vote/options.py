"""What a vote is asked to do, as one object that is handed on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from signsgd_core import check_count
from signsgd_core.adversaries import Adversary, check_adversaries
from signsgd_core.wire import BUCKET_SIZE

VoteBetween = Literal["ranks", "nodes"]
"""Who is a worker: every rank, or all ranks of a node together."""


@dataclass(frozen=True)
class VoteOptions:
    """Options of a vote.

    Attributes:
        verify_every_n_steps: how often all ranks make sure that they hold the same parameters and verdict momenta, bit
            for bit; 0 for never.
        adversaries: worker -> what it makes of its gradients before it votes.
        vote_between: who is a worker.
        overlap: whether ballots travel while the backward pass goes on.
        bucket_size: coordinates whose ballots travel together; the verdict does not depend on it.

    Raises:
        ValueError: for values outside their range, or `overlap` with what it excludes.
    """

    verify_every_n_steps: int = 0
    adversaries: Mapping[int, Adversary] | None = None
    vote_between: VoteBetween = "ranks"
    overlap: bool = False
    bucket_size: int = BUCKET_SIZE

    def __post_init__(self) -> None:
        """Check the values."""
        check_count("verify_every_n_steps", self.verify_every_n_steps, 0)
        if self.vote_between not in get_args(VoteBetween):
            raise ValueError(
                "vote_between must be 'ranks' (each is a worker) or 'nodes' (those of a machine are one), got "
                f"{self.vote_between!r}"
            )
        self.exclude({"vote_between='nodes'": self.vote_between == "nodes", "adversaries": bool(self.adversaries)})

    def exclude(self, found: Mapping[str, bool]) -> None:
        """Make sure that `overlap` is not asked for together with something that it excludes.

        Args:
            found: name -> whether it is there.

        Raises:
            ValueError: if it is.
        """
        names = [name for name, there in found.items() if there]
        if self.overlap and names:
            raise ValueError(f"overlap=True excludes {', '.join(names)}: leave out either")

    def exclude_nodes(self, found: str) -> None:
        """Make sure that nodes are not to vote beside something that says otherwise which ranks are a worker.

        Raises:
            ValueError: if they are.
        """
        if self.vote_between == "nodes":
            raise ValueError(f"vote_between='nodes' excludes {found}, whose mesh says which ranks are one worker")

    def check_workers(self, workers: int) -> None:
        """Make sure that the workers that are to lie are there, and not all of them.

        Raises:
            ValueError: if not.
        """
        check_adversaries(self.adversaries, workers, "rank" if self.vote_between == "ranks" else "node")


NAMES = tuple(field.name for field in fields(VoteOptions))
