"""What `fit` offers works with a vote between the replicas of a MirroredStrategy, and leaves its outcome alone."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_keras import Signum
from tests.devices import mirrored

from .models import Array, arrays, compiled, data, dataset, net, replay, same, shares

pytestmark = pytest.mark.multiprocess

LR = 2.0**-4


def signum(**settings: Any) -> Signum:
    return Signum(LR, 0.5, 0.75, **settings)


def expected(replicas: int = 2, make: Callable[[], keras.Model] = net, epochs: int = 2, **settings: Any) -> list[Array]:
    steps = shares(mirrored(replicas), dataset(*data(24), 6))
    return replay(steps * epochs, LR, make, betas=(0.5, 0.75), **settings).parameters


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"jit_compile": "auto"}, marks=pytest.mark.nightly),  # as the other tests have it
        pytest.param({"jit_compile": False}, marks=pytest.mark.nightly),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.nightly),  # as the conformance cases have it
        {"steps_per_execution": 3},  # four batches an epoch: three and one
    ],
)
def test_ways_to_run_a_step_end_alike(settings: dict[str, Any]) -> None:
    with mirrored(2).scope():
        model = compiled(signum(), **settings)
    model.fit(*data(24), batch_size=6, epochs=2, shuffle=False, verbose=0)
    assert same(arrays(model.trainable_variables), expected())
    assert model.optimizer.iterations.numpy() == 8
    assert not model.jit_compile


class Rows(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of six rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.x, self.y = data(24)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        rows = slice(6 * index, 6 * index + 6)
        return self.x[rows].copy(), self.y[rows].copy()


INPUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "tensors": lambda: tuple(map(tf.constant, data(24))),
    "tf.data": lambda: (dataset(*data(24), 6),),
    "PyDataset": lambda: (Rows(),),
    "PyDataset of two threads": lambda: (Rows(workers=2),),
}


@pytest.mark.nightly  # test_multi_worker_fit.py has two of them
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_end_alike(kind: str) -> None:
    options = {"batch_size": 6} if kind == "tensors" else {}
    with mirrored(2).scope():
        model = compiled(signum())
    model.fit(*INPUTS[kind](), epochs=2, shuffle=False, verbose=0, **options)
    assert same(arrays(model.trainable_variables), expected())


def normalized() -> keras.Model:
    return net(keras.layers.BatchNormalization(name="norm"))


def test_batch_norm() -> None:
    """Each replica normalises by its own rows."""
    with mirrored(2).scope():
        model = compiled(signum(), make=normalized)
    model.fit(*data(24), batch_size=6, epochs=2, shuffle=False, verbose=0)
    assert same(arrays(model.trainable_variables), expected(make=normalized))


@pytest.mark.parametrize("kind", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.nightly)])
def test_mixed_precision(kind: str) -> None:
    """Numbers in eighths are the same in every precision; under float16 Keras scales the loss and undoes it."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(kind)
    try:
        with mirrored(2).scope():
            model = compiled(signum())
        model.fit(*data(6), batch_size=6, epochs=2, shuffle=False, verbose=0)
    finally:
        keras.config.set_dtype_policy(before)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (kind == "mixed_float16")
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert {m.dtype for m in inner._momentums} == {v.dtype for v in model.trainable_variables} == {"float32"}
    assert model.layers[0].compute_dtype == kind.removeprefix("mixed_")
    reference = replay(shares(mirrored(2), dataset(*data(6), 6)) * 2, LR, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), reference.parameters)


def test_an_overflow() -> None:
    """Keras asks the first replica, whose gradients it takes to be those of all; any other one votes for nothing."""
    strategy = mirrored(2)
    with strategy.scope():
        model, optimizer = net(), keras.optimizers.LossScaleOptimizer(Signum(LR, 0.5, 0.5), initial_scale=8.0)
        optimizer.build(model.trainable_variables)

    @tf.function  # type: ignore[untyped-decorator]
    def step(worst: tf.Tensor) -> None:
        def apply() -> None:
            replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
            optimizer.apply([worst[replica] * tf.ones(v.shape) for v in model.trainable_variables])

        strategy.run(apply)

    start = arrays(model.trainable_variables)
    step(tf.constant([np.inf, 8.0]))
    assert same(arrays(model.trainable_variables), start)
    assert optimizer.dynamic_scale.numpy() == 4.0
    step(tf.constant([8.0, 8.0]))
    moved = arrays(model.trainable_variables)
    assert same(moved, [x - np.float32(LR) for x in start])
    step(tf.constant([8.0, np.inf]))
    assert same(arrays(model.trainable_variables), [x - np.float32(LR) for x in moved])
    assert optimizer.dynamic_scale.numpy() == 4.0


@pytest.mark.nightly
def test_early_stopping_plateau_and_logs(tmp_path: Path) -> None:
    """A rate of 2^-30 gains nothing: it is halved after two epochs, and four epochs end it."""
    with mirrored(2).scope():
        model = compiled(Signum(2.0**-30))
    rates: list[float] = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate.numpy()))
    )
    history = model.fit(
        *data(24),
        batch_size=6,
        epochs=20,
        verbose=0,
        validation_data=data(12, seed=1),
        callbacks=[
            keras.callbacks.EarlyStopping("val_loss", patience=4, min_delta=0.5),
            keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=2, min_delta=0.5),
            keras.callbacks.TensorBoard(tmp_path),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            note,
        ],
    ).history
    assert rates == [2.0**-30] * 3 + [2.0**-31] * 2
    log = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [float(row["val_loss"]) for row in log] == history["val_loss"]
    assert [float(row["learning_rate"]) for row in log] == history["learning_rate"]
    assert all(list((tmp_path / part).glob("events.out.tfevents.*")) for part in ("train", "validation"))


def test_a_schedule_counts_batches_as_keras_has_it() -> None:
    """Half the rate after two votes of two batches each."""
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([3], [LR, LR / 2])
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(Signum(rate, 0.5, 0.75, gradient_accumulation_steps=2))
    model.fit(*data(24), batch_size=6, epochs=2, shuffle=False, verbose=0)
    steps = shares(strategy, dataset(*data(24), 6))
    reference = replay(steps, LR, betas=(0.5, 0.75), every=2)
    reference = replay(steps, LR / 2, after=reference, every=2)
    assert same(arrays(model.trainable_variables), reference.parameters)


def test_moving_average_overwrites_the_variables() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(signum(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2))
    model.fit(*data(12), batch_size=6, shuffle=False, verbose=0)
    steps = shares(strategy, dataset(*data(12), 6))
    reference = replay(steps[:1], LR, betas=(0.5, 0.75))
    averages = [x.copy() for x in reference.parameters]
    reference = replay(steps[1:], LR, after=reference)
    averages = [0.5 * a + 0.5 * x for a, x in zip(averages, reference.parameters, strict=True)]
    assert same(arrays(model.trainable_variables), [a.astype(np.float32) for a in averages])


def test_sparse_gradients() -> None:
    """Of an embedding, which have some rows only: the others are zeros."""

    def make() -> keras.Model:
        model = keras.Sequential(
            [
                keras.Input((1,), dtype="int32"),
                keras.layers.Embedding(5, 3, name="rows"),
                keras.layers.Flatten(),
                keras.layers.Dense(1, name="out"),
            ]
        )
        for k, v in enumerate(model.trainable_variables):
            v.assign(np.full(v.shape, 0.25 * (k + 1), np.float32))
        return model

    x = np.array([[0], [1], [2], [3], [0], [2]] * 2, np.int32)
    y = np.linspace(-2, 3.5, 12, dtype=np.float32)[:, None]
    strategy = mirrored(2)
    with strategy.scope():
        model = compiled(signum(), make=make)
    model.fit(x, y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    reference = replay(shares(strategy, dataset(x, y, 6)) * 2, LR, make, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), reference.parameters)
