"""Steps 1-3, 2b, 7 and 8 on variables: gradient to direction and momentum, verdict to update."""

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

import signsgd_core as core

from .backend import Backend
from .polar import Polar

Tensor = Any
Variable = Any


@dataclass(frozen=True)
class Update:
    """The formulas of `signsgd_core.update` with a variable's settings, as a backend computes them.

    Attributes:
        beta_1: β1.
        beta_2: β2.
        gamma: γ.
        warmup: for how many first steps the ballot is the sign of the gradient.
        backend: of Keras.
        polar: of its direction; None where the variable is not orthogonalized.
        rate: its learning rate, divided by the optimizer's.
    """

    beta_1: float
    beta_2: float
    gamma: float
    warmup: int
    backend: Backend
    polar: Polar | None = None
    rate: float = 1.0

    def direction(self, gradient: Tensor, momentum: Variable | None, step: Tensor) -> Tensor:
        """Take a gradient into the momentum and return the direction `c` to vote with, float32: steps 1-3 and 2b.

        Args:
            gradient: `g`, dense.
            momentum: `m`, float32 of the same shape; None where β1 = 0.
            step: `t`.
        """
        c = self._direction(gradient, momentum, step)
        return c if self.polar is None else self.polar(c)

    def _direction(self, gradient: Tensor, momentum: Variable | None, step: Tensor) -> Tensor:
        """Take a gradient into the momentum and return the direction: steps 1-3."""
        g = self.backend.finite(ops.cast(gradient, "float32"))
        if momentum is None:
            return g
        c = core.direction(momentum, g, self.beta_1)
        m = c if self.beta_1 == self.beta_2 else core.update_momentum(momentum, g, self.beta_2)
        self.backend.write(momentum, m)
        if self.warmup == 0:
            return c
        return ops.cond(ops.less(step, self.warmup), lambda: g, lambda: c)

    def move(
        self, x: Variable, verdict: Tensor, verdict_momentum: Variable | None, learning_rate: Tensor, decay: float
    ) -> None:
        """Move a variable by the verdict: steps 7 and 8.

        Args:
            x: the variable, or a tile of it.
            verdict: `V`, float32 of its shape.
            verdict_momentum: `u`, float32 of its shape; None where γ = 0.
            learning_rate: `lr`.
            decay: λ.
        """
        u = verdict
        if verdict_momentum is not None:
            u = core.update_verdict_momentum(verdict_momentum, verdict, self.gamma)
            self.backend.write(verdict_momentum, u)
        if self.polar is not None:
            u = self.polar.matrix.scale * u  # the root mean square of an orthogonal update
        half = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
        exact = "float32" if half else x.dtype  # half types round once, at the end
        lr = ops.cast(learning_rate, exact)
        lr = lr if self.rate == 1 else self.rate * lr
        if half:
            moved = core.update_parameters(ops.cast(x, exact), u, lr, decay)
            self.backend.write(x, ops.cast(moved, x.dtype))
        else:
            self.backend.descend(x, core.decayed(x, ops.cast(u, exact), decay), lr)
