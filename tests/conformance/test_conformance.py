"""Every front end on cases in which every pair of options meets, compared with `==` step by step."""

from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from tests.clusters import Cluster
from tests.workers import Workers

from .cases import Case, Trajectory, assert_reference
from .front_ends import FRONT_ENDS, FrontEnd, Processes
from .summary import PROPERTY, UNDECIDED

BATCH = 12
"""How many cases a front end is asked for at a time."""

Batch = tuple[Case, ...]
PAIRS: list[tuple[FrontEnd, Case, Batch]] = []
"""Every front end, every case that it runs, and the cases that run with it."""

for end in FRONT_ENDS:
    for _, group in groupby(end.cases, key=lambda case: case.workers):
        same = tuple(group)
        for first in range(0, len(same), BATCH):
            PAIRS += [(end, case, same[first : first + BATCH]) for case in same[first : first + BATCH]]


@pytest.fixture(scope="module")
def trajectories(
    workers: Workers, backend: Callable[[str], Cluster], cluster: Callable[[int], Cluster]
) -> Callable[[FrontEnd, Batch], dict[Case, list[Trajectory]]]:
    """Front end and cases -> what each worker had after each step, by case."""
    processes = Processes(workers, backend, cluster)

    @cache
    def of(end: FrontEnd, batch: Batch) -> dict[Case, list[Trajectory]]:
        by_worker = end.run(batch, processes)
        return {case: [worker[k] for worker in by_worker] for k, case in enumerate(batch)}

    return of


@pytest.mark.parametrize("case", sorted({case for end in FRONT_ENDS for case in end.cases}, key=str), ids=str)
def test_every_case_is_exact(case: Case) -> None:
    """In double precision the specification takes the same steps, so `==` between front ends is a fair demand."""
    for step, exact in zip(case.reference()[0], case.reference(np.float64)[0], strict=True):
        for x, y in zip(step, exact, strict=True):
            np.testing.assert_array_equal(x, y)


def long(end: FrontEnd, case: Case) -> bool:
    """Whether a front end takes seconds for so many workers, where its cases of fewer guard the same code."""
    slow = {"keras-multi-worker": range(3, 9), "keras-mirrored": range(4, 9), "keras-mirrored-eager": range(3, 9)}
    return case.workers in slow.get(end.name, ())


@pytest.mark.parametrize(
    ("end", "case", "batch"),
    [
        pytest.param(*pair, marks=[pytest.mark.nightly] if long(*pair[:2]) else [], id=f"{pair[0].name}-{pair[1]}")
        for pair in PAIRS
    ],
)
def test_trajectory(end: FrontEnd, case: Case, batch: Batch, trajectories: Any, record_property: Any) -> None:
    record_property(PROPERTY, end.name)
    ours = trajectories(end, batch)[case]
    record_property(UNDECIDED, assert_reference(case, ours[0], end.without))
    for worker, theirs in enumerate(ours):
        for t, (step, others) in enumerate(zip(ours[0], theirs, strict=True)):
            for n, (x, other) in enumerate(zip(step, others, strict=True)):
                assert other.tobytes() == x.tobytes(), f"worker {worker} differs in its tensor {n} after step {t}"
