"""`GeometryMonitor` on TensorFlow: each replica's own gradients, on one machine or several, and models of all kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_core.analysis.geometry import Moments, density, figures
from signsgd_keras import GeometryMonitor, LossScaleOptimizer, Signum, VoteMonitor
from tests.clusters import Cluster
from tests.devices import mirrored
from tests.tiers import nightly_where

from .models import Array, arrays, compiled, data, dataset, gradients, net, plain, same, shares

pytestmark = pytest.mark.multiprocess

STEPS, ROWS = 6, 4
"""Of an epoch; so many rows a batch, half of them each replica's."""


def expected(strategy: Any) -> Array:
    """Gradients of all replicas of this worker at every step, in one row each: ``[step, replica]``."""
    steps = shares(strategy, dataset(*data(STEPS * ROWS), ROWS))
    return np.array([[_row(share, strategy.num_replicas_in_sync) for share in step] for step in steps])


def _row(share: Any, replicas: int) -> Array:
    return np.concatenate([np.ravel(np.asarray(g)) for g in gradients(net(), share, replicas)])


def fit(model: Any, *callbacks: Any, epochs: int = 1) -> Any:
    return model.fit(
        dataset(*data(STEPS * ROWS), ROWS), epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks]
    )


def monitor(**settings: Any) -> GeometryMonitor:
    return GeometryMonitor(**{"every_n_steps": 3, "samples": 2, "directory": None, **settings})


def records(monitor: GeometryMonitor) -> list[dict[str, Any]]:
    assert monitor.report is not None
    return monitor.report.records


def assert_records(found: list[dict[str, Any]], rows: Array) -> None:
    """Those of the first 2 of each 3 steps."""
    assert len(found) == STEPS // 3
    for k, record in enumerate(found):
        taken = rows[3 * k : 3 * k + 2].reshape(-1, rows.shape[-1])
        assert record["samples"] == len(taken)
        for name, value in figures(Moments.of(taken)).items():
            want = None if np.isnan(value) else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert record[name] == want, name


OPTIMIZERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Signum": (lambda: mirrored(2), lambda: Signum(0.0)),
    "its own loss scale": (lambda: mirrored(2), lambda: LossScaleOptimizer(Signum(0.0), 8.0)),
    "Adam": (plain, lambda: keras.optimizers.Adam(0.0)),
    "Keras' loss scale": (plain, lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), 8.0)),
}


@pytest.mark.parametrize("name", nightly_where(lambda name: name in ("Adam", "Keras' loss scale"), OPTIMIZERS))
def test_each_replica_has_its_own_gradients(name: str) -> None:
    scope, optimizer = OPTIMIZERS[name]
    strategy, watching = scope(), monitor()
    with strategy.scope():
        model = compiled(optimizer())
    fit(model, watching)
    rows = expected(strategy)
    assert rows.shape == (STEPS, 2, 19)
    assert not np.array_equal(rows[:, 0], rows[:, 1])
    assert_records(records(watching), rows)
    assert watching.report is not None
    assert watching.report.workers == 2


def _squares(model: Any) -> Any:
    """Has the Hessian 2 on the diagonal of a bias of 3, and nothing else."""
    return keras.ops.sum(keras.ops.square(model.trainable_variables[1]))


@pytest.mark.nightly
def test_votes_are_the_same_and_other_monitors_see_them() -> None:
    ends = []
    for watching in (None, monitor(curvature_loss=_squares)):
        with mirrored(2).scope():
            model = compiled(Signum(2.0**-4, 0.5, 0.75))
        history = fit(model, *([watching] if watching else []), VoteMonitor(), epochs=3).history
        ends.append((arrays(model.trainable_variables), history["vote/ties"], history["vote/flips"][1:]))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert watching is not None
    curvature = [record["geometry/curvature_density"] for record in records(watching)]
    assert curvature == [pytest.approx(density([1.0] * 3 + [0.0] * 16))] * 6


def _work(folder: Path) -> tuple[list[dict[str, Any]], Array, list[float]]:
    from .cluster_strategy import strategy

    scope = strategy()
    own = folder / str(scope.cluster_resolver.task_id)
    with scope.scope():
        model = compiled(Signum(0.0))
    watching = monitor(directory=own)
    history = fit(model, watching).history
    return records(watching), expected(scope), history["geometry/signal"]


def test_workers_are_taken_together(tmp_path: Path, cluster: Callable[[int], Cluster]) -> None:
    """And only the first of them writes."""
    first, second = cluster(2).run(_work, tmp_path)
    assert first[0] == second[0]
    assert first[2] == second[2] == [first[0][-1]["geometry/signal"]]
    assert_records(first[0], np.concatenate([first[1], second[1]], axis=1))
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["geometry.json", "geometry.png"]
    assert not (tmp_path / "1").exists()


def test_a_model_that_is_built_by_its_first_step() -> None:
    """That step is not seen."""

    def late() -> Any:
        return keras.Sequential([keras.layers.Dense(3, kernel_initializer="ones"), keras.layers.Dense(1)])

    watching = monitor(every_n_steps=STEPS, samples=STEPS)
    model = compiled(keras.optimizers.SGD(0.0), late)
    fit(model, watching, epochs=2)
    assert [record["samples"] for record in records(watching)] == [STEPS - 1, STEPS]
    assert "apply" not in vars(model.optimizer)


def test_an_embedding_is_as_the_product_that_it_stands_for() -> None:
    """TensorFlow's gradient of it has the rows that were looked up only."""
    ids, y = np.random.default_rng(0).integers(0, 9, (STEPS * ROWS, 2)), data(STEPS * ROWS)[1]
    found = []
    for embed in (True, False):
        layer = keras.layers.Embedding(9, 5, embeddings_initializer="ones")
        dense = keras.layers.Dense(5, use_bias=False, kernel_initializer="ones")
        inputs = keras.Input((2,), dtype="int32")
        hidden = layer(inputs) if embed else dense(keras.ops.one_hot(inputs, 9))
        last = keras.layers.Dense(1, kernel_initializer=keras.initializers.RandomUniform(seed=1))
        model = keras.Model(inputs, last(keras.layers.Flatten()(hidden)))
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
        watching = monitor(curvature_loss=lambda model: keras.ops.mean(model(ids[:8]) ** 2))
        model.fit(ids, y, batch_size=ROWS, shuffle=False, verbose=0, callbacks=[watching])
        found.append(records(watching))
    for one, other in zip(*found, strict=True):
        assert one["geometry/curvature_density"] > 0
        assert one == pytest.approx(other, rel=1e-4)


class _Mistake(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        raise ValueError("a mistake of the user's")


def test_it_starts_afresh_after_an_error() -> None:
    model, watching = compiled(Signum(0.0)), monitor()
    with pytest.raises(ValueError, match="a mistake"):
        fit(model, monitor(), _Mistake())
    fit(model, watching)
    assert len(records(watching)) == STEPS // 3
    assert "apply" not in vars(model.optimizer)


def test_what_the_user_put_around_the_optimizer_stays() -> None:
    model, calls = compiled(Signum(0.0), run_eagerly=True), []
    apply = model.optimizer.apply

    def own(*args: Any) -> None:
        calls.append(1)
        apply(*args)

    model.optimizer.apply = own
    fit(model, monitor())
    assert model.optimizer.apply is own
    assert len(calls) == STEPS
