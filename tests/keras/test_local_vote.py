"""Workers that take steps of their own and vote on where they went: `LocalReference`'s rounds, in real processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from signsgd_core.adversaries import invert, silent
from tests.clusters import Cluster

from .local_steps import Case, Run, demand, fit_all, given, judge


def sgd() -> Any:
    import keras

    return keras.optimizers.SGD(0.25, momentum=0.5)


def adam() -> Any:
    import keras

    return keras.optimizers.Adam(0.01)


def lion_accumulated() -> Any:
    import keras

    return keras.optimizers.Lion(0.01, gradient_accumulation_steps=2)


def linear() -> Any:
    import keras

    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="two")], name="linear")


def product(y: Any, prediction: Any) -> Any:
    """A loss whose gradient does not depend on the weights."""
    import keras

    return keras.ops.mean(y * prediction)


GRAPH = {"run_eagerly": False, "jit_compile": False}

CASES = {
    "sgd": Case(sgd, 3, (7, 7), linear, product, vote={"outer_lr": 0.5}),
    "momentum": Case(adam, 2, (5, 5, 5), vote={"outer_lr": 0.75, "outer_momentum": 0.5}, compile=GRAPH),
    "uneven": Case(adam, 2, (3, 9, 4), epochs=(2, 1, 4)),
    "accumulated": Case(lion_accumulated, 4, (9, 9), vote={"sync_every": 2}, epochs=(1, 1)),
    "liar": Case(adam, 2, (4, 4, 4), vote={"adversaries": {1: invert}}),
    "silent": Case(adam, 2, (4, 4), vote={"adversaries": {0: silent}}),
    "all silent": Case(adam, 2, (3, 3), vote={"adversaries": {0: silent, 1: silent}}),
}
"""Those of three batch numbers also run with three workers."""


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly)])
def table(request: pytest.FixtureRequest, cluster: Callable[[int], Cluster]) -> dict[str, list[Run]]:
    """What all workers saw of each case, run by one cluster."""
    cases = {name: case for name, case in CASES.items() if request.param <= len(case.batches)}
    found = cluster(request.param).run(fit_all, cases)
    return {name: [of_worker[name] for of_worker in found] for name in cases}


def test_rounds_are_the_reference(table: dict[str, list[Run]]) -> None:
    for name, runs in table.items():
        reference, every = judge(CASES[name], runs), CASES[name].every
        stayed = all((x == start).all() for x, start in zip(reference.parameters, runs[0].start, strict=True))
        assert stayed == (name == "all silent")
        ends = zip(runs[0].ends[0][every - 1], runs[1].ends[0][every - 1], strict=True)
        assert any((a != b).any() for a, b in ends), "workers that do the same have nothing to vote on"


def test_the_inner_momentum_goes_on(table: dict[str, list[Run]]) -> None:
    """Through rounds and epochs: each worker's steps are those of SGD, from wherever a round left it."""
    case = CASES["sgd"]
    for worker, run in enumerate(table.get("sgd", [])):
        at, velocity = run.start, [np.zeros((4, 1), np.float32), np.zeros(1, np.float32)]
        for epoch, ends in enumerate(run.ends):
            for t, (x, y) in enumerate(given(case, worker).as_numpy_iterator()):
                gradients = [np.mean(x * y, axis=0)[:, None], np.mean(y, axis=0)]
                velocity = [v / 2 - g / 4 for v, g in zip(velocity, gradients, strict=True)]
                demand([a + v for a, v in zip(at, velocity, strict=True)], ends[t])
                at = run.after[epoch][t]
            at = dict(run.measured())[epoch]


def test_figures(table: dict[str, list[Run]]) -> None:
    """All workers log the same, and the bytes are two bits a coordinate and a row of numbers."""
    for runs in table.values():
        logs = [[{k: v for k, v in epoch.items() if k.startswith("vote/")} for epoch in run.logs] for run in runs]
        assert len(logs[0][0]) == len(runs) + 5
        shortest = min(map(len, logs))
        np.testing.assert_equal([of[:shortest] for of in logs], [logs[0][:shortest]] * len(runs))
    if "sgd" not in table:
        return
    runs = table["sgd"]
    workers, rounds, exchanges = len(runs), 3, 4
    row = 4 * (9 * 2 + 2 + 2)  # counts, the stage, a magnitude of each of two variables
    ballots = workers * 8 * 2 / workers  # two bytes of ballots come to one word for each worker, up and down
    sent = (workers - 1) * (exchanges * row + rounds * ballots) / rounds
    assert runs[0].logs[1]["vote/bytes_per_step"] == sent


def test_one_worker_alone(backend: Callable[[str], Cluster]) -> None:
    """Without ``TF_CONFIG`` it needs no other; zeros abstain."""
    cases = {name: CASES[name] for name in ("sgd", "momentum")}
    (found,) = backend("tensorflow").run(fit_all, cases)
    for name, case in cases.items():
        judge(case, [found[name]])
