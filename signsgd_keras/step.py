"""What one step of the optimizer is about, as `Signum` hands it to the vote."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from signsgd_core import Zeros

from .slot import Slot

Tensor = Any
Variable = Any
Gradients = Sequence[Sequence[Tensor]]
"""Of this worker's replicas, each a list, dense."""


class Accumulation(NamedTuple):
    """Gradients of several steps that one vote is on.

    Attributes:
        steps: how many.
        is_last: whether the step being taken ends with a vote, a boolean scalar.
        sums: of all the optimizer's variables, each replica's own.
        numbers: of the variables that have a gradient in this step.
    """

    steps: int
    is_last: Tensor
    sums: Sequence[Variable]
    numbers: Sequence[int]


class StepInput(NamedTuple):
    """What a step is about.

    Attributes:
        gradients: of this worker's replicas.
        slots: the variables that they are of, with their state and formulas.
        clip: takes a replica's gradients and returns them clipped.
        zeros: the zero rule.
        step: `t`.
        learning_rate: `lr`.
        weight_decay: λ of the optimizer.
        settings: the optimizer's by name, the same on all workers.
        ballot_bytes: of one plane, of all the optimizer's variables.
        accumulation: of gradients; None where each step votes.
    """

    gradients: Gradients
    slots: Sequence[Slot]
    clip: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    zeros: Zeros
    step: Tensor
    learning_rate: Tensor
    weight_decay: float | None
    settings: dict[str, Any]
    ballot_bytes: int
    accumulation: Accumulation | None = None
