"""NaN, ±Inf and huge gradients at random places and replicas: Keras loses nothing, and counts them all."""

from typing import Any

import keras
import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np
import pytest
import tensorflow as tf

from signsgd_core import Reference
from signsgd_keras import Signum, VoteMonitor
from tests.devices import mirrored
from tests.keras.models import Array, arrays, components, same

from .conftest import Fault

pytestmark = pytest.mark.multiprocess

REPLICAS, SIZE, EPOCHS, LR = 3, 45, 4, 2.0**-6
WILD = [np.nan, np.inf, -np.inf, 1e38, -1e38, 3e38, -3e38]


class Given(keras.layers.Layer):  # type: ignore[misc]
    """Its output's derivatives by its weights are its inputs."""

    def build(self, shape: Any) -> None:
        self.x = self.add_weight(shape=(SIZE,), initializer="ones", name="x")

    def call(self, inputs: Any) -> Any:
        return keras.ops.sum(inputs * self.x, axis=-1, keepdims=True)


def _loss(y: Any, output: Any) -> Any:
    """The output: Keras divides it by the number of replicas."""
    return REPLICAS * output


def _gradients(steps: int) -> Array:
    """Shape (steps, replicas, SIZE): one entry of 20 is wild, and one replica's gradient of 10 is so altogether."""
    random = np.random.default_rng(steps)
    shape = (steps, REPLICAS, SIZE)
    values = random.integers(-3, 4, shape) / 8
    wild = random.random(shape) < np.where(random.random((steps, REPLICAS, 1)) < 1 / 10, 1, 1 / 20)
    return np.where(wild, random.choice(WILD, shape), values).astype(np.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_nothing_is_lost(steps: int, dtype: str, fault: Fault) -> None:
    """Parameters and momenta are `Reference`'s, finite, and the same on all replicas; the monitor misses no entry."""
    given = _gradients(steps)
    with mirrored(REPLICAS).scope():
        model = keras.Sequential([keras.Input((SIZE,)), Given(dtype=dtype)])
        model.compile(Signum(LR, 0.5, 0.5), loss=_loss)
    data = tf.data.Dataset.from_tensor_slices((given.reshape(-1, SIZE), np.zeros((REPLICAS * steps, 1), np.float32)))
    with fault(f"gradients with NaN, ±Inf and huge entries, {REPLICAS} Keras replicas, steps", steps):
        history = model.fit(
            data.batch(REPLICAS), steps_per_epoch=steps // EPOCHS, epochs=EPOCHS, verbose=0, callbacks=[VoteMonitor()]
        ).history
        cast = given.astype(dtype)
        wild = (~np.isfinite(cast.astype(np.float32))).sum(axis=(1, 2))
        assert history["vote/nonfinite"] == list(wild.reshape(EPOCHS, -1).sum(axis=1).cumsum())
        (x,), (momenta,) = arrays(model.trainable_variables), components(model.optimizer._momentums)
        assert np.isfinite(x.astype(np.float32)).all()
        assert np.isfinite(momenta).all()
        reference = Reference([np.ones(SIZE, dtype)], REPLICAS, LR, (0.5, 0.5))
        for step in cast:
            reference.step([[g] for g in step])
        assert same([x], reference.parameters)
        assert same(list(momenta), [m[0] for m in reference.momenta])
        assert model.optimizer.iterations.numpy() == reference.t == steps
