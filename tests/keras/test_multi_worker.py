"""The vote between real worker processes is `Reference`'s."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.clusters import Cluster

from .cluster_strategy import strategy
from .models import Array, Batch, arrays, compiled, data, dataset, net, replay, same, shares

LR = 2.0**-4

Run = tuple[list[list[Batch]], list[Array], list[Array], int]
"""A worker's shares of the batches, its parameters and momenta at the end, and its steps."""


def _outcome(model: Any, parts: list[list[Batch]]) -> Run:
    optimizer = model.optimizer
    momenta = [strategy().experimental_local_results(m.value)[0].numpy() for m in optimizer._momentums or []]
    return parts, arrays(model.trainable_variables), momenta, int(np.array(optimizer.iterations))


def _fit(rows: int, batch_size: int, settings: dict[str, Any]) -> Run:
    from signsgd_keras import Signum

    with strategy().scope():
        model = compiled(Signum(LR, **settings))
    model.fit(*data(rows), batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    return _outcome(model, shares(strategy(), dataset(*data(rows), batch_size)) * 2)


def judge(runs: list[Run], **settings: Any) -> None:
    """Demand of every worker the parameters and its own momenta as `Reference` has them."""
    steps = [[part for worker in step for part in worker] for step in zip(*(run[0] for run in runs), strict=True)]
    reference = replay(steps, LR, **settings)
    for worker, (_, parameters, momenta, t) in enumerate(runs):
        assert same(parameters, reference.parameters)
        assert t == reference.t > 0
        if momenta and "clip" not in settings:  # norms are no dyadic numbers
            assert same(momenta, reference.momenta[worker])
    assert not same(steps[0][0], steps[0][1])  # each has rows of its own


@pytest.mark.parametrize(
    ("workers", "rows", "batch_size", "betas", "settings"),
    [
        (2, 22, 8, (0.5, 0.75), {}),  # the last batch is smaller
        pytest.param(
            *(3, 24, 6, (0.0, 0.0), {"verdict_momentum": 0.5, "weight_decay": 0.25, "zeros": "abstain"}),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_fit_is_the_reference(
    workers: int,
    rows: int,
    batch_size: int,
    betas: tuple[float, float],
    settings: dict[str, Any],
    cluster: Callable[[int], Cluster],
) -> None:
    own = {"beta_1": betas[0], "beta_2": betas[1], **settings}
    judge(cluster(workers).run(_fit, rows, batch_size, own), betas=betas, **settings)


def _loop(clip: float) -> Run:
    """A custom loop in which each worker accumulates three of its own batches, then clips them."""
    import tensorflow as tf

    from signsgd_keras import Signum

    scope = strategy()
    index = scope.cluster_resolver.task_id
    with scope.scope():
        model, optimizer = net(), Signum(LR, 0.875, 0.875, global_clipnorm=clip, gradient_accumulation_steps=3)
        model.optimizer = optimizer

    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any, y: Any) -> None:
        def run() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x) - y)) / scope.num_replicas_in_sync
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        scope.run(run)

    parts = [data(4, seed=10 * t + index) for t in range(7)]
    for x, y in parts:
        step(tf.constant(x), tf.constant(y))
    return _outcome(model, [[part] for part in parts])


def test_custom_loop_that_accumulates_and_clips(cluster: Callable[[int], Cluster]) -> None:
    def clip(grads: list[Array]) -> list[Any]:
        import tensorflow as tf

        return list(tf.clip_by_global_norm(grads, 0.125)[0])

    judge(cluster(2).run(_loop, 0.125), betas=(0.875, 0.875), every=3, clip=clip)


def _reduced() -> list[Any]:
    """Reduce what a custom loop returns: a dict of losses."""
    import tensorflow as tf

    own = float(strategy().cluster_resolver.task_id + 1)
    losses = strategy().run(lambda: {"loss": tf.constant(own), "of each class": tf.constant([own, -own])})
    reduced = [strategy().reduce(op, losses, axis=None) for op in ("SUM", "MEAN")]
    return [{name: value.numpy().tolist() for name, value in one.items()} for one in reduced]


def test_a_structure_is_reduced_among_workers(cluster: Callable[[int], Cluster]) -> None:
    totals = [{"loss": 3.0, "of each class": [3.0, -3.0]}, {"loss": 1.5, "of each class": [1.5, -1.5]}]
    assert cluster(2).run(_reduced) == [totals] * 2


def _overflow() -> tuple[list[list[Array]], list[float], int]:
    """Three steps; at the second worker 1 alone overflows."""
    import keras
    import tensorflow as tf

    from signsgd_keras import Signum

    scope = strategy()
    with scope.scope():
        model = net()
        optimizer = keras.optimizers.LossScaleOptimizer(Signum(LR, 0.5, 0.5), initial_scale=8.0)
        optimizer.build(model.trainable_variables)

    @tf.function  # type: ignore[untyped-decorator]
    def step(factor: Any) -> None:
        scope.run(lambda: optimizer.apply([factor * tf.ones(v.shape) for v in model.trainable_variables]))

    after, scales = [], []
    for t in range(3):
        step(tf.constant(np.inf if t == 1 and scope.cluster_resolver.task_id == 1 else 8.0))
        after.append(arrays(model.trainable_variables))
        scales.append(float(optimizer.dynamic_scale.numpy()))
    return after, scales, int(optimizer.iterations.numpy())


def test_where_one_worker_overflows_all_skip_the_step(cluster: Callable[[int], Cluster]) -> None:
    for after, scales, steps in cluster(2).run(_overflow):
        assert scales == [8.0, 4.0, 4.0]
        assert steps == 2
        assert same(after[0], after[1])
        assert same([x - np.float32(LR) for x in after[1]], after[2])  # all gradients are positive
