"""The one case table: what every front end must reproduce with `==`.

All numbers are dyadic (gradients in eighths, betas in halves and quarters, lr a power of two), so that every step is
exact in float32 and no order of operations can be told from another.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from signsgd_core import Reference, Zeros

Array = npt.NDArray[np.float32]
Gradients = list[list[list[Array | None]]]  # [step][worker][tensor]

SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (), (0,), (701,), (2, 3, 4))
STEPS = 5
LR = 0.25


@dataclass(frozen=True)
class Case:
    """One setting of the algorithm on M workers, with its own gradients."""

    workers: int
    betas: tuple[float, float] = (0.5, 0.5)
    zeros: Zeros = "alternate"
    verdict_momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_steps: int = 0
    absent: bool = False

    def __str__(self) -> str:
        words = [f"M{self.workers}", f"betas{self.betas[0]}-{self.betas[1]}", self.zeros]
        words += [f"gamma{self.verdict_momentum}"] * bool(self.verdict_momentum)
        words += [f"decay{self.weight_decay}"] * bool(self.weight_decay)
        words += [f"warmup{self.warmup_steps}"] * bool(self.warmup_steps) + ["absent"] * self.absent
        return "-".join(words)

    def parameters(self) -> list[Array]:
        random = np.random.default_rng(0)
        return [_eighths(random, shape) for shape in SHAPES]

    def gradients(self) -> Gradients:
        """Zeros, ties, NaN and ±Inf are common in them; with `absent` some workers lack some tensors."""
        random = np.random.default_rng(self.workers)
        steps = [
            [[_eighths(random, shape, wild=0.05) for shape in SHAPES] for _ in range(self.workers)]
            for _ in range(STEPS)
        ]
        gradients: Gradients = [[list(worker) for worker in step] for step in steps]
        if self.absent:
            for t, i, k in product(range(STEPS), range(self.workers), range(len(SHAPES))):
                if (t + i + k) % 3 == 0 or (t, k) == (2, 3):  # tensor 3 is absent everywhere at step 2
                    gradients[t][i][k] = None
        return gradients

    def reference(self, dtype: npt.DTypeLike = np.float32) -> list[list[Array]]:
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
    """Every case, in a fixed order."""
    rules: tuple[Zeros, ...] = ("alternate", "abstain", "positive")
    table = [
        Case(workers, betas, zeros, gamma)
        for workers, betas, zeros, gamma in product(
            (1, 2, 3, 4), ((0.0, 0.0), (0.5, 0.5), (0.75, 0.25), (0.0, 0.5)), rules, (0.0, 0.75)
        )
    ]
    for workers, zeros in product((1, 2, 3, 4), rules):
        table += [
            Case(workers, zeros=zeros, weight_decay=0.5),
            Case(workers, zeros=zeros, warmup_steps=2),
            Case(workers, zeros=zeros, absent=True),
            Case(workers, (0.5, 0.25), zeros, 0.5, 0.5, 1, absent=True),
        ]
    return table


def _eighths(random: np.random.Generator, shape: tuple[int, ...], wild: float = 0.0) -> Array:
    values = np.asarray(random.integers(-3, 4, shape) / 8, np.float32)
    if wild:
        odd = random.choice(np.array([np.nan, np.inf, -np.inf, -0.0], np.float32), shape)
        values = np.where(random.random(shape) < wild, odd, values)
    return np.asarray(values, np.float32)
