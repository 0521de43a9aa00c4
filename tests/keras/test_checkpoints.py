"""Checkpoints keep every replica's momentum: what is resumed ends bit for bit where what ran through does."""

from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import signsgd_core as core
from signsgd_keras import Signum
from tests.devices import mirrored

from .models import Array, arrays, compiled, data, same

pytestmark = pytest.mark.multiprocess

REPLICAS = 3
EPOCHS = 4


def model() -> keras.Model:
    """In the scope of three replicas, with all the state that there is."""
    with mirrored(REPLICAS).scope():
        made = compiled(Signum(2.0**-5, 0.9, 0.9, verdict_momentum=0.5, use_ema=True))
        made.optimizer.build(made.trainable_variables)
    return made


def fit(made: keras.Model, until: int, *callbacks: keras.callbacks.Callback, since: int = 0) -> None:
    made.fit(
        *data(26), batch_size=6, shuffle=False, epochs=until, initial_epoch=since, callbacks=list(callbacks), verbose=0
    )


def momenta(made: keras.Model) -> list[Array]:
    """Of every trainable variable the rows of all replicas."""
    strategy = made.optimizer._distribution_strategy
    own = (strategy.experimental_local_results(m.value) for m in made.optimizer._momentums)
    return [np.stack([m.numpy() for m in rows]) for rows in own]


def state(made: keras.Model) -> list[Array]:
    """All that training goes on from, every replica's own included."""
    private = {id(m) for m in made.optimizer._momentums}
    return [*momenta(made), *arrays(v for v in (*made.variables, *made.optimizer.variables) if id(v) not in private)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, keras.Model, list[Array]]:
    """A folder of what ModelCheckpoint saved after two of four epochs, the model at the end, its momenta midway."""
    folder, made, midway = tmp_path_factory.mktemp("saved"), model(), []
    names = ("model.{epoch}.keras", "model.{epoch}.weights.h5")
    callbacks = [keras.callbacks.ModelCheckpoint(folder / name, save_weights_only="weights" in name) for name in names]
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: midway.append(momenta(made)))
    fit(made, EPOCHS, *callbacks, note)
    return folder, made, midway[1]


def test_the_file_holds_every_replicas_momentum(saved: tuple[Path, keras.Model, list[Array]]) -> None:
    folder, _, midway = saved
    assert all(not same([row], [rows[0]]) for rows in midway for row in rows[1:])
    with h5py.File(folder / "model.2.weights.h5") as file:
        stored = [np.array(x) for x in file["optimizer/vars"].values()]
    for rows in midway:
        assert rows.shape[0] == REPLICAS
        assert any(same([rows], [x]) for x in stored)


def test_load_model_in_the_scope_goes_on_bit_for_bit(saved: tuple[Path, keras.Model, list[Array]]) -> None:
    folder, ended, midway = saved
    with mirrored(REPLICAS).scope():
        made = keras.models.load_model(folder / "model.2.keras")
    assert same(momenta(made), midway)
    fit(made, EPOCHS, since=2)
    assert same(state(made), state(ended))


@pytest.mark.nightly
def test_load_weights_goes_on_bit_for_bit(saved: tuple[Path, keras.Model, list[Array]]) -> None:
    folder, ended, _ = saved
    made = model()
    made.load_weights(folder / "model.2.weights.h5")
    fit(made, EPOCHS, since=2)
    assert same(state(made), state(ended))


class _PowerCut(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            raise InterruptedError


def test_backup_and_restore_goes_on_bit_for_bit(saved: tuple[Path, keras.Model, list[Array]], tmp_path: Path) -> None:
    _, ended, _ = saved
    with pytest.raises(InterruptedError):
        fit(model(), EPOCHS, keras.callbacks.BackupAndRestore(tmp_path), _PowerCut())
    made, epochs = model(), []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    fit(made, EPOCHS, keras.callbacks.BackupAndRestore(tmp_path), note)
    assert epochs == [2, 3]
    assert same(state(made), state(ended))


@pytest.mark.parametrize("replicas", [2, pytest.param(6, marks=pytest.mark.nightly)])
def test_another_number_of_replicas(saved: tuple[Path, keras.Model, list[Array]], replicas: int) -> None:
    folder, _, midway = saved
    with mirrored(replicas).scope():
        made = keras.models.load_model(folder / "model.2.keras")
    assert same(momenta(made), [core.redistribute(rows, replicas) for rows in midway])
    fit(made, 3, since=2)
    arrays(made.trainable_variables)  # the same on all replicas


def test_without_a_strategy_one_worker_has_the_mean_and_hands_it_to_all(
    saved: tuple[Path, keras.Model, list[Array]], tmp_path: Path
) -> None:
    folder, _, midway = saved
    alone = keras.models.load_model(folder / "model.2.keras")
    means = [core.redistribute(rows, 1)[0] for rows in midway]
    assert same([m.numpy() for m in alone.optimizer._momentums], means)
    assert alone.optimizer.iterations.numpy() == 10
    fit(alone, 3, since=2)
    alone.save(tmp_path / "alone.keras")
    with mirrored(REPLICAS).scope():
        made = keras.models.load_model(tmp_path / "alone.keras")
    expected = [np.stack([m.numpy()] * REPLICAS) for m in alone.optimizer._momentums]
    assert same(momenta(made), expected)
    fit(made, 4, since=3)
