"""Workers that lie vote as `Reference` has it; their strategy knows who they are."""

from collections.abc import Callable
from typing import Any

import pytest

from signsgd_core import Zeros
from tests.clusters import Cluster
from tests.keras.models import Array, same

from .conftest import Fault
from .lies import CASES, adversaries, given, reference, train

WORKERS = 3
Runs = list[tuple[dict[int, str], Zeros]]
FEW: Runs = [({0: "random", 2: "constant"}, "alternate"), ({1: "nan"}, "alternate"), ({1: "silent"}, "abstain")]
OTHERS: Runs = [(names, "alternate") for names in CASES if (names, "alternate") not in FEW]
"""Replicas lie in all these ways, too."""


def _strategy(names: dict[int, str]) -> Any:
    from signsgd_keras import MultiWorkerMajorityVoteStrategy

    return MultiWorkerMajorityVoteStrategy(adversaries=adversaries(names))


def _train(runs: Runs) -> list[list[Array]]:
    """All runs, under one strategy, since a process gets one."""
    strategy, ends = _strategy(runs[0][0]), []
    for k, (names, zeros) in enumerate(runs):
        if k:
            strategy.adversaries = adversaries(names)
        ends.append(train(strategy, given(WORKERS), zeros))
    return ends


@pytest.mark.parametrize("runs", [FEW, pytest.param(OTHERS, marks=pytest.mark.nightly)], ids=["few", "others"])
def test_they_vote_as_the_reference_has_it(runs: Runs, fresh_cluster: Callable[[int], Cluster], fault: Fault) -> None:
    gradients = given(WORKERS)
    expected = [reference(gradients, adversaries(names), zeros) for names, zeros in runs]
    with fault("Keras workers that lie: they cost their votes and nothing else", sum(len(names) for names, _ in runs)):
        for ends in fresh_cluster(WORKERS).run(_train, runs):
            for found, (names, zeros), end in zip(ends, runs, expected, strict=True):
                assert same(found, end), (names, zeros)


def _refused(number: int) -> str:
    try:
        _strategy({number: "invert"})
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_others_are_refused(fresh_cluster: Callable[[int], Cluster]) -> None:
    assert fresh_cluster(2).run(_refused, 2) == ["adversaries must be replicas 0 to 1, got [2]"] * 2
