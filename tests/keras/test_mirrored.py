"""The vote between the replicas of a MirroredStrategy is `Reference`'s, whatever a user does around a step."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_keras import Signum
from tests.devices import mirrored
from tests.tiers import nightly_where

from .models import Array, arrays, compiled, data, dataset, net, plain, replay, same, shares

pytestmark = pytest.mark.multiprocess

LR = 2.0**-4
BETAS: dict[str, Any] = {"beta_1": 0.5, "beta_2": 0.75}


def fit(model: keras.Model, epochs: int = 1, rows: int = 24, batch_size: int = 6) -> None:
    model.fit(*data(rows), batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)


def momenta(optimizer: Signum, strategy: tf.distribute.Strategy) -> list[list[Array]]:
    """Of every replica."""
    rows = [strategy.experimental_local_results(m.value) for m in optimizer._momentums or ()]
    return [[m.numpy() for m in replica] for replica in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("replicas", "rows", "batch_size", "betas", "settings"),
    [
        (3, 22, 6, (0.5, 0.75), {}),  # the last batch leaves nothing to the third replica
        (2, 24, 6, (0.0, 0.0), {"verdict_momentum": 0.5, "weight_decay": 0.25, "zeros": "abstain"}),
        pytest.param(4, 30, 8, (0.75, 0.5), {"zeros": "positive", "warmup_steps": 3}, marks=pytest.mark.nightly),
    ],
)
def test_fit_is_the_reference(
    replicas: int, rows: int, batch_size: int, betas: tuple[float, float], settings: dict[str, Any]
) -> None:
    strategy = mirrored(replicas)
    with strategy.scope():
        model = compiled(Signum(LR, *betas, **settings))
    fit(model, epochs=2, rows=rows, batch_size=batch_size)
    reference = replay(shares(strategy, dataset(*data(rows), batch_size)) * 2, LR, betas=betas, **settings)
    assert same(arrays(model.trainable_variables), reference.parameters)
    if betas[0]:
        own = momenta(model.optimizer, strategy)
        assert all(same(row, expected) for row, expected in zip(own, reference.momenta, strict=True))
        assert not same(own[0], own[1])
    assert model.optimizer.iterations.numpy() == reference.t == 8


def test_without_the_op_it_votes_all_the_same() -> None:
    models = []
    for strategy in (mirrored(2), plain()):
        with strategy.scope():
            models.append(compiled(Signum(LR, **BETAS)))
        fit(models[-1])
    assert same(arrays(models[0].variables), arrays(models[1].variables))
    steps = shares(mirrored(2), dataset(*data(24), 6))
    voted = replay(steps, LR, betas=(0.5, 0.75))
    assert same(arrays(models[1].trainable_variables), voted.parameters)
    whole = [[(x, y)] for x, y in dataset(*data(24), 6).as_numpy_iterator()]
    assert not same(voted.parameters, replay(whole, LR, betas=(0.5, 0.75)).parameters)  # the sign of the mean


def test_eager_steps_by_tensorflows_collectives() -> None:
    """Launched on one device after the other they would wait for ever."""
    with plain().scope():
        model = compiled(Signum(LR, **BETAS), run_eagerly=True)
    fit(model)
    voted = replay(shares(mirrored(2), dataset(*data(24), 6)), LR, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), voted.parameters)


def test_one_device_is_one_replica() -> None:
    strategy = tf.distribute.OneDeviceStrategy("CPU:1")
    with strategy.scope():
        model = compiled(Signum(LR, **BETAS))
    fit(model)
    reference = replay(shares(strategy, dataset(*data(24), 6)), LR, betas=(0.5, 0.75))
    assert reference.workers == 1
    assert same(arrays(model.trainable_variables), reference.parameters)


@pytest.mark.nightly
def test_several_fits_go_on_where_the_last_one_ended() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(Signum(LR, **BETAS))
    for rows in (24, 10):
        fit(model, rows=rows)
    steps = [step for rows in (24, 10) for step in shares(strategy, dataset(*data(rows), 6))]
    assert same(arrays(model.trainable_variables), replay(steps, LR, betas=(0.5, 0.75)).parameters)


def test_train_on_batch_gives_each_replica_the_whole_batch() -> None:
    with mirrored(2).scope():
        model = compiled(Signum(LR, **BETAS))
    batches = [data(6, seed) for seed in range(4)]
    for x, y in batches:
        model.train_on_batch(x, y)
    reference = replay([[batch] * 2 for batch in batches], LR, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), reference.parameters)


@pytest.mark.parametrize("compile_loop", [True, False])
def test_custom_training_loop(compile_loop: bool) -> None:
    strategy = mirrored(3)
    with strategy.scope():
        model, optimizer = net(), Signum(LR, **BETAS)

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y)) / 3
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    def run(x: tf.Tensor, y: tf.Tensor) -> None:
        strategy.run(step, args=(x, y))

    loop = tf.function(run) if compile_loop else run
    for batch in strategy.experimental_distribute_dataset(dataset(*data(24), 6)):
        loop(*batch)
    reference = replay(shares(strategy, dataset(*data(24), 6)), LR, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), reference.parameters)


def test_accumulation_votes_with_each_replicas_mean() -> None:
    """Six batches, four at a time: one vote, and two batches that wait for the next."""
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(Signum(LR, **BETAS, gradient_accumulation_steps=4))
    steps = shares(strategy, dataset(*data(36), 6))
    fit(model, rows=36)
    assert same(arrays(model.trainable_variables), replay(steps, LR, betas=(0.5, 0.75), every=4).parameters)
    fit(model, rows=36)
    reference = replay(steps * 2, LR, betas=(0.5, 0.75), every=4)
    assert same(arrays(model.trainable_variables), reference.parameters)
    assert reference.t == keras.ops.convert_to_numpy(model.optimizer.iterations) == 3


CLIPS: dict[str, Any] = {
    "clipvalue": lambda grads, size: [tf.clip_by_value(g, -size, size) for g in grads],
    "clipnorm": lambda grads, size: [tf.clip_by_norm(g, size) for g in grads],
    "global_clipnorm": lambda grads, size: tf.clip_by_global_norm(grads, size)[0],
}


@pytest.mark.parametrize("kind", nightly_where(lambda kind: kind != "global_clipnorm", CLIPS))
def test_each_replica_clips_its_own_gradients(kind: str) -> None:
    strategy, every = mirrored(2), 2 if kind == "clipnorm" else 1  # a mean is clipped after it is taken
    with strategy.scope():
        model = compiled(
            Signum(
                LR,
                0.875,
                0.875,
                **dict[str, Any]({kind: 0.125}),
                gradient_accumulation_steps=every if every > 1 else None,
            )
        )
    fit(model, epochs=2)
    steps = shares(strategy, dataset(*data(24), 6)) * 2
    reference = replay(steps, LR, betas=(0.875, 0.875), every=every, clip=lambda grads: CLIPS[kind](grads, 0.125))
    assert same(arrays(model.trainable_variables), reference.parameters)
    assert not same(reference.parameters, replay(steps, LR, betas=(0.875, 0.875), every=every).parameters)


def test_a_replica_with_nan_costs_its_own_votes_only() -> None:
    strategy = mirrored(3)
    with strategy.scope():
        model = compiled(Signum(LR, **BETAS))
    x, y = data(24)
    y[8] = np.nan  # in the share of the second replica
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    reference = replay(shares(strategy, dataset(x, y, 6)), LR, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), reference.parameters)
    assert all(np.isfinite(x).all() for x in reference.parameters)


class Idle(keras.layers.Layer):  # type: ignore[misc]
    """Has a weight that the loss does not depend on."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.unused = self.add_weight(shape=(5,), initializer="ones", name="unused")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_variable_without_a_gradient_stays_untouched() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(Signum(LR, **BETAS, weight_decay=0.25), make=lambda: net(Idle()))
    fit(model)
    steps = shares(strategy, dataset(*data(24), 6))
    reference = replay(steps, LR, lambda: net(Idle()), betas=(0.5, 0.75), weight_decay=0.25)
    assert same(arrays(model.trainable_variables), reference.parameters)
    assert reference.verdicts[2] is None
    assert all(not row[2].any() for row in momenta(model.optimizer, strategy))


def test_a_layer_frozen_midway_stays_and_keeps_its_momentum() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(Signum(LR, **BETAS, weight_decay=0.25))
    optimizer, steps = model.optimizer, shares(strategy, dataset(*data(24), 6))
    fit(model)
    reference = replay(steps, LR, betas=(0.5, 0.75), weight_decay=0.25)
    for frozen in (True, False):
        model.get_layer("one").trainable = not frozen
        with strategy.scope():
            model.compile(optimizer=optimizer, loss="mse")
        fit(model)
        reference = replay(steps, LR, after=reference, without="one" if frozen else None)
        assert same(arrays(model.weights), reference.parameters)
        own = momenta(optimizer, strategy)
        assert all(same(row, expected) for row, expected in zip(own, reference.momenta, strict=True))
