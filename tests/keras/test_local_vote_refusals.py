"""Workers that differ are refused on all of them, replicas that differ are found, and a restart goes on."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.clusters import Cluster

from .cluster_strategy import strategy
from .local_steps import Case, given, rank, values
from .models import Array, compiled, net, same
from .test_local_vote import adam

SETTINGS: dict[str, tuple[Any, Any]] = {
    "sync_every": (2, 3),
    "outer_lr": (1.0, 0.5),
    "outer_momentum": (0.0, 0.5),
    "verify_every_n_rounds": (0, 1),
}
"""Of worker 0 and of worker 1."""


def _refused(model: Any, **settings: Any) -> str:
    """Train, and return the error; nothing may have changed."""
    from signsgd_keras import LocalVote

    before = values(model.variables)
    try:
        vote = LocalVote(strategy=strategy(), **settings)
        model.fit(given(Case(adam, 2, (3, 3)), rank()), callbacks=[vote], verbose=0)
    except (ValueError, RuntimeError) as error:
        assert same(values(model.variables), before)
        return f"{type(error).__name__}: {error}"
    return "no error"


def _unbuilt(first: int) -> Any:
    """A model whose layers Keras builds in the first step, but for so many."""
    layers = [keras.layers.Dense(3, name="one"), keras.layers.Dense(1, name="two")]
    if first:
        layers[0].build((None, 4))
    return keras.Sequential(layers, name="net")


def _differences() -> list[str]:
    worker, found = rank(), list[str]()
    for name, of_workers in SETTINGS.items():
        found.append(_refused(compiled(adam()), **{name: of_workers[worker]}))
    extra = [keras.layers.Dense(3 + worker, name="between")]
    found.append(_refused(compiled(adam(), make=lambda: net(*extra))))
    frozen = net()
    frozen.get_layer("one").trainable = worker == 0
    frozen.compile(adam(), "mse")
    found.append(_refused(frozen))
    averaged = keras.optimizers.Adam(0.01, use_ema=True)
    found.append(_refused(compiled(averaged)))
    found.append(_refused(compiled(adam()), adversaries={2: abs}))
    with strategy().scope():
        mirrored = compiled(adam())
    found.append(_refused(mirrored))
    found.extend(_refused(compiled(adam(), make=partial(_unbuilt, first))) for first in (0, 1, worker))
    still = net()
    still.trainable = False
    still.compile(adam(), "mse")
    found.append(_refused(still))
    return [*found, _refused(compiled(adam()))]


def test_what_is_refused(cluster: Callable[[int], Cluster]) -> None:
    """By all workers alike; then they train."""
    ours, theirs = cluster(2).run(_differences)
    assert ours == theirs
    *settings, shape, frozen, averaged, liar, mirrored, none, half, one, still, trained = ours
    for (name, (first, second)), message in zip(SETTINGS.items(), settings, strict=True):
        assert f"cannot vote: worker 0 has «{name}={first}» where worker 1 has «{name}={second}»" in message
    assert "worker 0 has «net/between/kernel: shape (3, 3), float32» where worker 1 has «net/between/kernel: s" in shape
    assert "worker 0 has «net/one/kernel: shape (4, 3), float32» where worker 1 has «net/two/kernel: s" in frozen
    assert averaged.startswith("ValueError: use_ema=True would end fit() with each worker's own averages")
    assert liar == "ValueError: adversaries must be workers 0 to 1, got [2]"
    assert mirrored.startswith("ValueError: LocalVote needs a model of this process alone")
    sentence = "ValueError: LocalVote votes on the variables that a model has when fit() starts, and this one {}: call"
    assert none.startswith(sentence.format("is not built (net, one, two)"))
    assert half.startswith(sentence.format("is not built (net, two)"))
    assert "worker 0 has «unbuilt layers=['net', 'one', 'two']» where worker 1 has «unbuilt layers=['net', 't" in one
    assert still.startswith(sentence.format("has none to train"))
    assert trained == "no error"


def _thaws() -> str:
    from signsgd_keras import LocalVote

    model = net()
    model.get_layer("one").trainable = False
    model.compile(adam(), "mse")

    def thaw(batch: int, logs: Any = None) -> None:
        model.get_layer("one").trainable = True

    last = keras.callbacks.LambdaCallback(on_train_batch_end=thaw)
    try:
        model.fit(given(Case(adam, 2, (3,)), 0), callbacks=[LocalVote(2), last], verbose=0)
    except ValueError as error:
        return str(error)
    return "no error"


def test_variables_that_come_later(backend: Callable[[str], Cluster]) -> None:
    (message,) = backend("tensorflow").run(_thaws)
    assert message.startswith("net/one/kernel, net/one/bias was not trained when fit() started, and LocalVote has no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_every": 0}, "sync_every must be a whole number of 1 or more, got 0"),
        ({"outer_lr": -1.0}, "outer_lr must be 0 or more and finite, got -1.0"),
        ({"outer_momentum": 1.0}, r"outer_momentum must lie in \[0, 1\), got 1.0"),
        ({"verify_every_n_rounds": -1}, "verify_every_n_rounds must be a whole number of 0 or more, got -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    from signsgd_keras import LocalVote

    with pytest.raises(ValueError, match=message):
        LocalVote(**settings)


def test_what_could_not_work_is_refused_at_once(tmp_path: Path) -> None:
    import tensorflow as tf

    from signsgd_keras import LocalVote

    with pytest.raises(TypeError, match="strategy must be a tf.distribute.MultiWorkerMirroredStrategy, got <"):
        LocalVote(strategy=tf.distribute.MirroredStrategy(["CPU:0"]))
    with pytest.raises(ValueError, match="state_file must be in a folder that there is, got .*none/o.npz'"):
        LocalVote(state_file=str(tmp_path / "none" / "o.npz"))


def _broken(path: str) -> tuple[str, float]:
    """Start from a file that is no such file; return the error, and how long others are waited for."""
    from signsgd_keras import LocalVote

    Path(path).write_bytes(b"no array")
    vote = LocalVote(2, state_file=path)
    try:
        compiled(adam()).fit(given(Case(adam, 2, (3,)), 0), callbacks=[vote], verbose=0)
    except ValueError as error:
        return str(error), vote._exchange._strategy.extended._communication_options.timeout_seconds
    return "no error", 0.0


def test_a_broken_state_file(tmp_path: Path, backend: Callable[[str], Cluster]) -> None:
    path = str(tmp_path / "outer.npz")
    sentence = f"{path} is broken, or LocalVote did not write it: remove it, or name another"
    assert backend("tensorflow").run(_broken, path) == [(sentence, 1800.0)]


def _flip() -> tuple[list[int], int, str, str]:
    """After the second round a bit of worker 1's memory flips; return what verification found."""
    from signsgd_keras import LocalVote, ReplicasDifferError

    worker, model = rank(), compiled(adam(), run_eagerly=True)
    kernel, written = model.get_layer("two").kernel, list[int]()
    assign = kernel.assign

    def flips(value: Array) -> None:
        written.append(1)
        flipped = np.array(value)
        if worker == 1 and len(written) == 3:  # the first is worker 0's
            flipped.view(np.uint8).reshape(-1)[0] ^= 1
        assign(flipped)

    kernel.assign = flips
    try:
        vote = LocalVote(sync_every=2, verify_every_n_rounds=1, strategy=strategy())
        model.fit(given(Case(adam, 2, (8, 8)), worker), callbacks=[vote], verbose=0)
    except ReplicasDifferError as error:
        return error.replicas, error.step, error.variable, str(error)
    return [], 0, "", "no error"


def test_verification_names_who_differs(cluster: Callable[[int], Cluster]) -> None:
    """Of two nobody is in the majority."""
    sentence = "after round 2 workers 0 and 1 differ from the other workers in net/two/kernel, or in its outer momentum"
    for replicas, step, variable, message in cluster(2).run(_flip):
        assert (replicas, step, variable) == ([0, 1], 2, "net/two/kernel")
        assert message.startswith(sentence)


class Interrupted(Exception):
    """Ends a `fit`."""


def _interrupted(folder: Path, at: int | None, momentum: float) -> list[Array]:
    """Train 4 epochs, or start `at` epochs and stop; return the variables of model and optimizer."""
    from signsgd_keras import LocalVote

    worker, model = rank(), compiled(adam(), run_eagerly=True)
    vote = LocalVote(2, outer_momentum=momentum, state_file=str(folder / "outer.npz"), strategy=strategy())
    backup = keras.callbacks.BackupAndRestore(folder / str(worker), delete_checkpoint=False)

    def stop(epoch: int, logs: Any = None) -> None:
        if epoch == at:
            raise Interrupted

    last = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
    try:
        model.fit(given(Case(adam, 2, (3, 3)), worker), epochs=4, callbacks=[vote, backup, last], verbose=0)
    except Interrupted:
        return []
    return values([*model.variables, *model.optimizer.variables])


def _resume(folder: Path, momentum: float) -> bool:
    whole = _interrupted(folder / "whole", None, momentum)
    _interrupted(folder / "cut", 3, momentum)
    return same(_interrupted(folder / "cut", None, momentum), whole)


@pytest.mark.parametrize("momentum", [0.5])
def test_a_restart_goes_on_bit_for_bit(momentum: float, cluster: Callable[[int], Cluster], tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert cluster(2).run(_resume, tmp_path, momentum) == [True, True]


def _late() -> str:
    import tensorflow as tf

    from signsgd_keras import LocalVote

    workers = ["127.0.0.1:1", "127.0.0.1:2"]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": 0}})
    tf.constant(1)
    try:
        LocalVote()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_made_too_late(fresh_cluster: Callable[[int], Cluster]) -> None:
    assert fresh_cluster(1).run(_late) == ["make LocalVote before the model, and before anything else of TensorFlow"]
