"""Files keep every replica's loss scale, and open elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_keras import LossScaleOptimizer, Signum
from tests.devices import mirrored

from .models import Array, arrays, compiled, components, data, same

pytestmark = pytest.mark.multiprocess

REPLICAS, BATCH = 3, 6
SCALES = [4.0, 8.0, 2.0]


def model(replicas: int = REPLICAS, wrap: Any = LossScaleOptimizer) -> Any:
    with mirrored(replicas).scope():
        made = compiled(wrap(Signum(2.0**-4, 0.5, 0.5), initial_scale=8.0))
        made.optimizer.build(made.trainable_variables)
    return made


def batch(overflowing: int | None = None, seed: int = 0) -> Any:
    """One for three replicas, of two rows each."""
    x, y = data(BATCH, seed)
    if overflowing is not None:
        x[2 * overflowing] = np.inf
    return x, y


def fit(made: Any, *batches: Any) -> None:
    for x, y in batches:
        made.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)


def state(made: Any) -> list[Array]:
    scaled = made.optimizer
    own = components([scaled.dynamic_scale, scaled.step_counter, *scaled.inner_optimizer._momentums])
    return [*own, *arrays(made.trainable_variables)]


def scales(made: Any) -> list[float]:
    return list(components([made.optimizer.dynamic_scale])[0].tolist())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Array]]:
    """A folder with both files, and the state two batches later."""
    folder, made = tmp_path_factory.mktemp("saved"), model()
    fit(made, batch(0), batch(2), batch(2), batch())
    assert scales(made) == SCALES
    made.save(folder / "model.keras")
    made.save_weights(folder / "model.weights.h5")
    fit(made, batch(1, seed=1), batch(seed=2))
    return folder, state(made)


def _whole(folder: Path) -> Any:
    with mirrored(REPLICAS).scope():
        return keras.models.load_model(folder / "model.keras")


def _weights(folder: Path) -> Any:
    made = model()
    made.load_weights(folder / "model.weights.h5")
    return made


@pytest.mark.parametrize("load", [_whole, pytest.param(_weights, marks=pytest.mark.nightly)])
def test_it_goes_on_bit_for_bit(load: Callable[[Path], Any], saved: tuple[Path, list[Array]]) -> None:
    made, ended = load(saved[0]), saved[1]
    assert type(made.optimizer) is LossScaleOptimizer
    assert made.optimizer.get_config()["initial_scale"] == 8.0
    assert scales(made) == SCALES
    fit(made, batch(1, seed=1), batch(seed=2))
    assert same(state(made), ended)


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.nightly), 6])
def test_another_number_of_replicas(replicas: int, saved: tuple[Path, list[Array]]) -> None:
    with mirrored(replicas).scope():
        made = keras.models.load_model(saved[0] / "model.keras")
    assert scales(made) == [SCALES[i % REPLICAS] for i in range(replicas)]
    fit(made, batch())


def test_a_file_of_keras_own_optimizer(tmp_path: Path) -> None:
    """All replicas take its one scale."""
    theirs = model(wrap=keras.optimizers.LossScaleOptimizer)
    fit(theirs, batch(0), batch(seed=1))
    theirs.save_weights(tmp_path / "model.weights.h5")
    ours = model()
    ours.load_weights(tmp_path / "model.weights.h5")
    assert scales(ours) == [4.0] * REPLICAS
    assert int(ours.optimizer.iterations.numpy()) == 1
    momenta = [components(made.optimizer.inner_optimizer._momentums) for made in (theirs, ours)]
    assert same(*momenta)


def test_a_file_without_a_scale_is_passed_over_as_keras_does(tmp_path: Path) -> None:
    with mirrored(2).scope():
        plain = compiled(Signum(beta_1=0.0, beta_2=0.0))  # has as many variables of its own as there are of a scale
        plain.optimizer.build(plain.trainable_variables)
    plain.save_weights(tmp_path / "model.weights.h5")
    made = model(2)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        made.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    assert scales(made) == [8.0, 8.0]
