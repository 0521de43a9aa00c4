"""A training with `orthogonalize=True` goes on bit for bit from every file, and from none of other matrices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from signsgd_keras import Signum
from tests.clusters import Cluster

from .backends import BACKENDS, Array, assert_equal, everywhere, numbers, train, variables
from .orthogonal import SETTINGS, gradients, parameters
from .test_optimizer_saving import Store, batches, fresh, state

__all__ = ["fresh"]  # a fixture

FULL: dict[str, Any] = {
    "learning_rate": 0.02,
    "orthogonalize": True,
    "exclude_layers": ["output"],
    "other_learning_rate": 0.007,
    "ns_steps": 4,
    "ns_coefficients": (3.0, -4.0, 2.0),
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_momentum": 0.5,
}
"""After an odd number of batches half a mean is in the accumulators."""


def model_of(**settings: Any) -> Any:
    parts = [
        keras.Input((4,)),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.Dense(1, name="output"),
    ]
    model = keras.Sequential(parts)
    model.compile(optimizer=Signum(**{**FULL, **settings}), loss="mse")
    return model


def save_and_go_on(folder: str) -> list[Array]:
    keras.utils.set_random_seed(0)
    model = model_of()
    batches(model, 0, 5)
    model.save(f"{folder}/model.keras")
    model.save_weights(f"{folder}/model.weights.h5")
    batches(model, 5, 8)
    return state(model)


def load_and_go_on(folder: str) -> list[Array]:
    model = keras.saving.load_model(f"{folder}/model.keras")
    assert model.optimizer.other_lr_ratio == 0.007 / 0.02
    batches(model, 5, 8)
    return state(model)


def load_weights_and_go_on(folder: str) -> list[Array]:
    keras.utils.set_random_seed(1)
    model = model_of()
    batches(model, 2, 4)
    model.load_weights(f"{folder}/model.weights.h5")
    batches(model, 5, 8)
    return state(model)


@pytest.mark.parametrize("name", BACKENDS)
def test_training_goes_on_bit_for_bit(
    name: str,
    backend: Callable[[str], Cluster],
    fresh: Callable[[str], Cluster],
    tmp_path: Path,
) -> None:
    (expected,) = backend(name).run(save_and_go_on, str(tmp_path))
    process = fresh(name)
    for load in (load_and_go_on, load_weights_and_go_on):
        assert_equal(process.run(load, str(tmp_path))[0], expected)


@everywhere
def test_the_configuration_by_every_way() -> None:
    original = Signum(**FULL)
    for copy in (
        Signum.from_config(original.get_config()),
        keras.optimizers.deserialize(keras.optimizers.serialize(original)),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(original)),
    ):
        assert copy.get_config() == original.get_config()
        assert copy.ns_coefficients == (3.0, -4.0, 2.0)


@everywhere
def test_a_file_of_other_matrices_is_refused() -> None:
    """Of one shape and as many: nothing but the numbers of the matrices tells them apart."""
    trained = []
    for excluded in ("x1$", "x0$"):
        xs, optimizer = variables([parameters()[0]] * 2), Signum(**SETTINGS, exclude_layers=[excluded])
        train(optimizer, [[step[0][0], step[0][0]] for step in gradients()], xs)
        trained.append(optimizer)
    store = Store()
    trained[0].save_own_variables(store)
    before = [numbers(v) for v in trained[1].variables]
    with pytest.raises(ValueError, match="the saved Signum orthogonalized other variables than .* does: make it with"):
        trained[1].load_own_variables(store)
    assert_equal([numbers(v) for v in trained[1].variables], before)
    trained[0].load_own_variables(store)


def test_a_checkpoint_of_tensorflow(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = model_of()
    batches(model, 0, 5)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / "a"))
    batches(model, 5, 8)
    other = model_of()
    batches(other, 2, 4)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path).assert_consumed()
    batches(other, 5, 8)
    assert_equal(state(other), state(model))


def test_a_checkpoint_of_other_matrices_is_refused(tmp_path: Path) -> None:
    found = []
    for k in (0, 1):
        model = model_of()
        name = model.layers[k].name
        model.compile(optimizer=Signum(**{**FULL, "exclude_layers": ["output", name]}), loss="mse")
        batches(model, 0, 2)
        found.append(model)
    path = tf.train.Checkpoint(model=found[0], optimizer=found[0].optimizer).write(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="the saved Signum orthogonalized other variables than"):
        tf.train.Checkpoint(model=found[1], optimizer=found[1].optimizer).read(path)


PLAIN: dict[str, Any] = {"orthogonalize": False, "other_learning_rate": None, "verdict_momentum": 0.8}


@pytest.mark.parametrize("both", [(PLAIN, {}), ({}, PLAIN)], ids=["plain saved", "orthogonalized saved"])
def test_a_checkpoint_of_matrices_is_none_of_variables(both: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    """The same kinds of state, of all variables or of one kind each."""
    saved, loading = (model_of(**settings) for settings in both)
    for model in (saved, loading):
        batches(model, 0, 2)
    path = tf.train.Checkpoint(model=saved, optimizer=saved.optimizer).write(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="the saved Signum orthogonalized other variables than"):
        tf.train.Checkpoint(model=loading, optimizer=loading.optimizer).read(path)
