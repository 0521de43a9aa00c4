"""Documented uses in which every replica votes with its own gradient, as `Reference` has it."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_keras import Signum, VerifyReplicas, VoteMonitor
from tests.devices import mirrored

from .models import Array, arrays, compiled, data, dataset, net, replay, same, weights
from .test_uses import LR, Around, fit, signum, steps

pytestmark = pytest.mark.multiprocess


class Calling(Around):
    """As above, by the other's `apply`."""

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        self.build(list(trainable_variables))
        self.inner_optimizer.apply(grads, trainable_variables)


def test_an_optimizer_around_it_that_applies_is_seen_through() -> None:
    """By the callbacks, however many there are."""
    with mirrored(2).scope():
        model = compiled(Calling(Calling(signum())))
    log: list[dict[str, float]] = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: log.append(logs))
    fit(model, callbacks=[VoteMonitor(), VerifyReplicas(1), note])
    assert same(arrays(model.trainable_variables), replay(steps(), LR, betas=(0.5, 0.75)).parameters)
    assert 0 < log[0]["vote/agreement/rank0"] < 1


class Players(keras.Model):  # type: ignore[misc]
    """Two models with an optimizer each, as a GAN has them."""

    def compile(self, *optimizers: Signum) -> None:
        super().compile(loss="mse")
        self.players = [(net(), optimizer) for optimizer in optimizers]

    def call(self, x: Any) -> Any:
        return x

    def train_step(self, batch: Any) -> dict[str, Any]:
        for model, optimizer in self.players:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(batch[0], training=True) - batch[1])) / 2
            optimizer.apply_gradients(
                zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
            )
        return {"loss": loss}


def test_two_optimizers_in_one_step() -> None:
    with mirrored(2).scope():
        model = Players()
        model.compile(signum(), signum(beta_1=0.75, beta_2=0.5))
    fit(model)
    for (player, _), betas in zip(model.players, [(0.5, 0.75), (0.75, 0.5)], strict=True):
        assert same(arrays(player.trainable_variables), replay(steps(), LR, betas=betas).parameters)


def constrained() -> keras.Model:
    model = net()
    model.layers[0].kernel.constraint = keras.constraints.NonNeg()
    return model


@pytest.mark.parametrize("replicas", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_constraints(replicas: int) -> None:
    with mirrored(replicas).scope():
        model = compiled(signum(), constrained)
    fit(model)
    reference = None
    for step in steps(replicas):
        reference = replay([step], LR, after=reference, betas=(0.5, 0.75))
        reference.parameters[0] = np.maximum(reference.parameters[0], 0)
    assert reference is not None
    assert same(arrays(model.trainable_variables), reference.parameters)


def averaged() -> list[Array]:
    """The moving average of weight 0.5 over the parameters of each step."""
    reference, average = None, list[Array]()
    for step in steps():
        reference = replay([step], LR, after=reference, betas=(0.5, 0.75))
        new = [x.copy() for x in reference.parameters]
        average = [(a + x) / 2 for a, x in zip(average, new, strict=True)] if average else new
    return average


@pytest.mark.parametrize("callbacks", [[], [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]], ids=["", "swap"])
def test_moving_average_at_the_end_of_fit(callbacks: list[Any]) -> None:
    with mirrored(2).scope():
        model = compiled(signum(use_ema=True, ema_momentum=0.5))
    seen: list[list[Array]] = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(arrays(model.weights)))
    fit(model, callbacks=[*callbacks, note])
    assert same(arrays(model.trainable_variables), averaged())
    assert same(seen[0], averaged()) == bool(callbacks)


def copied(model: keras.Model) -> keras.Model:
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.compile_from_config(model.get_compile_config())
    return other


def shared() -> keras.Model:
    """A layer that is used twice, and a gradient of its own."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def doubled(x: Any) -> Any:
        return x, lambda upstream: 2 * upstream

    x, twice = keras.Input((4,)), keras.layers.Dense(4, name="twice")
    y = keras.layers.Lambda(doubled, name="doubled")(twice(keras.layers.ReLU()(twice(x))))
    model = keras.Model(x, keras.layers.Dense(1, name="out")(y), name="net")
    for k, variable in enumerate(model.trainable_variables):
        variable.assign(weights(variable.shape, seed=k))
    return model


RATE = tf.Variable(LR)

USES: dict[str, tuple[Callable[[], Any], Callable[[], keras.Model]]] = {
    "a copy of the model and its optimizer": (lambda: copied(compiled(signum())), net),
    "a shared layer and a custom gradient": (lambda: compiled(signum(), shared), shared),
    "a callable learning rate": (lambda: compiled(Signum(lambda: RATE, 0.5, 0.75)), net),
    "a learning rate that is assigned": (lambda: compiled(Assigned(signum())), net),
}


class Assigned(Calling):
    """Sets the learning rate in the step, on each replica."""

    def apply(self, grads: list[Any], trainable_variables: Any = None) -> None:
        self.inner_optimizer.learning_rate.assign(LR)
        super().apply(grads, trainable_variables)


@pytest.mark.parametrize("name", USES)
def test_every_replica_votes_with_its_own_gradient(name: str) -> None:
    make, plain = USES[name]
    with mirrored(2).scope():
        model = make()
    fit(model)
    assert same(arrays(model.trainable_variables), replay(steps(), LR, plain, betas=(0.5, 0.75)).parameters)


def test_a_loop_in_the_graph() -> None:
    """As TensorFlow's guide has it: several steps of an iterator in one function."""
    with mirrored(2).scope():
        model, optimizer = net(), signum()
        optimizer.build(model.trainable_variables)
    batches = iter(mirrored(2).experimental_distribute_dataset(dataset(*data(24), 6)))

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y)) / 2
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    @tf.function  # type: ignore[untyped-decorator]
    def epoch(batches: Any) -> None:
        for _ in tf.range(4):
            mirrored(2).run(step, args=next(batches))

    epoch(batches)
    assert same(arrays(model.trainable_variables), replay(steps(), LR, betas=(0.5, 0.75)).parameters)
