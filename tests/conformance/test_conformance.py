"""Every front end on every case, compared with `==` step by step."""

from functools import cache

import numpy as np
import pytest

from tests.workers import Workers

from .cases import Case, cases
from .front_ends import FRONT_ENDS, Trajectory

PAIRS = [(name, case) for name, (_, workers) in FRONT_ENDS.items() for case in cases() if case.workers in workers]


@pytest.fixture(scope="module")
def trajectories(workers: Workers):  # type: ignore[no-untyped-def]
    @cache
    def of(name: str, size: int) -> dict[Case, Trajectory]:
        table = [case for case in cases() if case.workers == size]
        return dict(zip(table, FRONT_ENDS[name][0](table, workers), strict=True))

    return of


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_case_is_exact(case: Case) -> None:
    """In double precision the specification takes the same steps, so `==` between front ends is a fair demand."""
    for step, exact in zip(case.reference(), case.reference(np.float64), strict=True):
        for x, y in zip(step, exact, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=str)
def test_trajectory(name: str, case: Case, trajectories) -> None:  # type: ignore[no-untyped-def]
    for t, (step, expected) in enumerate(zip(trajectories(name, case.workers)[case], case.reference(), strict=True)):
        for k, (x, y) in enumerate(zip(step, expected, strict=True)):
            np.testing.assert_array_equal(x, y, err_msg=f"tensor {k} after step {t}", strict=True)
