"""`Signum`'s state outlives every way that Keras has to save it, bit for bit, in a process that was told nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_keras import Signum
from tests.clusters import Cluster, Nursery
from tests.tiers import nightly_where

from .backends import BACKENDS, Array, assert_equal, eighths, everywhere, gradients, numbers, train, variables
from .test_optimizer_fit import data, policy

FULL: dict[str, Any] = {
    "learning_rate": 0.02,
    "verdict_momentum": 0.5,
    "zeros": "alternate",
    "warmup_steps": 4,
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_momentum": 0.5,
}
"""All the state there is; after an odd number of batches half a mean is in the accumulators, too."""


def model_of(optimizer: Any) -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def batches(model: Any, first: int, last: int) -> None:
    x, y = data()
    for k in range(first, last):
        model.train_on_batch(x[8 * k : 8 * k + 8], y[8 * k : 8 * k + 8])


def state(model: Any) -> list[Array]:
    return [numbers(v) for v in (*model.weights, *model.optimizer.variables)]


class Scaled(keras.layers.Layer):  # type: ignore[misc]
    """Has a weight that is named as a state is."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=shape[1:], name="verdict")

    def call(self, x: Any) -> Any:
        return x * self.scale


@everywhere
def test_a_weight_may_have_the_name_of_a_state(tmp_path: Path) -> None:
    """The momentum of a weight "verdict" is no verdict momentum, which lies in [-1, 1]."""
    first, second = (keras.Sequential([keras.Input((4,)), Scaled()]) for _ in range(2))
    for model in (first, second):
        model.compile(optimizer=Signum(0.5, beta_1=0.5, beta_2=0.5, verdict_momentum=0.5), loss="mse")
        model.optimizer.build(model.trainable_variables)
    train(first.optimizer, [[np.full(4, 8.0, np.float32)]], first.trainable_variables)
    first.save_weights(tmp_path / "a.weights.h5")
    second.load_weights(tmp_path / "a.weights.h5")
    assert_equal(state(second), state(first))
    assert max(np.abs(value).max() for value in state(first)) == 4.0


def save_and_go_on(folder: str, precision: str) -> list[Array]:
    """Train, save in both formats, train on; what comes out at the end."""
    keras.utils.set_random_seed(0)
    with policy(precision):
        model = model_of(Signum(**FULL))
        batches(model, 0, 5)
        model.save(f"{folder}/model.keras")
        model.save_weights(f"{folder}/model.weights.h5")
        batches(model, 5, 8)
        return state(model)


def load_and_go_on(folder: str, precision: str) -> list[Array]:
    """The same from the whole file, and no word of what is in it."""
    with policy(precision):
        model = keras.saving.load_model(f"{folder}/model.keras")
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of a LossScaleOptimizer
        assert type(optimizer) is Signum
        assert optimizer.get_config() == {**Signum(**FULL).get_config(), "name": optimizer.name}
        assert {**optimizer.get_config(), "learning_rate": FULL["learning_rate"]}.items() >= FULL.items()
        batches(model, 5, 8)
        return state(model)


def load_weights_and_go_on(folder: str, precision: str) -> list[Array]:
    """The same from the weights alone, into a model that was already trained elsewhere."""
    keras.utils.set_random_seed(1)
    with policy(precision):
        model = model_of(Signum(**FULL))
        batches(model, 2, 4)
        model.load_weights(f"{folder}/model.weights.h5")
        batches(model, 5, 8)
        return state(model)


@pytest.fixture
def fresh(nursery: Callable[[str], Nursery]) -> Iterator[Callable[[str], Cluster]]:
    """Backend -> a process that has imported `signsgd_keras` and done nothing yet."""
    opened: list[Cluster] = []

    def of(name: str) -> Cluster:
        opened.append(Cluster(nursery(name), 1))
        return opened[-1]

    yield of
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *nightly_where(lambda case: case[0] == "jax", [(name, "float32") for name in BACKENDS]),
        pytest.param("tensorflow", "mixed_float16", marks=pytest.mark.nightly),
        pytest.param("jax", "bfloat16", marks=pytest.mark.nightly),
        pytest.param("torch", "bfloat16", marks=pytest.mark.nightly),
    ],
)
def test_training_goes_on_bit_for_bit_in_a_fresh_process(
    name: str,
    precision: str,
    backend: Callable[[str], Cluster],
    fresh: Callable[[str], Cluster],
    tmp_path: Path,
) -> None:
    (expected,) = backend(name).run(save_and_go_on, str(tmp_path), precision)
    assert all(np.isfinite(x).all() for x in expected)
    process = fresh(name)
    for load in (load_and_go_on, load_weights_and_go_on):
        assert_equal(process.run(load, str(tmp_path), precision)[0], expected)


@pytest.mark.parametrize(("source", "target"), [("tensorflow", "jax"), ("jax", "torch"), ("torch", "tensorflow")])
def test_a_file_of_one_backend_is_one_of_any(
    source: str, target: str, backend: Callable[[str], Cluster], tmp_path: Path
) -> None:
    backend(source).run(save_and_go_on, str(tmp_path), "float32")
    saved, loaded = (backend(name).run(only_load, str(tmp_path))[0] for name in (source, target))
    assert_equal(loaded, saved)


def only_load(folder: str) -> list[Array]:
    loaded = state(keras.saving.load_model(f"{folder}/model.keras"))
    return [x.astype(np.int64) if x.dtype.kind == "i" else x for x in loaded]


class Store(dict[str, Any]):
    """What Keras hands to `save_own_variables` and `load_own_variables`."""


def trained(seed: int = 0, **settings: Any) -> tuple[Signum, list[Any]]:
    optimizer, xs = Signum(**{"learning_rate": 0.25, "beta_1": 0.5, "beta_2": 0.5, **settings}), variables()
    train(optimizer, gradients(3)[seed:], xs)
    return optimizer, xs


@everywhere
def test_a_file_of_another_model_changes_nothing() -> None:
    """The last variable does not fit: neither do the ones before it come in."""
    optimizer, _ = trained()
    before, store = [numbers(v) for v in optimizer.variables], Store()
    trained(seed=1)[0].save_own_variables(store)
    last = len(optimizer.variables) - 1
    store[str(last)] = eighths(2, 4, 3)
    with pytest.raises(ValueError, match="build the model that was saved") as error:
        optimizer.load_own_variables(store)
    path = optimizer.variables[last].path
    assert str(error.value) == (
        f"optimizer variable {last}, {path}, has shape (2, 3, 4) and the saved one (2, 4, 3): build the model that was "
        "saved; nothing was loaded into the optimizer"
    )
    assert_equal([numbers(v) for v in optimizer.variables], before)


@everywhere
def test_a_file_of_other_variables_is_passed_over_as_keras_does() -> None:
    """Another number of variables: Keras warns and loads nothing."""
    optimizer, _ = trained()
    before, store, fewer = [numbers(v) for v in optimizer.variables], Store(), Signum(0.25, 0.5, 0.5)
    train(fewer, [gradients(1)[0][:3]], variables()[:3])
    fewer.save_own_variables(store)
    with pytest.warns(UserWarning, match="Skipping variable loading .* it has 7 .* saved optimizer has 5 .* for other"):
        optimizer.load_own_variables(store)
    assert_equal([numbers(v) for v in optimizer.variables], before)


@everywhere
def test_a_file_without_optimizer_state_is_called_that() -> None:
    """That of a model that was saved without one, whether ours is built or is not."""
    for optimizer in (trained()[0], Signum()):
        with pytest.warns(UserWarning, match="Skipping variable loading .* because the file has no optimizer state"):
            optimizer.load_own_variables(Store())


@everywhere
def test_a_file_of_several_replicas_is_loaded_by_their_mean() -> None:
    """By the rule of `signsgd_core.redistribute`; what was the same on all comes in as it was."""
    optimizer, xs = trained(verdict_momentum=0.5)
    store = Store()
    optimizer.save_own_variables(store)
    expected, kinds = [np.array(store[str(i)]) for i in range(12)], [v.path for v in optimizer.variables]
    for i, kind in enumerate(kinds):
        if kind.endswith("_momentum") and not kind.endswith("verdict_momentum"):
            rows = np.stack([eighths(*expected[i].shape, seed=k) for k in range(4)])
            store[str(i)], expected[i] = rows, rows.sum(axis=0, dtype=np.float32) / 4
    fresh, _ = trained(seed=1, verdict_momentum=0.5)
    fresh.load_own_variables(store)
    assert_equal([numbers(v) for v in fresh.variables], expected)
    assert len(kinds) == 2 + 2 * len(xs)


@everywhere
def test_set_weights() -> None:
    """Keras' own way to hand the state on."""
    (optimizer, xs), (other, ys) = trained(verdict_momentum=0.5), trained(seed=2, verdict_momentum=0.5)
    other.set_weights([numbers(v) for v in optimizer.variables])
    for x, y in zip(xs, ys, strict=True):
        y.assign(x)
    assert_equal(train(other, gradients(2), ys), train(optimizer, gradients(2), xs))
    assert_equal([numbers(v) for v in other.variables], [numbers(v) for v in optimizer.variables])
