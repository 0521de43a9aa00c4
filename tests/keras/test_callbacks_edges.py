"""`VoteMonitor` where steps accumulate, losses are scaled, parameters freeze, and an epoch has little to tell."""

import csv
import math
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_keras import Signum, VoteMonitor
from tests.devices import mirrored

pytestmark = pytest.mark.multiprocess

STEPS = 3
"""Of an epoch, with 4 rows each, 2 a replica."""

PARAMETERS = 9 * 5 + 9 + 9 * 1 + 1
BYTES = 16
"""That each of 2 replicas sends per vote: 6 + 2 + 2 + 1 bytes of ballots in two shares of a word, one up, one down."""

Figures = dict[str, list[float]]


def _data() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    shapes = (4 * STEPS, 5), (4 * STEPS, 1)
    x, y = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, y


def _model(scale: float | None = None, run_eagerly: bool = False, **signum: Any) -> Any:
    with mirrored(2).scope():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(9, name="one", kernel_initializer=keras.initializers.RandomUniform(seed=1)),
                keras.layers.Dense(1, name="two", kernel_initializer=keras.initializers.RandomUniform(seed=2)),
            ]
        )
        optimizer: Any = Signum(2.0**-6, **signum)
        if scale:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
        model.compile(optimizer, loss="mse", run_eagerly=run_eagerly)
    return model


def _fit(model: Any, *callbacks: Any, epochs: int = 2, data: Any = None) -> Figures:
    """Return all figures but the time."""
    x, y = data or _data()
    fitted = model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks])
    names = [name for name in fitted.history if name.startswith("vote/") and name != "vote/exchange_seconds"]
    return {name: list(fitted.history[name]) for name in names}


@cache
def _monitored() -> tuple[Any, Figures]:
    """A model after one fit, and its figures."""
    model = _model()
    return model, _fit(model, VoteMonitor())


def test_votes_are_counted_not_batches(tmp_path: Path) -> None:
    """With a vote every other epoch: what the first epoch has nothing of is a column all the same."""
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    x, y = _data()
    y[0] = np.nan  # of the first replica, in two of the batches of each vote
    model = _model(gradient_accumulation_steps=2 * STEPS)
    figures = _fit(model, VoteMonitor(), log, epochs=4, data=(x, y))
    assert figures["vote/bytes_per_step"] == pytest.approx([math.nan, BYTES] * 2, nan_ok=True)
    assert [math.isnan(share) for share in figures["vote/flips"]] == [True, True, True, False]
    assert figures["vote/nonfinite"] == [0, PARAMETERS, PARAMETERS, 2 * PARAMETERS]
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, values in figures.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values, rel=0, nan_ok=True)


@pytest.mark.nightly
def test_scaled_losses() -> None:
    model = _model(scale=2.0**4)
    assert _fit(model, VoteMonitor()) == _monitored()[1]
    assert model.optimizer.inner_optimizer.vote.observers == []


def test_operation_by_operation() -> None:
    assert _fit(_model(run_eagerly=True), VoteMonitor()) == _monitored()[1]


def test_frozen_parameters_are_not_counted() -> None:
    """Replicas that get the same rows agree and tie nowhere, at rest flip nothing, and send what is left to vote on."""
    model, (x, y) = _model(zeros="abstain"), _data()
    model.optimizer.learning_rate = 0.0
    same = x[:2].repeat(2, axis=0)[[0, 2, 0, 2]], y[:2].repeat(2, axis=0)[[0, 2, 0, 2]]
    whole = _fit(model, VoteMonitor(), epochs=1, data=same)
    assert whole["vote/bytes_per_step"] == [2 * BYTES]
    model.get_layer("one").trainable = False
    model.compile(model.optimizer, loss="mse")
    assert _fit(model, VoteMonitor(), data=same) == {
        "vote/agreement/rank0": [1.0, 1.0],
        "vote/agreement/rank1": [1.0, 1.0],
        "vote/ties": [0.0, 0.0],
        "vote/flips": pytest.approx([math.nan, 0.0], nan_ok=True),
        "vote/bytes_per_step": [2 * 2 * 8] * 2,  # a word of each plane is a share
        "vote/nonfinite": [0.0, 0.0],
    }


@pytest.mark.nightly
def test_a_fit_after_it_is_as_if_it_had_never_been() -> None:
    monitored, plain = _monitored()[0], _model()
    _fit(plain)
    assert _fit(plain) == _fit(monitored) == {}
    for x, y in zip(monitored.variables, plain.variables, strict=True):
        assert x.numpy().tobytes() == y.numpy().tobytes()


class _Mistake(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        raise ValueError("a mistake of the user's")


def test_it_starts_afresh_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And lets no replica run outside of a graph, of which TensorFlow would warn."""
    strategy, eager = mirrored(2), list[bool]()
    run = strategy.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        eager.append(tf.executing_eagerly())
        return run(*args, **kwargs)

    monkeypatch.setattr(strategy, "run", watched)
    model, (x, y) = _model(), _data()
    y[4:] = np.nan
    with pytest.raises(ValueError, match="a mistake"):
        _fit(model, VoteMonitor(), _Mistake(), data=(x, y))
    assert len(model.optimizer.vote.observers) == 1
    figures = _fit(model, VoteMonitor())
    assert figures["vote/nonfinite"] == [0.0, 0.0]
    assert figures["vote/bytes_per_step"] == [BYTES, BYTES]
    assert model.optimizer.vote.observers == []
    assert eager
    assert not any(eager)
