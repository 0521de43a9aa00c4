"""Workers that lie vote as `Reference` has it; their strategy knows who they are."""

from collections.abc import Callable
from typing import Any

from signsgd_core import Zeros
from tests.clusters import Cluster
from tests.keras.models import Array, same

from .conftest import Fault
from .lies import CASES, adversaries, given, reference, train

WORKERS = 3
RUNS: list[tuple[dict[int, str], Zeros]] = [*((names, "alternate") for names in CASES), ({1: "silent"}, "abstain")]


def _strategy(names: dict[int, str]) -> Any:
    from signsgd_keras import MultiWorkerMajorityVoteStrategy

    return MultiWorkerMajorityVoteStrategy(adversaries=adversaries(names))


def _train() -> list[list[Array]]:
    """All runs, under one strategy, since a process gets one."""
    strategy, ends = _strategy(RUNS[0][0]), []
    for k, (names, zeros) in enumerate(RUNS):
        if k:
            strategy.adversaries = adversaries(names)
        ends.append(train(strategy, given(WORKERS), zeros))
    return ends


def test_they_vote_as_the_reference_has_it(fresh_cluster: Callable[[int], Cluster], fault: Fault) -> None:
    gradients = given(WORKERS)
    expected = [reference(gradients, adversaries(names), zeros) for names, zeros in RUNS]
    with fault("Keras workers that lie: they cost their votes and nothing else", sum(len(names) for names, _ in RUNS)):
        for ends in fresh_cluster(WORKERS).run(_train):
            for found, (names, zeros), end in zip(ends, RUNS, expected, strict=True):
                assert same(found, end), (names, zeros)


def _refused(number: int) -> str:
    try:
        _strategy({number: "invert"})
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_others_are_refused(fresh_cluster: Callable[[int], Cluster]) -> None:
    assert fresh_cluster(2).run(_refused, 2) == ["adversaries must be replicas 0 to 1, got [2]"] * 2
