"""A model variable with all that a step of it needs: its state, its formulas, its weight decay."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from keras import ops

import signsgd_core as core
from signsgd_core import Zeros

from .state import MOMENTA, MOMENTUM, VERDICT_MOMENTUM
from .update import Update

Tensor = Any
Variable = Any


class Slot(NamedTuple):
    """A model variable with what a step of it needs.

    Attributes:
        variable: `x`.
        state: entry's name -> variable, of those `MOMENTA` that it needs; None for all of a variable that Keras writes.
        weight_decay: λ, 0 where the variable is excluded from it.
        update: the formulas, with the settings of this variable.
    """

    variable: Variable
    state: Mapping[str, Variable | None]
    weight_decay: float
    update: Update

    @property
    def momentum(self) -> Variable | None:
        """`m`, None where the settings need none."""
        return self.state.get(MOMENTUM.name)

    @property
    def verdict_momentum(self) -> Variable | None:
        """`u`, None where the settings need none."""
        return self.state.get(VERDICT_MOMENTUM.name)

    @property
    def shared(self) -> list[Variable]:
        """Return what must be the same on all replicas: the variable, and of its state what is not private."""
        found = (self.state.get(entry.name) for entry in MOMENTA if not entry.private)
        return [self.variable, *(variable for variable in found if variable is not None)]

    @property
    def size(self) -> int:
        """The number of its coordinates."""
        return int(np.prod(self.variable.shape))

    @property
    def ballot_bytes(self) -> int:
        """The bytes that it takes of each plane of a ballot."""
        return -(-self.size // 8)

    def step_alone(self, gradient: Tensor, zeros: Zeros, step: Tensor, learning_rate: Tensor) -> None:
        """Take one step without a vote: steps 1-8 with the worker's ballot for a verdict.

        Args:
            gradient: of the variable's shape, dense.
            zeros: the zero rule.
            step: `t`.
            learning_rate: `lr`.
        """
        bit, update = core.zero_bit(zeros, ops.cast(step, "int32")), self.update
        arrays = self.variable, gradient, self.momentum, self.verdict_momentum
        for x, g, m, u in update.backend.tiles(*arrays, whole=update.polar is not None):
            c = update.direction(g, m, step)
            verdict = ops.sign(c)
            if bit is not None:
                verdict = ops.where(ops.equal(c, 0), 1 - 2 * ops.cast(bit, c.dtype), verdict)
            update.move(x, verdict, u, learning_rate, self.weight_decay)
