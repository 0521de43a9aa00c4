"""The one case table: what every front end must reproduce with `==`.

All numbers are dyadic (gradients in eighths, betas in halves and quarters, lr a power of two), so that every step is
exact in float32 and no order of operations can be told from another.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt

from signsgd_core import Reference, Zeros

Array = npt.NDArray[np.float32]
Gradients = list[list[list[Array | None]]]  # [step][worker][tensor]
Trajectory = list[list[Array]]  # [step][tensor]
Absent = Literal["", "somewhere", "everywhere"]

SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (), (0,), (701,), (2, 3, 4))
STEPS = 5
LR = 0.25


@dataclass(frozen=True)
class Case:
    """One setting of the algorithm on M workers, with its own gradients.

    With `absent` some tensors lack a gradient at some steps: "somewhere" on some of the workers, "everywhere" on all.
    """

    workers: int
    betas: tuple[float, float] = (0.5, 0.5)
    zeros: Zeros = "alternate"
    verdict_momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_steps: int = 0
    absent: Absent = ""

    def __str__(self) -> str:
        words = [f"M{self.workers}", f"betas{self.betas[0]}-{self.betas[1]}", self.zeros]
        words += [f"gamma{self.verdict_momentum}"] * bool(self.verdict_momentum)
        words += [f"decay{self.weight_decay}"] * bool(self.weight_decay)
        words += [f"warmup{self.warmup_steps}"] * bool(self.warmup_steps)
        words += [f"absent_{self.absent}"] * bool(self.absent)
        return "-".join(words)

    def parameters(self) -> list[Array]:
        random = np.random.default_rng(0)
        return [_eighths(random, shape) for shape in SHAPES]

    def gradients(self) -> Gradients:
        """Zeros, ties, NaN and ±Inf are common in them; None is a gradient that is absent."""
        random = np.random.default_rng(self.workers)
        steps = [
            [[_eighths(random, shape, wild=0.05) for shape in SHAPES] for _ in range(self.workers)]
            for _ in range(STEPS)
        ]
        gradients: Gradients = [[list(worker) for worker in step] for step in steps]
        for t, i, k in product(range(STEPS), range(self.workers), range(len(SHAPES))):
            if self._lacks(t, i, k):
                gradients[t][i][k] = None
        return gradients

    def _lacks(self, t: int, i: int, k: int) -> bool:
        """Whether worker `i` has no gradient of tensor `k` at step `t`."""
        if self.absent == "somewhere":
            return (t + i + k) % 3 == 0 or (t, k) == (2, 3)  # tensor 3 on no worker at step 2
        return self.absent == "everywhere" and t % 2 == 1 and k % 2 == 1

    def reference(self, dtype: npt.DTypeLike = np.float32) -> Trajectory:
        """The parameters after each step, [step][tensor], by the executable specification."""
        reference = Reference(
            [x.astype(dtype) for x in self.parameters()],
            self.workers,
            LR,
            self.betas,
            self.weight_decay,
            self.verdict_momentum,
            self.zeros,
            self.warmup_steps,
        )
        trajectory = []
        for gradients in self.gradients():
            reference.step(gradients)
            trajectory.append([x.copy() for x in reference.parameters])
        return trajectory


def cases() -> list[Case]:
    """Every case, in a fixed order: all settings for one to four workers, the zero rules for up to eight."""
    rules: tuple[Zeros, ...] = ("alternate", "abstain", "positive")
    few, many = (1, 2, 3, 4), (5, 6, 7, 8)
    betas = ((0.0, 0.0), (0.5, 0.5), (0.75, 0.25), (0.0, 0.5))
    table = [Case(*settings) for settings in product(few, betas, rules)]
    for workers, zeros in product(few, rules):
        table += [
            Case(workers, (0.0, 0.0), zeros, verdict_momentum=0.75),
            Case(workers, zeros=zeros, weight_decay=0.5),
            Case(workers, zeros=zeros, warmup_steps=2),
        ]
        for absent in _absences(workers):
            table += [Case(workers, zeros=zeros, absent=absent), _everything(workers, zeros, absent)]
    for workers in many:
        table += [Case(workers, zeros=zeros) for zeros in rules]
        table += [_everything(workers, rules[workers % 3], absent) for absent in _absences(workers)]
    return table


def _everything(workers: int, zeros: Zeros, absent: Absent) -> Case:
    return Case(workers, (0.5, 0.25), zeros, 0.5, 0.5, 1, absent)


def _absences(workers: int) -> tuple[Absent, ...]:
    """With one worker both are the same."""
    return ("everywhere",) if workers == 1 else ("somewhere", "everywhere")


def _eighths(random: np.random.Generator, shape: tuple[int, ...], wild: float = 0.0) -> Array:
    values = np.asarray(random.integers(-3, 4, shape) / 8, np.float32)
    if wild:
        odd = random.choice(np.array([np.nan, np.inf, -np.inf, -0.0], np.float32), shape)
        values = np.where(random.random(shape) < wild, odd, values)
    return np.asarray(values, np.float32)
