"""`VoteMonitor`: its figures are exact on given gradients, and reach the logs of Keras' own callbacks."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_core import Zeros
from signsgd_core.network.traffic import majority_vote
from signsgd_keras import Signum, VoteMonitor
from tests.clusters import Cluster
from tests.devices import mirrored
from tests.votes import SIZES, STEPS, Figures, expected_figures, given_gradients

pytestmark = pytest.mark.multiprocess


class Given(keras.layers.Layer):  # type: ignore[misc]
    """Its output's derivatives by its weights are its inputs."""

    def build(self, shape: Any) -> None:
        self.x = [self.add_weight(shape=(size,), initializer="ones", name=f"x{k}") for k, size in enumerate(SIZES)]

    def call(self, inputs: Any) -> Any:
        return keras.ops.sum(inputs * keras.ops.concatenate(self.x), axis=-1, keepdims=True)


def _output(y: Any, output: Any) -> Any:
    return output


def _fit(strategy: Any, given: Any, zeros: Zeros, callbacks: list[Any]) -> tuple[Any, Any]:
    """Train on gradients [step][replica][tensor], an epoch of half the steps each; return history and parameters."""
    rows = np.stack([np.concatenate(replica) for step in given for replica in step])
    with strategy.scope():
        model = keras.Sequential([keras.Input((sum(SIZES),)), Given()])
        model.compile(Signum(0.25, beta_1=0.0, beta_2=0.0, zeros=zeros), loss=_output)

    data = tf.data.Dataset.from_tensor_slices((rows, np.zeros((len(rows), 1), np.float32))).batch(len(given[0]))
    options = {"steps_per_epoch": len(given) // 2, "epochs": 2, "verbose": 0, "callbacks": callbacks}
    history = model.fit(data, **options).history
    return history, [v.numpy() for v in model.trainable_variables]


def _rows(history: dict[str, list[float]]) -> list[Figures]:
    names = [name for name in history if name.startswith("vote/")]
    return [{name: history[name][epoch] for name in names} for epoch in range(2)]


def _check(rows: list[Figures], given: Any, zeros: Zeros, sent_bytes: int) -> None:
    expected = expected_figures(given, zeros, len(given) // 2)
    assert len(rows) == len(expected) == 2
    for row, figures in zip(rows, expected, strict=True):
        assert row.pop("vote/bytes_per_step") == sent_bytes
        assert 0 < row.pop("vote/exchange_seconds") < 5
        assert row == pytest.approx(figures, rel=1e-12, abs=1e-12)


def _ballot_bytes(replicas: int) -> int:
    """Of one plane's share: every variable begins a byte, and shares are whole words."""
    length = sum(-(-size // 8) for size in SIZES)
    return 8 * -(-length // (8 * replicas))


@pytest.mark.parametrize(
    ("replicas", "zeros"),
    [
        (2, "alternate"),
        (3, "abstain"),
        pytest.param(3, "positive", marks=pytest.mark.nightly),
        pytest.param(3, "alternate", marks=pytest.mark.nightly),
        pytest.param(2, "abstain", marks=pytest.mark.nightly),
        pytest.param(2, "positive", marks=pytest.mark.nightly),
    ],
)
def test_figures_are_exact(replicas: int, zeros: Zeros) -> None:
    given = given_gradients(replicas)
    history, _ = _fit(mirrored(replicas), given, zeros, [VoteMonitor()])
    planes = 2 if zeros == "abstain" else 1
    _check(_rows(history), given, zeros, 2 * (replicas - 1) * planes * _ballot_bytes(replicas))


def _work(given: Any, zeros: Zeros) -> Any:
    from tests.keras.cluster_strategy import strategy

    history, _ = _fit(strategy(), given, zeros, [VoteMonitor()])
    return _rows(history)


def test_figures_of_workers(cluster: Callable[[int], Cluster]) -> None:
    given = given_gradients(2)
    bytes_per_step = majority_vote(8 * sum(-(-size // 8) for size in SIZES), 2)
    for rows in cluster(2).run(_work, given, "alternate"):
        _check(rows, given, "alternate", bytes_per_step)


def test_other_callbacks_see_the_figures_and_the_vote_stays_the_same(tmp_path: Path) -> None:
    given = given_gradients(2)
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    board = keras.callbacks.TensorBoard(str(tmp_path / "board"))
    history, watched = _fit(mirrored(2), given, "alternate", [VoteMonitor(), log, board])
    _, alone = _fit(mirrored(2), given, "alternate", [])
    for x, y in zip(watched, alone, strict=True):
        assert x.tobytes() == y.tobytes()
    with (tmp_path / "log.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert [float(row["vote/ties"]) for row in logged] == history["vote/ties"]
    events = b"".join(path.read_bytes() for path in (tmp_path / "board").rglob("events*"))
    assert b"vote/agreement/rank1" in events
    assert len(logged) == 2 == STEPS // 3


@pytest.mark.nightly
def test_it_counts_no_longer_than_its_fit() -> None:
    with mirrored(2).scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(Signum(), loss="mse")
    x, y = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)
    first = model.fit(x, y, verbose=0, callbacks=[VoteMonitor()]).history
    second = model.fit(x, y, verbose=0).history
    assert "vote/ties" in first
    assert not [name for name in second if name.startswith("vote")]
    assert model.optimizer.vote.observers == []


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, Signum])
def test_no_vote_to_watch(optimizer: Any) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer(), loss="mse")
    with pytest.raises(RuntimeError, match="VoteMonitor has no vote to watch"):
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0, callbacks=[VoteMonitor()])
