"""Several workers resume bit for bit, each from its own folder, with every replica's momentum in every file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import signsgd_core as core
from tests.clusters import Cluster

from .cluster_strategy import strategy
from .models import Array, arrays, compiled, data, same

EPOCHS = 4


def _model() -> Any:
    from signsgd_keras import Signum

    with strategy().scope():
        made = compiled(Signum(2.0**-5, 0.9, 0.9, verdict_momentum=0.5))
        made.optimizer.build(made.trainable_variables)
    return made


def _state(made: Any) -> list[Array]:
    """Parameters, this worker's momenta, and the state that is the same on all."""
    own = {id(m) for m in made.optimizer._momentums}
    shared = [v for v in (*made.variables, *made.optimizer.variables) if id(v) not in own]
    momenta = [strategy().experimental_local_results(m.value)[0].numpy() for m in made.optimizer._momentums]
    return [*momenta, *arrays(shared)]


def _fit(made: Any, until: int, *callbacks: Any, since: int = 0) -> None:
    made.fit(
        *data(26), batch_size=8, shuffle=False, epochs=until, initial_epoch=since, callbacks=list(callbacks), verbose=0
    )


def _resume(folder: Path) -> dict[str, list[Array]]:
    """Train through, and from the model that was saved after two epochs."""
    import keras

    scope, states = strategy(), {}
    own = folder / str(scope.cluster_resolver.task_id)
    own.mkdir()
    made = _model()
    names = ("model.{epoch}.keras", "model.{epoch}.weights.h5")
    _fit(made, EPOCHS, *(keras.callbacks.ModelCheckpoint(own / n, save_weights_only="weights" in n) for n in names))
    states["through"] = _state(made)

    with scope.scope():
        made = keras.models.load_model(own / "model.2.keras")
    states["midway"] = _state(made)
    _fit(made, EPOCHS, since=2)
    states["load_model"] = _state(made)
    return states


def _resume_otherwise(folder: Path) -> dict[str, list[Array]]:
    """Train from the weights that were saved after two epochs, and after an interruption."""
    import keras

    states, own = {}, folder / str(strategy().cluster_resolver.task_id)
    made = _model()
    made.load_weights(own / "model.2.weights.h5")
    _fit(made, EPOCHS, since=2)
    states["load_weights"] = _state(made)

    def cut(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise InterruptedError

    try:
        backup = keras.callbacks.BackupAndRestore(own / "backup")
        _fit(_model(), EPOCHS, backup, keras.callbacks.LambdaCallback(on_epoch_end=cut))
    except InterruptedError:
        made = _model()
        _fit(made, EPOCHS, keras.callbacks.BackupAndRestore(own / "backup"))
        states["BackupAndRestore"] = _state(made)
    return states


ALL = (
    "each worker alone has its momentum: all of them must save, at the same step, each to a file of its own, and not "
    "the chief alone"
)


def _late(folder: Path) -> tuple[list[str], list[Array]]:
    """Save on all workers, on the second one three seconds late."""
    import time
    import warnings

    from signsgd_keras import replica_variable

    made, late = _model(), strategy().cluster_resolver.task_id == 1
    _fit(made, 1)
    replica_variable.PATIENCE = 1.0
    time.sleep(3.0 * late)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.save_weights(folder / f"{int(late)}.weights.h5")
    other = _model()
    other.load_weights(folder / f"{int(late)}.weights.h5")
    assert same(_state(other), _state(made))
    return [str(warning.message) for warning in caught if "waits" in str(warning.message)], []


def test_a_worker_that_waits_for_the_others_says_so(tmp_path: Path, fresh_cluster: Callable[[int], Cluster]) -> None:
    """Where they never save, this is all that is seen."""
    (first, _), (second, _) = fresh_cluster(2).run(_late, tmp_path)
    assert first == [f"this worker waits for the others to save: {ALL}"]
    assert second == []


def _chief_alone(folder: Path) -> str:
    import keras
    import tensorflow as tf

    chief = strategy().cluster_resolver.task_id == 0
    try:
        _fit(_model(), 3, *([keras.callbacks.ModelCheckpoint(folder / "a.keras")] if chief else []))
    except (RuntimeError, tf.errors.OpError) as error:
        return str(error)
    return "no error"


def test_the_chief_alone_cannot_save(tmp_path: Path, fresh_cluster: Callable[[int], Cluster]) -> None:
    """As it may with Adam, whose state is the same on all; both end, and the chief knows why."""
    chief, other = fresh_cluster(2).run(_chief_alone, tmp_path)
    assert chief == f"the other workers did something else while this one saved: {ALL}"
    assert "Collective ops is aborted" in other


def _elsewhere(file: Path) -> list[Array]:
    """The momenta of this worker where a file of another number of workers is opened."""
    import keras

    with strategy().scope():
        made = keras.models.load_model(file)
    momenta = _state(made)[: len(made.trainable_variables)]
    _fit(made, 3, since=2)
    return momenta


@pytest.fixture(scope="module")
def resumed(cluster: Callable[[int], Cluster], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, cluster(2).run(_resume, folder)


def test_it_goes_on_bit_for_bit(resumed: tuple[Path, list[dict[str, list[Array]]]]) -> None:
    for states in resumed[1]:
        assert same(states["load_model"], states["through"])
    first, second = (states["through"][:4] for states in resumed[1])
    assert not any(same([a], [b]) for a, b in zip(first, second, strict=True))


@pytest.mark.nightly  # as replicas do in test_checkpoints.py
def test_it_goes_on_bit_for_bit_in_other_ways(
    resumed: tuple[Path, list[dict[str, list[Array]]]], cluster: Callable[[int], Cluster]
) -> None:
    folder, runs = resumed
    for states, others in zip(runs, cluster(2).run(_resume_otherwise, folder), strict=True):
        assert list(others) == ["load_weights", "BackupAndRestore"]
        assert all(same(state, states["through"]) for state in others.values())


def test_every_file_holds_every_workers_momentum(resumed: tuple[Path, list[dict[str, list[Array]]]]) -> None:
    folder, runs = resumed
    momenta = [np.stack(rows) for rows in zip(*(states["midway"][:4] for states in runs), strict=True)]
    for worker in "01":
        with h5py.File(folder / worker / "model.2.weights.h5") as file:
            stored = [np.array(x) for x in file["optimizer/vars"].values()]
        assert all(any(same([rows], [x]) for x in stored) for rows in momenta)


def test_another_number_of_workers(
    resumed: tuple[Path, list[dict[str, list[Array]]]], cluster: Callable[[int], Cluster]
) -> None:
    folder, runs = resumed
    momenta = [np.stack(rows) for rows in zip(*(states["midway"][:4] for states in runs), strict=True)]
    for worker, own in enumerate(cluster(3).run(_elsewhere, folder / "0" / "model.2.keras")):
        assert same(own, [core.redistribute(rows, 3)[worker] for rows in momenta])
