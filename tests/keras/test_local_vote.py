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


CASES: dict[str, tuple[Case, int, dict[str, Any]]] = {
    # name: (case, batches of a round, settings of the reference)
    "sgd": (Case(sgd, (7, 7, 7), linear, product, vote={"sync_every": 3, "outer_lr": 0.5}), 3, {"outer_lr": 0.5}),
    "momentum": (
        Case(adam, (5, 5, 5), vote={"sync_every": 2, "outer_lr": 0.75, "outer_momentum": 0.5}),
        2,
        {"outer_lr": 0.75, "outer_momentum": 0.5},
    ),
    "uneven": (Case(adam, (3, 9, 4), epochs=(2, 1, 4), vote={"sync_every": 2}), 2, {}),
    "accumulated": (Case(lion_accumulated, (9, 9, 9), vote={"sync_every": 2}, epochs=(1, 1, 1)), 4, {}),
    "liar": (
        Case(adam, (4, 4, 4), vote={"sync_every": 2, "adversaries": {1: invert}}),
        2,
        {"adversaries": {1: invert}},
    ),
    "silent": (
        Case(adam, (4, 4, 4), vote={"sync_every": 2, "adversaries": {0: silent}}),
        2,
        {"adversaries": {0: silent}},
    ),
}


@pytest.fixture(scope="module", params=[2, 3])
def table(request: pytest.FixtureRequest, cluster: Callable[[int], Cluster]) -> dict[str, list[Run]]:
    """What all workers saw of each case, run by one cluster."""
    found = cluster(request.param).run(fit_all, {name: case for name, (case, _, _) in CASES.items()})
    return {name: [of_worker[name] for of_worker in found] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_rounds_are_the_reference(name: str, table: dict[str, list[Run]]) -> None:
    _, every, settings = CASES[name]
    first, second, *_ = table[name]
    reference = judge(table[name], every, **settings)
    assert any((x != start).any() for x, start in zip(reference.parameters, first.start, strict=True))
    assert any((a != b).any() for a, b in zip(first.ends[0][every - 1], second.ends[0][every - 1], strict=True))


def test_the_inner_momentum_goes_on(table: dict[str, list[Run]]) -> None:
    """Through rounds and epochs: each worker's steps are those of SGD, from wherever a round left it."""
    case = CASES["sgd"][0]
    for worker, run in enumerate(table["sgd"]):
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
    runs = table["sgd"]
    workers, rounds, exchanges = len(runs), 3, 4
    row = 4 * (9 * 2 + 2 + 2)  # counts, the stage, a magnitude of each of two variables
    ballots = workers * 8 * 2 / workers  # two bytes of ballots come to one word for each worker, up and down
    sent = (workers - 1) * (exchanges * row + rounds * ballots) / rounds
    assert runs[0].logs[1]["vote/bytes_per_step"] == sent


def test_one_worker_alone(backend: Callable[[str], Cluster]) -> None:
    """Without ``TF_CONFIG`` it needs no other; zeros abstain."""
    names = ("sgd", "momentum")
    (found,) = backend("tensorflow").run(fit_all, {name: CASES[name][0] for name in names})
    for name in names:
        judge([found[name]], CASES[name][1], **CASES[name][2])
