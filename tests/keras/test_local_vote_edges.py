"""Local steps where something is special: variables that are not trained, precision, refusals, restarts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.clusters import Cluster

from .local_steps import Case, Run, demand, fit_all, judge, rank
from .models import net
from .test_local_vote import adam


def layered() -> Any:
    """A model with a layer that is frozen, batch statistics, and a seed."""
    import keras

    model = net(
        keras.layers.Dense(64, name="frozen", trainable=False),
        keras.layers.BatchNormalization(momentum=0.5, name="norm"),
        keras.layers.Dropout(0.5, seed=rank(), name="dropout"),
    )
    model.get_layer("frozen").kernel.assign(np.full((3, 64), 1 + rank(), np.float32))
    return model


def scaled() -> Any:
    """Adam under a loss scale that overflows at first; on worker 1 more often."""
    import keras

    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=2.0 ** (17 + 3 * rank()))


def half() -> Any:
    import keras

    layers = [keras.layers.Dense(3, name="one", dtype="mixed_float16"), keras.layers.Dense(1, name="two")]
    return keras.Sequential([keras.Input((4,)), *layers], name="half")


def double() -> Any:
    import keras

    layers = [keras.layers.Dense(3, name="one", dtype="float64"), keras.layers.Dense(1, name="two", dtype="float64")]
    return keras.Sequential([keras.Input((4,)), *layers], name="double")


def tiny() -> Any:
    """Steps that only float64 sees."""
    import keras

    return keras.optimizers.SGD(1e-12)


def spoiled() -> Any:
    """A model that trains to NaN on worker 1."""
    import keras

    class Spoils(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any, training: bool = False) -> Any:
            return x * (np.nan if training and rank() == 1 else 1.0)

    return net(Spoils(name="spoils"))


SEVERAL = {"run_eagerly": False, "steps_per_execution": 2, "jit_compile": True}

CASES = {
    "layered": Case(adam, 2, (4, 5), layered, vote={"verify_every_n_rounds": 2}, validate=True),
    "half": Case(scaled, 4, (6, 6), half, validate=True),
    "double": Case(tiny, 2, (4, 4), double, validate=True),
    "nan": Case(adam, 2, (4, 4), spoiled, validate=True),
    "several": Case(adam, 1, (7, 7), vote={"sync_every": 2}, compile=SEVERAL, validate=True),  # one call of callbacks
}


@pytest.fixture(scope="module")
def table(cluster: Callable[[int], Cluster]) -> dict[str, list[Run]]:
    """What both workers saw of each case, run by one cluster."""
    found = cluster(2).run(fit_all, CASES)
    return {name: [of_worker[name] for of_worker in found] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_rounds_are_the_reference(name: str, table: dict[str, list[Run]]) -> None:
    judge(CASES[name], table[name])


@pytest.mark.parametrize("name", CASES)
def test_what_is_measured_and_saved_is_the_same_on_all(name: str, table: dict[str, list[Run]]) -> None:
    first, second = table[name]
    assert [told[0] for told in first.told] == ["test", "epoch"] * 2 + ["end"]
    for (_, ours, others), (_, theirs, their_others) in zip(first.told, second.told, strict=True):
        demand(ours, theirs)
        pairs = zip(others, their_others, strict=True)
        assert all((a == b).all() for a, b in pairs if a.dtype.kind == "f")
    assert [log["val_loss"] for log in first.logs] == [log["val_loss"] for log in second.logs]


def test_variables_that_are_not_trained(table: dict[str, list[Run]]) -> None:
    """Frozen ones are worker 0's, batch statistics move, seeds are each worker's own; only moved ones are sent."""
    first, second = ([told[2] for told in run.told] for run in table["layered"])
    kernel, _, mean, _, seed = range(5)
    assert {value.shape for value in (x[kernel] for x in (*first, *second))} == {(3, 64)}
    assert all((x[kernel] == 1).all() for x in (*first, *second))
    assert (first[0][mean] != first[2][mean]).all()
    assert (first[-1][seed] != second[-1][seed]).any()
    assert table["layered"][0].logs[0]["vote/bytes_per_step"] < 3000


def test_a_skipped_step_counts(table: dict[str, list[Run]]) -> None:
    """At the first batches worker 1 overflows, and at a round it is where the others are."""
    first, second = table["half"]
    assert any((a != b).any() for a, b in zip(first.start, first.ends[0][2], strict=True))
    demand(second.start, *second.ends[0][:3])
    demand(first.after[0][3], second.after[0][3])


def test_nan_on_one_worker(table: dict[str, list[Run]]) -> None:
    second = table["nan"][1]
    assert np.isnan(second.ends[0][0][0]).all()
    assert second.logs[-1]["vote/nonfinite"] == 2 * 2 * 19  # rounds of 19 parameters
    assert all(np.isfinite(x).all() for x in second.told[-1][1])
    assert second.logs[-1]["vote/agreement/rank0"] == 1
    assert np.isnan(second.logs[-1]["vote/agreement/rank1"])
