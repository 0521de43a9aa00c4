"""A training with `orthogonalize=True` goes on bit for bit from every file, and from none of other matrices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from signsgd_keras import Signum
from tests.clusters import Cluster
from tests.tiers import nightly_where

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


@pytest.mark.parametrize("name", nightly_where(lambda name: name == "jax", BACKENDS))
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
def test_a_file_of_other_matrices_is_one_of_momenta() -> None:
    """What a momentum is does not depend on whether its variable is orthogonalized."""
    store, trained = Store(), []
    for excluded in ("x1$", "x0$"):
        xs, optimizer = variables([parameters()[0]] * 2), Signum(**SETTINGS, exclude_layers=[excluded])
        train(optimizer, [[step[0][0], step[0][0]] for step in gradients()], xs)
        trained.append(optimizer)
    trained[0].save_own_variables(store)
    trained[1].load_own_variables(store)
    assert_equal(*([numbers(v) for v in optimizer.variables] for optimizer in trained))


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
