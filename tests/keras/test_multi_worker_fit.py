"""`fit`, `evaluate` and `predict` of Keras 3 on several workers, for every optimizer, callback and kind of input."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clusters import Cluster

from .cluster_strategy import strategy
from .models import Array, arrays, compiled, data, dataset, same

Trained = tuple[dict[str, list[float]], list[float], Array, list[Array]]
"""History, scores of `evaluate`, rows of `predict`, weights."""


def train(name: str) -> Trained:
    """Train in the scope that is in force, a last smaller batch everywhere."""
    import keras

    optimizers = {"Adam": lambda: keras.optimizers.Adam(0.05), "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}
    model = compiled(optimizers[name](), metrics=["mae"])
    history = model.fit(*data(28), batch_size=8, epochs=3, shuffle=False, verbose=0, validation_data=data(12, seed=1))
    scores = model.evaluate(*data(20, seed=2), batch_size=8, verbose=0)
    return history.history, scores, model.predict(data(20)[0], batch_size=8, verbose=0), arrays(model.weights)


def _train(name: str) -> Trained:
    with strategy().scope():
        return train(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_keras_own_optimizers_train_as_in_one_process(name: str, cluster: Callable[[int], Cluster]) -> None:
    """All batches split evenly, so that the mean over workers is that of the batch; to rounding."""
    one = train(name)
    for history, scores, rows, weights in cluster(2).run(_train, name):
        assert history.keys() == one[0].keys() == {"loss", "mae", "val_loss", "val_mae"}
        for key, values in history.items():
            np.testing.assert_allclose(values, one[0][key], rtol=1e-5, err_msg=key)
        np.testing.assert_allclose(scores, one[1], rtol=1e-5)
        assert rows.shape == (20, 1)
        np.testing.assert_allclose(rows, one[2], rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(weights, one[3], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def _predict(rows: int, batch_size: int) -> tuple[Array, Array]:
    """Of the scope's workers together, and of this one alone."""
    from signsgd_keras import Signum

    with strategy().scope():
        model = compiled(Signum(0.125))
    x = data(rows)[0]
    return model.predict(x, batch_size=batch_size, verbose=0), model(x).numpy()


@pytest.mark.parametrize(("rows", "batch_size"), [(24, 8), (21, 8), (3, 8), (1, 8)])
def test_predict_returns_all_rows_in_order(rows: int, batch_size: int, cluster: Callable[[int], Cluster]) -> None:
    for predicted, expected in cluster(2).run(_predict, rows, batch_size):
        np.testing.assert_allclose(predicted, expected, rtol=1e-6)


def _base_class() -> str:
    import keras
    import tensorflow as tf

    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        model = compiled(keras.optimizers.SGD(0.05))
    try:
        model.fit(*data(16), batch_size=8, verbose=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_the_base_class_still_fails(fresh_cluster: Callable[[int], Cluster]) -> None:
    """keras#20585. Where this fails, Keras has mended it: see what MultiWorkerMajorityVoteStrategy still must mend."""
    for message in fresh_cluster(2).run(_base_class):
        assert message != "no error"


def _callbacks(folder: Path) -> tuple[dict[str, list[float]], list[float], str]:
    """Early stopping ends four epochs after the last gain; before that the learning rate is halved every two."""
    import keras

    from signsgd_keras import Signum

    scope = strategy()
    own = folder / str(scope.cluster_resolver.task_id)
    with scope.scope():
        model = compiled(Signum(0.0))  # stands still, so that nothing is ever gained
        model.optimizer.learning_rate = 2.0**-30
    rates: list[float] = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate.numpy()))
    )
    history = model.fit(
        *data(24),
        batch_size=8,
        epochs=20,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping("loss", patience=4, min_delta=0.5),
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=2, min_delta=0.5),
            keras.callbacks.TensorBoard(own),
            keras.callbacks.CSVLogger(own / "log.csv"),
            note,
        ],
    )
    return history.history, rates, (own / "log.csv").read_text()


def test_callbacks(tmp_path: Path, cluster: Callable[[int], Cluster]) -> None:
    runs = cluster(2).run(_callbacks, tmp_path)
    assert runs[0] == runs[1]
    history, rates, log = runs[0]
    assert rates == [2.0**-30] * 3 + [2.0**-31] * 2
    assert [float(row["loss"]) for row in csv.DictReader(log.splitlines())] == history["loss"]
    assert len(history["loss"]) == 5
    assert all(list((tmp_path / worker / "train").glob("events.out.tfevents.*")) for worker in "01")


def _inputs(kind: str) -> list[Array]:
    import keras
    import tensorflow as tf

    from signsgd_keras import Signum

    x, y = data(24)

    class Rows(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Array, Array]:
            rows = slice(8 * index, 8 * index + 8)
            return x[rows].copy(), y[rows].copy()  # of views TensorFlow overwrites what they are views of

    with strategy().scope():
        model = compiled(Signum(2.0**-4, 0.5, 0.75))
    given: dict[str, Any] = {
        "NumPy": (x, y),
        "tensors": (tf.constant(x), tf.constant(y)),
        "tf.data": (dataset(x, y, 8),),
        "PyDataset": (Rows(),),
    }
    options = {"batch_size": 8} if kind in ("NumPy", "tensors") else {}
    model.fit(*given[kind], epochs=2, shuffle=False, verbose=0, **options)
    return arrays(model.weights)


@pytest.mark.parametrize(
    "kinds",
    [
        ("NumPy", "tf.data"),
        pytest.param(("NumPy", "PyDataset"), marks=pytest.mark.nightly),
        pytest.param(("NumPy", "tensors"), marks=pytest.mark.nightly),
    ],
    ids=", ".join,
)
def test_inputs_train_the_same(kinds: tuple[str, ...], cluster: Callable[[int], Cluster]) -> None:
    found = [weights for kind in kinds for weights in cluster(2).run(_inputs, kind)]
    assert all(same(weights, found[0]) for weights in found)
