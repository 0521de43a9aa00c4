"""What rounds of local steps are asked to do, as one object that is handed on."""

from collections.abc import Mapping
from dataclasses import dataclass

import signsgd_core as core
from signsgd_core.adversaries import Adversary


@dataclass(frozen=True)
class LocalStepOptions:
    """Options of local steps.

    Attributes:
        sync_every: `H`, how many steps of its own each rank takes before a vote.
        outer_lr: η.
        outer_momentum: μ.
        verify_every_n_rounds: how often all ranks make sure that they hold the same parameters and outer momenta, bit
            for bit; 0 for never.
        adversaries: rank -> what it makes of its displacements before it votes.

    Raises:
        ValueError: for values outside their range.
    """

    sync_every: int = 16
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    verify_every_n_rounds: int = 0
    adversaries: Mapping[int, Adversary] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        core.check_local_steps(self.sync_every, self.outer_lr, self.outer_momentum)
        core.check_count("verify_every_n_rounds", self.verify_every_n_rounds, 0)

    def in_words(self) -> str:
        """Return what all ranks must have in common."""
        return f"sync_every={self.sync_every}, outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}"
