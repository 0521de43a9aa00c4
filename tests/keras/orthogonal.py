"""Variables of which some are matrices, their gradients, and the judge: a reference of matrices and one of others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from signsgd_core import Reference

from .backends import Array, eighths

LR, RATIO = 2.0**-3, 0.5
SHAPES = ((4, 3), (3,), (16, 5), (), (2, 2, 4, 6), (1, 1, 1, 2, 2))
"""In Keras' layout, rows last. All matrices have 4 or 16 columns, so that step 8 scales by a half or a quarter."""

MATRICES = (0, 2, 4)
SETTINGS: dict[str, Any] = {
    "learning_rate": LR,
    "beta_1": 0.5,
    "beta_2": 0.75,
    "verdict_momentum": 0.5,
    "orthogonalize": True,
    "other_learning_rate": RATIO * LR,
}


def parameters() -> list[Array]:
    return [eighths(*shape) for shape in SHAPES]


def gradients(steps: int = 5, workers: int = 1) -> list[list[list[Array]]]:
    """[step][worker][variable]; one is zeros, some entries are not finite."""
    found = [
        [[eighths(*shape, seed=1 + t + 100 * i) for shape in SHAPES] for i in range(workers)] for t in range(steps)
    ]
    found[1][0][0] = np.zeros_like(found[1][0][0])
    found[2][0][2][0, :3] = [np.nan, np.inf, -np.inf]
    return found


class Judge:
    """What the specification makes of the steps.

    Args:
        workers: how many.
        columns_first: those matrices whose first dimension has the columns, as a projection to several heads.
        settings: of `Reference`, but for the learning rate.
    """

    def __init__(
        self,
        workers: int = 1,
        betas: tuple[float, float] = (0.5, 0.75),
        verdict_momentum: float = 0.5,
        start: Sequence[Array] | None = None,
        matrices: Sequence[int] = MATRICES,
        columns_first: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        start = parameters() if start is None else start
        self.ratio = RATIO
        self.columns_first, self.shapes = set(columns_first), [x.shape for x in start]
        self.numbers = {True: list(matrices), False: [k for k in range(len(start)) if k not in matrices]}
        xs = [self._rows_first(k, start[k]) for k in matrices]
        polar: dict[str, Any] = {"orthogonalize": dict.fromkeys(range(len(xs)), 1), "tolerance": 1e-3}
        others = [start[k] for k in self.numbers[False]]
        settings |= {"betas": betas, "verdict_momentum": verdict_momentum}
        self.references = {
            True: Reference(xs, workers, LR, **settings, **polar),
            False: Reference(others, workers, LR * RATIO, **settings),
        }

    def step(self, given: Sequence[Sequence[Array]], lr: float = LR) -> list[Array]:
        """Take a step and return the parameters."""
        for kind, reference in self.references.items():
            reference.lr = lr if kind else lr * self.ratio
            reference.step([[self._rows_first(k, worker[k], kind) for k in self.numbers[kind]] for worker in given])
        return self._all("parameters")

    def momenta(self, worker: int) -> list[Array]:
        """Return a worker's momenta, in Keras' layout."""
        return self._by_number({kind: reference.momenta[worker] for kind, reference in self.references.items()})

    def check(self, found: Sequence[Array], inexact: Sequence[int] = ()) -> None:
        """Demand the same bits wherever rounding within polar factors did not decide, but of `inexact` a few digits."""
        undecided = self._all("undecided")
        for k, (x, expected) in enumerate(zip(found, self._all("parameters"), strict=True)):
            where = ~undecided[k]
            assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
            if k in inexact:
                np.testing.assert_allclose(x[where], expected[where], rtol=1e-6, err_msg=f"variable {k}")
            else:
                np.testing.assert_array_equal(x[where], expected[where], err_msg=f"variable {k}")
        share = np.mean(np.concatenate([undecided[k].ravel() for k in self.numbers[True]]))
        print(f"undecided: {share:.2%} of the matrices' entries")
        assert share < 0.2

    def _all(self, name: str) -> list[Array]:
        return self._by_number({kind: getattr(reference, name) for kind, reference in self.references.items()})

    def _by_number(self, arrays: Mapping[bool, Sequence[Array]]) -> list[Array]:
        found = {
            k: self._rows_last(k, x, kind)
            for kind, of_kind in arrays.items()
            for k, x in zip(self.numbers[kind], of_kind, strict=True)
        }
        return [found[k].copy() for k in sorted(found)]

    def _rows_first(self, k: int, x: Array, kind: bool = True) -> Array:
        if not kind:
            return x
        return x.reshape(len(x), -1).T if k in self.columns_first else np.moveaxis(x, -1, 0)

    def _rows_last(self, k: int, x: Array, kind: bool) -> Array:
        if not kind:
            return x
        return x.T.reshape(self.shapes[k]) if k in self.columns_first else np.moveaxis(x, 0, -1)
