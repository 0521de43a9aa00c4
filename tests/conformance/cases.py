"""The one case table: what every front end must reproduce with `==`.

All numbers are dyadic (gradients in eighths, betas in halves and quarters, lr a power of two, √fan_in one too), so that
every step is exact in float32 and no order of operations can be told from another. A polar factor is not: where one is
so near 0 that rounding decides its sign, and the verdict with it, nothing is compared from then on.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product, starmap
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from signsgd_core import Reference, Zeros

Array = npt.NDArray[np.float32]
Gradients = list[list[list[Array | None]]]  # [step][worker][tensor]
Decided = npt.NDArray[np.bool_]
Trajectory = list[list[Array]]  # [step][tensor]
Absent = Literal["", "somewhere", "everywhere"]
Meeting = tuple[tuple[str, Any], ...]  # fields of a case, each a name and a value

SHAPES: tuple[tuple[int, ...], ...] = ((7, 4), (), (0,), (701,), (3, 2, 2, 4))
MATRICES = {k: 1 for k, shape in enumerate(SHAPES) if len(shape) > 1}
"""Which tensors are orthogonalized, rows first, and how many matrices each is."""

TOLERANCE, TOLERANCE_CUDA = 1e-3, 0.1
"""How near 0 a polar factor's entry is undecided, in the matrix's root mean squares; the second in bfloat16 on CUDA."""

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
    orthogonalize: bool = False

    def __str__(self) -> str:
        words = [f"M{self.workers}", f"betas{self.betas[0]}-{self.betas[1]}", self.zeros]
        words += [f"gamma{self.verdict_momentum}"] * bool(self.verdict_momentum)
        words += [f"decay{self.weight_decay}"] * bool(self.weight_decay)
        words += [f"warmup{self.warmup_steps}"] * bool(self.warmup_steps)
        words += [f"absent_{self.absent}"] * bool(self.absent)
        words += ["polar"] * self.orthogonalize
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

    def reference(
        self, dtype: npt.DTypeLike = np.float32, tolerance: float = TOLERANCE
    ) -> tuple[Trajectory, list[list[Decided]]]:
        """The parameters after each step by the specification, and where they are decided; [step][tensor]."""
        reference = Reference(
            [x.astype(dtype) for x in self.parameters()],
            self.workers,
            LR,
            self.betas,
            self.weight_decay,
            self.verdict_momentum,
            self.zeros,
            self.warmup_steps,
            orthogonalize=MATRICES if self.orthogonalize else {},
            tolerance=tolerance,
        )
        trajectory, decided = [], []
        for gradients in self.gradients():
            reference.step(gradients)
            trajectory.append([x.copy() for x in reference.parameters])
            decided.append([~undecided for undecided in reference.undecided])
        return trajectory, decided


OPTIONS = (
    tuple(range(1, 9)),  # workers
    ((0.0, 0.0), (0.5, 0.5), (0.75, 0.25), (0.0, 0.5)),  # betas
    ("alternate", "abstain", "positive"),  # zeros
    (0.0, 0.5),  # verdict momentum
    (0.0, 0.5),  # weight decay
    (0, 2),  # warmup steps
    ("", "somewhere", "everywhere"),  # absent; with one worker the last two are the same
    (False, True),  # orthogonalize
)
"""What a `Case` can be, field by field."""


@cache
def cases() -> tuple[Case, ...]:
    """Every case that could be run, in a fixed order."""
    return tuple(case for case in starmap(Case, product(*OPTIONS)) if (case.workers, case.absent) != (1, "somewhere"))


def assert_reference(
    case: Case, trajectory: Trajectory, without: Collection[int] = (), tolerance: float = TOLERANCE
) -> tuple[int, int]:
    """Demand `==` with the specification after each step, wherever it is decided.

    Args:
        case: that was run.
        trajectory: what came out, [step][tensor].
        without: numbers of the tensors that it lacks.
        tolerance: of the reference.

    Returns:
        How many entries of orthogonalized tensors were undecided, and how many there are, over all steps.
    """
    undecided = compared = 0
    for t, (step, *there) in enumerate(zip(trajectory, *case.reference(tolerance=tolerance), strict=True)):
        expected = [(k, x, decided) for k, (x, decided) in enumerate(zip(*there, strict=True)) if k not in without]
        for ours, (k, x, decided) in zip(step, expected, strict=True):
            assert (ours.shape, ours.dtype) == (x.shape, x.dtype)
            np.testing.assert_array_equal(ours[decided], x[decided], err_msg=f"tensor {k} after step {t}")
            if case.orthogonalize and k in MATRICES:
                undecided, compared = undecided + int((~decided).sum()), compared + decided.size
    return undecided, compared


def pairs(case: Case) -> set[Meeting]:
    """Return every two fields of a case with their values; and what a tally depends on, for two workers and three."""
    fields = [(name, getattr(case, name)) for name in case.__dataclass_fields__]
    found: set[Meeting] = set(combinations(fields, 2))
    if case.workers in (2, 3):
        found.add(tuple((name, value) for name, value in fields if name in ("workers", "zeros", "absent")))
    return found


@cache
def covering(table: tuple[Case, ...]) -> list[Case]:
    """Return few cases in which every pair of values is found that is found in a table; greedily, so always the same.

    Faults come of one option, or mostly of two that meet; all of `cases` are some fifty times as many.
    """
    bits = dict[Meeting, int]()
    sets = [sum(1 << bits.setdefault(pair, len(bits)) for pair in pairs(case)) for case in table]  # of pairs, as bits
    missing, chosen = (1 << len(bits)) - 1, list[Case]()
    while missing:
        shared = [(missing & has).bit_count() for has in sets]
        best = shared.index(max(shared))
        missing &= ~sets[best]
        chosen.append(table[best])
    return sorted(chosen, key=lambda case: case.workers)


def _eighths(random: np.random.Generator, shape: tuple[int, ...], wild: float = 0.0) -> Array:
    values = np.asarray(random.integers(-3, 4, shape) / 8, np.float32)
    if wild:
        odd = random.choice(np.array([np.nan, np.inf, -np.inf, -0.0], np.float32), shape)
        values = np.where(random.random(shape) < wild, odd, values)
    return np.asarray(values, np.float32)
