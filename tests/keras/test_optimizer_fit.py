"""`Signum` in Keras' own training loop with one replica: fit, compiled and not, in every precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_keras import Signum

from .backends import Array, assert_equal, everywhere, everywhere_jax_nightly, numbers


def data(rows: int = 64) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, 4)).astype(np.float32)
    return x, (x @ np.array([[1.0], [-2.0], [0.5], [0.0]])).astype(np.float32)


def model_of(optimizer: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse", **options)
    return model


def losses(model: Any, epochs: int = 6, **options: Any) -> list[float]:
    x, y = data()
    history = model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **options).history
    return list(history["loss"])


@contextmanager
def policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


FAMILY: tuple[dict[str, Any], ...] = (
    {},
    {"beta_1": 0.9, "beta_2": 0.99, "weight_decay": 0.01},
    {"beta_1": 0.0, "beta_2": 0.0, "verdict_momentum": 0.8, "zeros": "alternate"},
    {"warmup_steps": 3, "gradient_accumulation_steps": 2, "use_ema": True, "ema_momentum": 0.5},
)


@everywhere_jax_nightly
def test_the_whole_family_learns() -> None:
    for settings in FAMILY:
        history = losses(model_of(Signum(learning_rate=0.02, **settings)), epochs=8)
        assert history[-1] < 0.6 * history[0], (settings, history)


WAYS: dict[str, tuple[dict[str, Any], ...]] = {
    "tensorflow": ({"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}, {"steps_per_execution": 3}),
    "jax": ({"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}, {"steps_per_execution": 3}),
    "torch": ({"jit_compile": False}, {"run_eagerly": True}),
}
"""Beside the default, "auto". Torch refuses several steps per execution for any optimizer, and `jit_compile=True` is
torch.compile, which takes a minute of compiling for any."""


@everywhere_jax_nightly
def test_every_way_to_compile() -> None:
    for options in WAYS[keras.backend.backend()]:
        model = model_of(Signum(learning_rate=0.02, verdict_momentum=0.5), **options)
        history = losses(model)
        assert history[-1] < 0.6 * history[0], (options, history)
        assert numbers(model.optimizer.iterations) == 24


@everywhere_jax_nightly
def test_fit_again_and_again_is_one_long_fit() -> None:
    """`fit`, `train_on_batch` and `evaluate` go on with one state."""
    x, y = data()
    once, often = (model_of(Signum(learning_rate=0.02, verdict_momentum=0.5)) for _ in range(2))
    losses(once, epochs=4)
    losses(often, epochs=1)
    often.evaluate(x, y, verbose=0)
    losses(often, epochs=2)
    for k in range(4):
        often.train_on_batch(x[16 * k : 16 * k + 16], y[16 * k : 16 * k + 16])
    assert_equal([numbers(v) for v in often.weights], [numbers(v) for v in once.weights])
    once_state, often_state = ([numbers(v) for v in model.optimizer.variables] for model in (once, often))
    assert_equal(often_state, once_state)


@everywhere
def test_callbacks_that_set_the_learning_rate() -> None:
    """`LearningRateScheduler` sets what the next epoch takes: with signSGD alone a step is exactly ±lr."""
    model = model_of(Signum(learning_rate=0.5, beta_1=0.0, beta_2=0.0))
    seen: list[Array] = [numbers(model.weights[0])]
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(numbers(model.weights[0])))
    rates = [0.25, 0.125, 0.0625]
    model.fit(*data(), batch_size=64, epochs=3, verbose=0, callbacks=[scheduler(rates), note])
    steps = [np.abs(after - before).max() for before, after in pairwise(seen)]
    np.testing.assert_allclose(steps, rates, rtol=1e-6)
    assert float(model.optimizer.learning_rate) == rates[-1]


def scheduler(rates: list[float]) -> Any:
    return keras.callbacks.LearningRateScheduler(lambda epoch, lr: rates[epoch])


@everywhere
def test_reduce_on_plateau_lowers_it() -> None:
    model = model_of(Signum(learning_rate=0.5, beta_1=0.0, beta_2=0.0))
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=1e9, cooldown=0)
    losses(model, epochs=4, callbacks=[plateau])
    assert float(model.optimizer.learning_rate) == 0.0625


@everywhere
@pytest.mark.parametrize("name_of_policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_precision_policies(name_of_policy: str) -> None:
    """It learns, the momenta are float32, and so are the variables unless all is bfloat16."""
    with policy(name_of_policy):
        model = model_of(Signum(learning_rate=0.02, verdict_momentum=0.5))
        history = losses(model)
    assert history[-1] < 0.6 * history[0]
    wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (name_of_policy == "mixed_float16")
    optimizer = model.optimizer.inner_optimizer if wrapped else model.optimizer
    assert type(optimizer) is Signum
    weights = {keras.backend.standardize_dtype(v.dtype) for v in model.trainable_variables}
    states = [m for v in model.trainable_variables for m in optimizer.state_of(v) if m is not None]
    momenta = {keras.backend.standardize_dtype(m.dtype) for m in states}
    assert len(states) == 8
    assert weights == {"bfloat16" if name_of_policy == "bfloat16" else "float32"}
    assert momenta == {"float32"}


@everywhere
def test_an_overflow_halves_the_loss_scale_and_is_no_step() -> None:
    x, y = data()
    with policy("mixed_float16"):
        model = model_of(Signum(learning_rate=0.02))
        model.train_on_batch(x, y)
        scaled, signum = model.optimizer, model.optimizer.inner_optimizer
        before = [numbers(v) for v in (*model.weights, *signum.variables)]
        scale = float(scaled.dynamic_scale)
        model.train_on_batch(x * 1e4, y * 1e4)
    assert float(scaled.dynamic_scale) == scale / 2
    assert_equal([numbers(v) for v in (*model.weights, *signum.variables)], before)


@everywhere
def test_overflows_without_a_loss_scale_cost_their_coordinates_only() -> None:
    """The loss and with it the gradients are infinite: they count as zero, and nothing that is kept is lost."""
    model = model_of(Signum(learning_rate=0.02, verdict_momentum=0.5))
    x, y = data()
    y[:] = np.float32(3e38)
    model.train_on_batch(x, y)
    assert all(np.isfinite(numbers(v)).all() for v in (*model.weights, *model.optimizer.variables))


@everywhere
def test_embedding() -> None:
    """Its gradient is sparse on TensorFlow, with repeated rows; unseen rows have no momentum and never move."""
    keras.utils.set_random_seed(0)
    words = np.array([[0, 1, 1, 4], [4, 4, 0, 1]] * 8)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(6, 3), keras.layers.Flatten()])
    model.add(keras.layers.Dense(1))
    model.compile(optimizer=Signum(learning_rate=0.02), loss="mse")
    before = numbers(model.layers[0].embeddings)
    history = model.fit(words, np.array([[1.0], [-1.0]] * 8), epochs=8, verbose=0).history["loss"]
    after = numbers(model.layers[0].embeddings)
    assert history[-1] < 0.6 * history[0]
    moved = (after != before).any(axis=1)
    assert moved.tolist() == [True, True, False, False, True, False]
    assert (numbers(model.optimizer.state_of(model.layers[0].embeddings)[0])[[2, 3, 5]] == 0).all()


@everywhere
def test_constraints_hold_after_the_step() -> None:
    x = keras.Variable(np.ones(3, np.float32))
    x.constraint = keras.constraints.NonNeg()
    Signum(learning_rate=2.0).apply([keras.ops.convert_to_tensor(np.array([1.0, -1.0, 1.0], np.float32))], [x])
    assert numbers(x).tolist() == [0.0, 3.0, 0.0]
