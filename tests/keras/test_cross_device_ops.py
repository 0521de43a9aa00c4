"""MajorityVote leaves every reduction to the op that it wraps, bit for bit."""

from collections.abc import Callable
from typing import Any

import keras
import pytest
import tensorflow as tf

from signsgd_keras import MajorityVote, Signum
from tests.devices import mirrored

from .models import compiled, components, data, net, plain, same

pytestmark = pytest.mark.multiprocess

DEVICES = ["CPU:0", "CPU:1", "CPU:2"]


def test_it_wraps_an_op_only() -> None:
    with pytest.raises(TypeError, match=r"MajorityVote wraps a tf\.distribute\.CrossDeviceOps, got 'nccl'"):
        MajorityVote("nccl")
    wrapped = tf.distribute.HierarchicalCopyAllReduce()
    assert MajorityVote(wrapped).wrapped is wrapped


def normalized() -> keras.Model:
    return net(keras.layers.BatchNormalization(name="norm"))


def train(strategy: tf.distribute.Strategy, optimizer: Callable[[], Any]) -> tuple[dict[str, Any], Any, Any]:
    """With batch statistics, a metric, validation data and a last smaller batch."""
    with strategy.scope():
        model = compiled(optimizer(), make=normalized, metrics=["mae"])
    history = model.fit(*data(29), batch_size=6, epochs=2, shuffle=False, verbose=0, validation_data=data(11, seed=1))
    scores = [
        model.evaluate(*data(17, seed=2), batch_size=6, verbose=0),
        model.predict(data(17)[0], verbose=0).tolist(),
    ]
    return {**history.history, "scores": scores}, components(model.variables), components(model.optimizer.variables)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize(
    ("name", "replicas", "wrapped"),
    [
        ("Adam", 2, None),
        pytest.param("SGD", 3, tf.distribute.ReductionToOneDevice, marks=pytest.mark.nightly),
        pytest.param("SGD", 3, tf.distribute.HierarchicalCopyAllReduce, marks=pytest.mark.nightly),
    ],
)
def test_other_optimizers_train_exactly_as_without_it(name: str, replicas: int, wrapped: Any) -> None:
    """Losses, metrics, batch statistics, weights and optimizer state.

    With two replicas beside TensorFlow's own default; with three beside the op that is wrapped, since the order of
    their sum is the op's.
    """
    without = tf.distribute.MirroredStrategy(DEVICES, cross_device_ops=wrapped()) if wrapped else plain()
    op = MajorityVote() if wrapped in (None, tf.distribute.ReductionToOneDevice) else MajorityVote(wrapped())
    voting = tf.distribute.MirroredStrategy(DEVICES[:replicas], cross_device_ops=op)
    ours, theirs = train(voting, OPTIMIZERS[name]), train(without, OPTIMIZERS[name])
    assert ours[0] == theirs[0]
    assert same(ours[1], theirs[1])
    assert same(ours[2], theirs[2])
    assert len(set(ours[0]["loss"])) == 2


@pytest.mark.nightly
def test_losses_metrics_and_batch_statistics_under_signum_are_those_of_an_optimizer_that_stands_still() -> None:
    """With a learning rate of 0 only the batch statistics move."""
    ours = train(mirrored(2), lambda: Signum(0.0))
    theirs = train(plain(), lambda: keras.optimizers.SGD(0.0))
    assert ours[0] == theirs[0]
    assert same(ours[1], theirs[1])
    start = normalized().variables
    moved = {v.name for v, a, b in zip(start, components(start), ours[1], strict=True) if not same(a, b[:1])}
    assert moved == {"moving_mean", "moving_variance"}


def test_reduce_and_gather_of_a_strategy_are_the_wrapped_ops() -> None:
    found = []
    without = tf.distribute.MirroredStrategy(DEVICES, cross_device_ops=tf.distribute.ReductionToOneDevice())
    for strategy in (mirrored(3), without):
        values = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant([1.1, 2.2]) * (context.replica_id_in_sync_group + 1)
        )
        bytes_ = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant([3, 4], tf.uint8) + context.replica_id_in_sync_group
        )

        def all_reduce(x: tf.Tensor) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_reduce("SUM", x)

        found.append(
            [
                strategy.reduce("SUM", values, axis=None).numpy().tolist(),
                strategy.reduce("MEAN", values, axis=0).numpy().tolist(),
                strategy.gather(values, axis=0).numpy().tolist(),
                strategy.reduce("SUM", bytes_, axis=None).numpy().tolist(),  # no ballot, though bytes
                [v.numpy().tolist() for v in strategy.experimental_local_results(strategy.run(all_reduce, (values,)))],
            ]
        )
    assert found[0] == found[1]
    assert found[0][3] == [12, 15]
