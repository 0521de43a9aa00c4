"""`tf.train.Checkpoint` keeps what each replica has its own, and goes on with it bit for bit."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

import signsgd_core as core
from signsgd_keras import LossScaleOptimizer, Signum
from signsgd_keras.replica_variable import ReplicaVariable
from tests.clusters import Cluster
from tests.devices import mirrored

from .cluster_strategy import strategy
from .models import Array, arrays, compiled, components, data, plain, same

pytestmark = pytest.mark.multiprocess

LR = 2.0**-4
LOST = "an earlier version wrote this tf.train.Checkpoint, of each momentum that of replica 0 alone"


def model(replicas: int, wrap: Callable[[Signum], Any] = lambda optimizer: optimizer, **settings: Any) -> Any:
    with mirrored(replicas).scope():
        made = compiled(wrap(Signum(LR, **{"beta_1": 0.5, "beta_2": 0.75, **settings})))
        made.optimizer.build(made.trainable_variables)
    return made


def fit(made: Any, seed: int = 0) -> None:
    made.fit(*data(24, seed), batch_size=6, shuffle=False, verbose=0)


@cache
def fitted(replicas: int) -> Any:
    """Return a model after a fit, for tests that only read it."""
    made = model(replicas)
    fit(made)
    return made


def checkpoint(made: Any) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(model=made, optimizer=made.optimizer)


def state(made: Any) -> list[Array]:
    return components([*made.weights, *made.optimizer.variables])


FULL: dict[str, Any] = {"verdict_momentum": 0.5, "use_ema": True, "gradient_accumulation_steps": 3}
"""All the state that there is; four batches leave something in every accumulator."""


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    through = model(3, **FULL)
    fit(through)
    path, midway = checkpoint(through).save(tmp_path / "a"), state(through)
    fit(through, seed=1)
    restored = model(3, **FULL)
    checkpoint(restored).restore(path).assert_consumed()
    assert same(state(restored), midway)
    own = [rows for rows in midway if rows[0].size > 1 and not same([rows[0]], [rows[1]])]
    assert len(own) == 6  # momenta and accumulators of all variables that are more than a number
    fit(restored, seed=1)
    assert same(state(restored), state(through))


def test_restored_before_the_optimizer_is_built(tmp_path: Path) -> None:
    saved = fitted(2)
    path = checkpoint(saved).save(tmp_path / "a")
    with mirrored(2).scope():
        later = compiled(Signum(LR, 0.5, 0.75))
        status = checkpoint(later).restore(path)
        later.optimizer.build(later.trainable_variables)
    status.assert_consumed()
    assert same(state(later), state(saved))


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (2, 1), (1, 2)])
@pytest.mark.filterwarnings("error:an earlier version:UserWarning")
def test_another_number_of_replicas(before: int, after: int, tmp_path: Path) -> None:
    """By the rule of `signsgd_core.redistribute`: one worker's momentum goes to all, and that is no loss to warn of."""
    saved, other = fitted(before), model(after)
    checkpoint(other).restore(checkpoint(saved).save(tmp_path / "a")).assert_consumed()
    old, new = (components(made.optimizer._momentums) for made in (saved, other))
    assert same(new, [core.redistribute(rows, after) for rows in old])
    assert other.optimizer.iterations.numpy() == 4


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_replicas_loss_scale(replicas: int, tmp_path: Path) -> None:
    """They go round where there are more or fewer replicas: a mean of them would be no power of two."""
    saved, other = (model(n, lambda o: LossScaleOptimizer(o, initial_scale=8.0)) for n in (2, replicas))
    x, y = data(6)
    x[3] = float("inf")  # in the share of the second replica
    saved.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    checkpoint(other).restore(checkpoint(saved).save(tmp_path / "a")).assert_consumed()
    assert components([other.optimizer.dynamic_scale])[0].tolist() == [8.0, 4.0, 8.0][:replicas]
    assert same(state(other), state(saved)) == (replicas == 2)


class Empty(keras.layers.Layer):  # type: ignore[misc]
    """Has a weight without entries."""

    def build(self, shape: Any) -> None:
        self.nothing, self.scale = self.add_weight(shape=(0, 3)), self.add_weight(shape=shape[1:])

    def call(self, x: Any) -> Any:
        return keras.ops.sum(x * self.scale, axis=-1, keepdims=True) + keras.ops.sum(self.nothing)


def test_a_variable_without_entries_is_saved(tmp_path: Path) -> None:
    """TensorFlow's collectives end the process where there is nothing to send."""
    made = []
    for _ in range(2):
        with plain().scope():
            made.append(compiled(Signum(LR, 0.5, 0.5), make=lambda: keras.Sequential([keras.Input((4,)), Empty()])))
            made[-1].optimizer.build(made[-1].trainable_variables)
    saved, other = made
    fit(saved)
    saved.save_weights(tmp_path / "a.weights.h5")
    other.load_weights(tmp_path / "a.weights.h5")
    assert same(state(other), state(saved))


@pytest.mark.parametrize("replicas", [1, 2])
def test_one_of_an_earlier_version(replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept the first replica's, as Keras' variables do; what that cost is said where there are others."""
    saved, other = fitted(2), model(replicas)
    with monkeypatch.context() as patch:
        patch.setattr(ReplicaVariable, "_serialize_to_tensors", keras.Variable._serialize_to_tensors)
        path = checkpoint(saved).save(tmp_path / "a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        checkpoint(other).restore(path).assert_consumed()
    assert any(LOST in str(warning.message) for warning in caught) == (replicas == 2)
    first = [rows[:1].repeat(replicas, axis=0) for rows in components(saved.optimizer._momentums)]
    assert same(components(other.optimizer._momentums), first)


def test_set_weights_takes_rows_and_says_what_one_costs() -> None:
    saved, one, all_rows = fitted(2), model(2), model(2)
    with pytest.warns(UserWarning, match="it is replica 0's, and the momenta of the others are lost"):
        one.optimizer.set_weights([v.numpy() for v in saved.optimizer.variables])
    momenta = components(saved.optimizer._momentums)
    assert same(components(one.optimizer._momentums), [rows[:1].repeat(2, axis=0) for rows in momenta])
    rows = [v.rows() if isinstance(v, ReplicaVariable) else v.numpy() for v in saved.optimizer.variables]
    all_rows.optimizer.set_weights(rows)
    assert same(components(all_rows.optimizer.variables), components(saved.optimizer.variables))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_saved_model_has_no_rows(replicas: int, tmp_path: Path) -> None:
    """It is for others, which know the variable's shape; a checkpoint after it has them again."""
    saved, other, module = fitted(replicas), model(replicas), tf.Module()
    module.optimizer = saved.optimizer
    tf.saved_model.save(module, tmp_path / "module")
    first = tf.saved_model.load(tmp_path / "module").optimizer._momentums[0]
    assert same([first.numpy()], [components(saved.optimizer._momentums)[0][0]])
    saved.export(tmp_path / "served", verbose=False)
    checkpoint(other).restore(checkpoint(saved).save(tmp_path / "a")).assert_consumed()
    assert same(state(other), state(saved))
    served = tf.saved_model.load(tmp_path / "served")
    assert same([served.serve(data(4)[0]).numpy()], [saved(data(4)[0]).numpy()])


ASYNC = tf.train.CheckpointOptions(enable_async=True)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, LossScaleOptimizer])
def test_an_asynchronous_one_of_one_replica(wrap: Callable[[Signum], Any], tmp_path: Path) -> None:
    """It names nothing, and is taken with a warning."""
    saved, other = model(1, wrap), model(1, wrap)
    fit(saved)
    asynchronous = checkpoint(saved)
    path = asynchronous.save(tmp_path / "a", options=ASYNC)
    asynchronous.sync()
    with pytest.warns(UserWarning, match="nothing tells which optimizer wrote the state of 'Variable'"):
        checkpoint(other).restore(path)
    assert same(state(other), state(saved))


def test_an_asynchronous_one_of_several_replicas(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernel_momentum of one of 2 replicas and lose those of the others: save it"):
        checkpoint(model(2)).save(tmp_path / "a", options=ASYNC)
    assert not list(tmp_path.iterdir())


def _worker(folder: Path) -> tuple[list[Array], list[Array]]:
    """Momenta of this worker, and what it has back from the chief's file."""
    from signsgd_keras import Signum

    scope = strategy()
    with scope.scope():
        made, other = (compiled(Signum(LR, 0.5, 0.75)) for _ in range(2))
        for each in (made, other):
            each.optimizer.build(each.trainable_variables)
    made.fit(*data(24), batch_size=8, shuffle=False, verbose=0)
    checkpoint(made).write(folder / str(scope.cluster_resolver.task_id))
    scope.reduce("SUM", tf.constant(1), axis=None)  # the chief has written when the others read
    checkpoint(other).read(folder / "0").assert_consumed()
    return (
        [scope.experimental_local_results(m.value)[0].numpy() for m in made.optimizer._momentums],
        [scope.experimental_local_results(m.value)[0].numpy() for m in other.optimizer._momentums],
    )


def test_the_chiefs_file_has_every_workers_momentum(tmp_path: Path, cluster: Callable[[int], Cluster]) -> None:
    (first, first_back), (second, second_back) = cluster(2).run(_worker, tmp_path)
    assert same(first, first_back)
    assert same(second, second_back)
    assert not same(first, second)


def test_arrays_are_the_same_on_all_replicas(tmp_path: Path) -> None:
    """Of a file of three, on two: parameters and verdict momenta do not drift."""
    saved, other = model(3, verdict_momentum=0.5), model(2, verdict_momentum=0.5)
    fit(saved)
    checkpoint(other).restore(checkpoint(saved).save(tmp_path / "a")).assert_consumed()
    fit(other)
    arrays([*other.weights, *other.optimizer._verdict_momentums])
