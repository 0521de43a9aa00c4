"""With several replicas each votes by the polar factor of its own momentum, and the vote is `Reference`'s."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_keras import LossScaleOptimizer, Signum, VerifyReplicas, VoteMonitor
from tests.clusters import Cluster

from .backends import Array, variables
from .cluster_strategy import strategy as cluster_strategy
from .models import arrays, compiled, components, data, net, same
from .orthogonal import LR, SETTINGS, Judge, gradients, parameters

pytestmark = pytest.mark.multiprocess


def run(strategy: Any, steps: Sequence[Sequence[Sequence[Array]]], graph: bool = True, **settings: Any) -> list[Any]:
    """Train with each replica's gradients; the parameters after each step, which all replicas share, and momenta."""
    import tensorflow as tf

    with strategy.scope():
        xs, optimizer = variables(parameters()), Signum(**{**SETTINGS, **settings})
        optimizer.build(xs)

    def replica(given: list[Any]) -> None:
        optimizer.apply([tf.identity(g) for g in given], xs)

    def step(given: list[Any]) -> None:
        strategy.run(replica, args=(given,))

    def split(rows: Sequence[Array]) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(rows[context.replica_id_in_sync_group])
        )

    step = tf.function(step, autograph=False) if graph else step
    trajectory = []
    for given in steps:
        step([split(rows) for rows in zip(*given, strict=True)])
        trajectory.append(arrays(xs))
    return [trajectory, components(optimizer._momentums or [])]


def judge(trajectory: list[list[Array]], steps: Sequence[Any], every: int = 1, **settings: Any) -> Judge:
    expected = Judge(len(steps[0]), **settings)
    for t, (found, given) in enumerate(zip(trajectory, steps, strict=True)):
        if every == 1:
            expected.step(given)
        elif t % every == every - 1:
            means = [
                [sum(parts) / every for parts in zip(*own, strict=True)]
                for own in zip(*steps[t + 1 - every : t + 1], strict=True)
            ]
            expected.step(means)
        expected.check(found)
    return expected


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize(
    ("replicas", "settings"),
    [
        (2, {}),
        (2, {"zeros": "abstain", "weight_decay": 0.5, "warmup_steps": 2}),
        (3, {"zeros": "positive"}),
    ],
    ids=str,
)
def test_mirrored(replicas: int, settings: dict[str, Any], graph: bool) -> None:
    from tests.devices import mirrored

    steps = gradients(workers=replicas)
    trajectory, momenta = run(mirrored(replicas), steps, graph, **settings)
    expected = judge(trajectory, steps, **settings)
    for replica, own in enumerate(zip(*momenta, strict=True)):  # each replica's own
        assert same(own, expected.momenta(replica))


def test_accumulation_votes_with_each_replicas_mean() -> None:
    from tests.devices import mirrored

    steps = gradients(6, workers=2)
    judge(run(mirrored(2), steps, gradient_accumulation_steps=2)[0], steps, every=2)


def _worker(settings: dict[str, Any]) -> list[Any]:
    return run(cluster_strategy(), gradients(workers=2), **settings)


def test_two_workers(cluster: Callable[[int], Cluster]) -> None:
    settings: dict[str, Any] = {"weight_decay": 0.25}
    runs, steps = cluster(2).run(_worker, settings), gradients(workers=2)
    expected = judge(runs[0][0], steps, **settings)
    for worker, (trajectory, momenta) in enumerate(runs):
        assert all(same(*both) for both in zip(trajectory, runs[0][0], strict=True))
        assert same([rows[0] for rows in momenta], expected.momenta(worker))


DIFFERENCES: dict[str, tuple[Any, Any, str]] = {
    "exclude_layers": (
        [],
        ["two"],
        "worker 0 has «net/two/kernel: shape (3, 1), orthogonalized with 1 rows and 3 columns» where worker 1 has "
        "«net/two/kernel: shape (3, 1)»",
    ),
    "ns_steps": (5, 3, "worker 0 has «ns_steps=5» where worker 1 has «ns_steps=3»"),
    "other_lr_ratio": (1.0, 0.5, "worker 0 has «other_lr_ratio=1.0» where worker 1 has «other_lr_ratio=0.5»"),
    "orthogonalize": (True, False, "worker 0 has «orthogonalize=True» where worker 1 has «orthogonalize=False»"),
}


def _differ() -> list[str]:
    found, second = [], cluster_strategy().cluster_resolver.task_id
    for name, values in DIFFERENCES.items():
        own: dict[str, Any] = {"beta_2": 0.5, "orthogonalize": True, name: values[second]}
        with cluster_strategy().scope():
            model = compiled(Signum(LR, **own))
        before = arrays(model.trainable_variables)
        try:
            model.fit(*data(12), batch_size=6, verbose=0)
        except ValueError as error:
            found.append(str(error))
        assert same(arrays(model.trainable_variables), before)
    with cluster_strategy().scope():
        model = compiled(Signum(LR, orthogonalize=True, exclude_layers=["o"]))
    try:
        model.fit(*data(12), batch_size=6, verbose=0)
    except ValueError as error:
        found.append(str(error))
    return found


def test_workers_that_differ(cluster: Callable[[int], Cluster]) -> None:
    """All of them say it; also that there is no matrix."""
    for found in cluster(2).run(_differ):
        for (_, _, sentence), message in zip(DIFFERENCES.values(), found[:-1], strict=True):
            assert f"the workers disagree and cannot vote: {sentence}" in message
        assert "orthogonalize=True found nothing to orthogonalize" in found[-1]


@pytest.mark.nightly
def test_fit_with_all_that_is_around_it() -> None:
    """Each replica's loss scale, monitors, clipping, and half precision; replicas stay the same bits."""
    from tests.devices import mirrored

    logs = []
    for precision in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(precision)
        try:
            with mirrored(2).scope():
                optimizer: Any = Signum(LR, orthogonalize=True, exclude_layers=["two"], clipnorm=1.0)
                optimizer = LossScaleOptimizer(optimizer, 8.0) if precision != "float32" else optimizer
                model = compiled(optimizer, net)
            x, y = data(24)
            if precision != "float32":
                x[8] = np.inf  # overflows on the second replica
            callbacks = [VoteMonitor(), VerifyReplicas(every_n_steps=1)]
            history = model.fit(x, y, batch_size=6, epochs=4, shuffle=False, verbose=0, callbacks=callbacks).history
        finally:
            keras.config.set_dtype_policy("float32")
        logs.append(history)
        assert all(np.isfinite(a).all() for a in arrays(model.trainable_variables))
    assert logs[0]["loss"][-1] < logs[0]["loss"][0]
    assert logs[0]["vote/nonfinite"][-1] == 0 < logs[1]["vote/nonfinite"][-1]
