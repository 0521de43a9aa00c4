"""What cannot vote among the replicas of one process is refused with a sentence."""

import re
from collections.abc import Callable
from typing import Any

import keras
import pytest
import tensorflow as tf

from signsgd_keras import Signum
from tests.clusters import Cluster
from tests.devices import mirrored

from .models import arrays, compiled, data, net, plain, same

IN_LOOP = (
    "TensorFlow's collectives fail within Keras' steps_per_execution > 1, whatever the optimizer, and where several "
    "optimizers are built in the first step: take compile(steps_per_execution=1), build them before, or on one machine "
    "take MirroredStrategy(cross_device_ops=MajorityVote())"
)
IN_XLA = "a vote among replicas cannot be compiled by XLA: take compile(jit_compile=False) or 'auto'"
OUTSIDE = "Signum votes among replicas: call apply() within strategy.run(), or take model.fit()"


def refused(sentence: str) -> Any:
    """The whole sentence, also where TensorFlow wraps it in its own story."""
    return pytest.raises((ValueError, tf.errors.OpError), match=re.escape(sentence))


def test_xla() -> None:
    with mirrored(2).scope():
        model = compiled(Signum(0.125), jit_compile=True)
    before = arrays(model.variables)
    with refused(IN_XLA):
        model.fit(*data(12), batch_size=6, verbose=0)
    assert same(arrays(model.variables), before)


def by_collectives(optimizer: Any) -> str:
    """Train with TensorFlow's own op and return the error."""
    with plain().scope():
        model = compiled(optimizer(0.125), steps_per_execution=2)
    try:
        model.fit(*data(12), batch_size=6, verbose=0)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        assert same(arrays(model.trainable_variables), arrays(net().trainable_variables))
        return str(error)
    return "no error"


def test_steps_per_execution_with_tensorflows_collectives(fresh_cluster: Callable[[int], Cluster]) -> None:
    """The day it works for SGD, the refusal may go. In a process of its own: a collective that failed stays so."""
    assert IN_LOOP in by_collectives(Signum)
    (message,) = fresh_cluster(1).run(by_collectives, keras.optimizers.SGD)
    assert "while/cond/Placeholder" in message


def test_an_optimizer_made_outside_the_scope() -> None:
    optimizer = Signum(0.125)
    with mirrored(2).scope():
        model = compiled(optimizer)
    with refused(
        "Signum was made under no strategy and is used under MirroredStrategy, where it would step without a vote: "
        "make model, optimizer and compile() within `with strategy.scope():`"
    ):
        model.fit(*data(12), batch_size=6, verbose=0)


def test_an_optimizer_of_another_strategy() -> None:
    with mirrored(3).scope():
        optimizer = Signum(0.125)
    model = net()
    with refused("Signum was made under MirroredStrategy and is used under no strategy, where it would step"):
        optimizer.build(model.trainable_variables)
    model.compile(optimizer=optimizer, loss="mse")
    with refused("Signum was made under MirroredStrategy and is used under no strategy"):
        model.fit(*data(12), batch_size=6, verbose=0)


def test_apply_outside_of_run() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model, optimizer = net(), Signum(0.125)
        optimizer.build(model.trainable_variables)
        with refused(OUTSIDE):
            optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables])


@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 2}, {"use_ema": True, "ema_overwrite_frequency": 2}]
)
def test_conditions_under_a_strategy_of_one_replica(settings: dict[str, Any]) -> None:
    """Of Keras' own step, which TensorFlow refuses there in words that name no remedy."""
    with mirrored(1).scope():
        model = compiled(Signum(0.125, **settings))
    before = arrays(model.variables)
    with refused(
        "gradient_accumulation_steps and ema_overwrite_frequency need several replicas under MirroredStrategy, and it "
        "has one: make model and optimizer without a strategy"
    ):
        model.fit(*data(12), batch_size=6, verbose=0)
    assert same(arrays(model.variables), before)


def test_replicas_with_gradients_for_different_variables() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model, optimizer = net(), Signum(0.125)
        optimizer.build(model.trainable_variables)
    before = arrays(model.variables)

    def step() -> None:
        replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        variables = model.trainable_variables[: 4 - replica]
        optimizer.apply([tf.ones(v.shape) for v in variables], variables)

    with refused(
        "the replicas have gradients for different variables, by their numbers [[0, 1, 2, 3], [0, 1, 2]]: a vote needs "
        "them for the same ones on all"
    ):
        strategy.run(step)
    assert same(arrays(model.variables), before)


def test_a_strategy_that_cannot_vote() -> None:
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model, optimizer = net(), Signum(0.125)
        with refused(
            "Signum cannot vote under CentralStorageStrategy: take tf.distribute.MirroredStrategy on one machine or "
            "signsgd_keras.MultiWorkerMajorityVoteStrategy on several"
        ):
            optimizer.build(model.trainable_variables)
