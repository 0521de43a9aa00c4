"""Another optimizer's state is refused before anything changes, in every way there is to load one; ours still loads."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_keras import LossScaleOptimizer, Signum

from .backends import everywhere, numbers
from .models import arrays, compiled, components, data, same

ALONE = "nothing was loaded into the optimizer. To take the model's weights alone, load them before compile() gives it"
BOTH: dict[str, Any] = {"beta_1": 0.5, "beta_2": 0.5, "verdict_momentum": 0.5}
ONE: dict[str, Any] = {"beta_1": 0.5, "beta_2": 0.5}
THEIRS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    # each has as many variables as the Signum that it is given to
    "Adam": (lambda: keras.optimizers.Adam(0.25), BOTH),
    "AdamW": (lambda: keras.optimizers.AdamW(0.25), BOTH),
    "Lion": (lambda: keras.optimizers.Lion(0.25), ONE),
    "SGD": (lambda: keras.optimizers.SGD(0.25, momentum=0.5), ONE),
    "RMSprop": (lambda: keras.optimizers.RMSprop(0.25), ONE),
    "Adagrad": (lambda: keras.optimizers.Adagrad(0.25), {"beta_1": 0.0, "beta_2": 0.0, "verdict_momentum": 0.5}),
}


def trained(optimizer: Any) -> Any:
    """Step by step: what is saved is the same, and nothing need be compiled."""
    model = compiled(optimizer, run_eagerly=True)
    model.fit(*data(12), batch_size=6, shuffle=False, verbose=0)
    return model


@cache
def trained_by(name: str) -> Any:
    """One model for all tests, which only save it."""
    return trained(THEIRS[name][0]())


def built(optimizer: Any) -> Any:
    model = compiled(optimizer)
    model.optimizer.build(model.trainable_variables)
    return model


def state(optimizer: Any) -> list[Any]:
    return [numbers(v) for v in optimizer.variables]


WAYS: dict[str, Callable[[Path, Any, Any], Any]] = {
    "weights.h5": lambda folder, saved, model: (
        saved.save_weights(folder / "a.weights.h5"),
        model.load_weights(folder / "a.weights.h5"),
    ),
    "keras": lambda folder, saved, model: (saved.save(folder / "a.keras"), model.load_weights(folder / "a.keras")),
    "tf.train.Checkpoint": lambda folder, saved, model: tf.train.Checkpoint(optimizer=model.optimizer).restore(
        tf.train.Checkpoint(optimizer=saved.optimizer).save(folder / "a")
    ),
    "BackupAndRestore": lambda folder, saved, model: (
        saved.save_weights(folder / "latest.weights.h5"),
        model.fit(*data(12), verbose=0, callbacks=[keras.callbacks.BackupAndRestore(folder)]),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("way", WAYS)
def test_another_optimizers_state_is_refused_by_its_name(way: str, name: str, tmp_path: Path) -> None:
    saved, model = trained_by(name), built(Signum(0.125, **THEIRS[name][1]))
    before = state(model.optimizer)
    assert len(before) == len(saved.optimizer.variables)
    sentence = f"looks like that of keras.optimizers.{name}, whose numbers mean nothing to Signum: {ALONE}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        WAYS[way](tmp_path, saved, model)
    assert same(before, state(model.optimizer))


def test_a_rate_and_a_count_alone_are_refused_too(tmp_path: Path) -> None:
    """SGD without momentum has what a Signum has that is not built yet."""
    trained(keras.optimizers.SGD(0.25)).save_weights(tmp_path / "a.weights.h5")
    model = compiled(Signum(0.125))
    with pytest.raises(ValueError, match="looks like that of keras.optimizers.SGD"):
        model.load_weights(tmp_path / "a.weights.h5")
    assert state(model.optimizer) == [0, 0.125]


def test_the_weights_alone_as_the_sentence_says(tmp_path: Path) -> None:
    saved = trained_by("Adam")
    saved.save_weights(tmp_path / "a.weights.h5")
    saved.save(tmp_path / "a.keras")
    checkpoint = tf.train.Checkpoint(model=saved, optimizer=saved.optimizer).save(tmp_path / "a")
    first, second = (keras.models.clone_model(saved) for _ in range(2))
    first.load_weights(tmp_path / "a.weights.h5")
    tf.train.Checkpoint(model=second).restore(checkpoint).expect_partial()
    for model in (first, second, keras.models.load_model(tmp_path / "a.keras", compile=False)):
        assert same(arrays(model.weights), arrays(saved.weights))
        model.compile(Signum(0.125), "mse", run_eagerly=True)
        model.fit(*data(12), verbose=0)


@everywhere
def test_a_store_that_does_not_tell_is_taken_with_a_warning() -> None:
    """As any store but Keras' h5 files, of Lion as of an earlier Signum."""
    saved, model, store = trained_by("Lion"), built(Signum(0.125, **ONE)), dict[str, Any]()
    saved.optimizer.save_own_variables(store)
    with pytest.warns(UserWarning, match="nothing tells which optimizer wrote the state that is loaded into 'signum"):
        model.optimizer.load_own_variables(store)
    assert same(state(model.optimizer), state(saved.optimizer))


@everywhere
def test_what_lies_by_twos_is_adams() -> None:
    saved, model, store = trained_by("Adam"), built(Signum(0.125, **BOTH)), dict[str, Any]()
    saved.optimizer.save_own_variables(store)
    before = state(model.optimizer)
    with pytest.raises(ValueError, match=re.escape(f"look like the state of Adam or its kin: {ALONE}")):
        model.optimizer.load_own_variables(store)
    assert same(before, state(model.optimizer))


@everywhere
@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_an_array_that_is_no_verdict_momentum(value: float) -> None:
    """Of one variable the order of arrays tells nothing; their size may."""
    x = keras.Variable(np.ones(3, np.float32))
    optimizer = Signum(0.125, **BOTH)
    optimizer.build([x])
    before = state(optimizer)
    store = {"0": np.int64(3), "1": np.float32(0.25), "2": np.ones(3, np.float32), "3": np.full(3, value, np.float32)}
    with pytest.raises(ValueError, match=f"reaches {value:g}, and a verdict momentum lies in \\[-1, 1\\]"):
        optimizer.load_own_variables(store)
    assert same(before, state(optimizer))


@pytest.mark.parametrize("name", [None, "vote"])
@pytest.mark.parametrize("settings", [ONE, BOTH, {**BOTH, "use_ema": True, "gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.filterwarnings("error:nothing tells:UserWarning")
def test_a_file_of_an_earlier_version_loads(settings: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    """It had no mark, and the name of its optimizer as ever."""
    saved = trained(Signum(0.125, name=name, **settings))
    saved.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "a") as file:
        del file["optimizer/vars/signum"]
        assert file["optimizer/vars"].attrs["name"] == saved.optimizer.name
    model = built(Signum(0.5, name=name, **settings))
    model.load_weights(tmp_path / "a.weights.h5")
    assert same(state(model.optimizer), state(saved.optimizer))


def test_a_name_that_means_nothing_is_taken_with_a_warning(tmp_path: Path) -> None:
    """Of an unmarked file, as of an optimizer that is not Keras' own."""
    trained(keras.optimizers.Lion(0.25, name="sophia")).save_weights(tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match="nothing tells which optimizer wrote the state of 'sophia' that is loaded"):
        built(Signum(0.125, **ONE)).load_weights(tmp_path / "a.weights.h5")


SETTINGS: tuple[tuple[dict[str, Any], dict[str, Any], str, str], ...] = (
    (BOTH, ONE, "iteration, learning_rate, momentum, verdict_momentum", "iteration, learning_rate, momentum"),
    (ONE, BOTH, "iteration, learning_rate, momentum", "iteration, learning_rate, momentum, verdict_momentum"),
    (  # as many variables, of another kind
        {"beta_1": 0.0, "verdict_momentum": 0.5},
        ONE,
        "iteration, learning_rate, verdict_momentum",
        "iteration, learning_rate, momentum",
    ),
    (
        {"beta_1": 0.0, "gradient_accumulation_steps": 2},
        ONE,
        "iteration, learning_rate, gradient_accumulator",
        "iteration, learning_rate, momentum",
    ),
)


@pytest.mark.parametrize("way", ["weights.h5", "tf.train.Checkpoint"])
@pytest.mark.parametrize(("theirs", "ours", "kept", "keeps"), SETTINGS)
def test_a_signum_of_other_settings(
    theirs: dict[str, Any], ours: dict[str, Any], kept: str, keeps: str, way: str, tmp_path: Path
) -> None:
    saved, model = trained(Signum(0.125, **theirs)), built(Signum(0.5, name="mine", **ours))
    before = state(model.optimizer)
    sentence = f"the saved Signum kept {kept} and 'mine' keeps {keeps}: make it with the settings that were saved"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        WAYS[way](tmp_path, saved, model)
    assert same(before, state(model.optimizer))


def test_one_that_is_not_built_yet_says_what_to_do(tmp_path: Path) -> None:
    saved, model = trained(Signum(0.125, **ONE)), compiled(Signum(0.5, **ONE))
    with pytest.warns(UserWarning, match=re.escape("not built yet: call optimizer.build(model.trainable_variables)")):
        WAYS["weights.h5"](tmp_path, saved, model)
    assert state(model.optimizer) == [0, 0.5]
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "a.weights.h5")
    assert same(state(model.optimizer), state(saved.optimizer))


THEIR_SCALE, OUR_SCALE = keras.optimizers.LossScaleOptimizer, LossScaleOptimizer


@pytest.mark.parametrize("way", ["weights.h5", "tf.train.Checkpoint"])
@pytest.mark.parametrize(
    ("around", "ours"),
    [(THEIR_SCALE, OUR_SCALE), (lambda optimizer: optimizer, OUR_SCALE), (THEIR_SCALE, THEIR_SCALE)],
    ids=["scaled", "plain", "Keras' own"],
)
def test_within_a_loss_scale_optimizer(around: Any, ours: Any, way: str, tmp_path: Path) -> None:
    saved, model = trained(around(keras.optimizers.Lion(0.25))), built(ours(Signum(0.125, **ONE)))
    before, own = state(model.optimizer), way == "weights.h5" and ours is THEIR_SCALE
    with pytest.raises(ValueError, match="looks like that of keras.optimizers.Lion") as error:
        WAYS[way](tmp_path, saved, model)
    assert ("Keras' LossScaleOptimizer copies before it asks: make a new optimizer" in str(error.value)) == own
    assert same(before, state(model.optimizer)) != own


NO_SCALE = "had no LossScaleOptimizer around it: load its state into what is within this one; nothing was loaded"


def test_a_checkpoint_without_a_scale(tmp_path: Path) -> None:
    saved, model = trained(Signum(0.125, **ONE)), built(LossScaleOptimizer(Signum(0.5, **ONE)))
    before = state(model.optimizer)
    with pytest.raises(ValueError, match=NO_SCALE):
        WAYS["tf.train.Checkpoint"](tmp_path, saved, model)
    assert same(before, state(model.optimizer))
    tf.train.Checkpoint(optimizer=model.optimizer.inner_optimizer).restore(tf.train.latest_checkpoint(tmp_path))
    assert same(state(model.optimizer.inner_optimizer), state(saved.optimizer))


def test_adams_file_with_as_many_arrays_as_a_scale_and_a_signum(tmp_path: Path) -> None:
    """Four variables of the model: 2 + 2·4 = 6 + 4; what was at the place of the scale became one."""
    saved, model = trained(keras.optimizers.Adam(0.25, name="mine")), built(LossScaleOptimizer(Signum(0.125, **ONE)))
    before = state(model.optimizer)
    assert len(before) == len(saved.optimizer.variables) == 10
    with pytest.warns(UserWarning, match="Skipping variable loading"), pytest.raises(ValueError, match=NO_SCALE):
        WAYS["weights.h5"](tmp_path, saved, model)
    assert same(before, state(model.optimizer))


def test_two_players_in_one_checkpoint(tmp_path: Path) -> None:
    """A Signum and an Adam each get their own back."""
    saved = trained(Signum(0.125, **BOTH)), trained_by("Adam")
    path = tf.train.Checkpoint(a=saved[0].optimizer, b=saved[1].optimizer).save(tmp_path / "a")
    new = built(Signum(0.5, **BOTH)), built(keras.optimizers.Adam(0.5))
    tf.train.Checkpoint(a=new[0].optimizer, b=new[1].optimizer).restore(path).assert_consumed()
    for model, other in zip(new, saved, strict=True):
        assert same(*(([rows[0] for rows in components(m.optimizer.variables)]) for m in (model, other)))


@everywhere
def test_set_weights_of_another_number() -> None:
    model = built(Signum(0.125, **BOTH))
    before = state(model.optimizer)
    with pytest.raises(ValueError, match=r"has 10 variables, got 3 weights"):
        model.optimizer.set_weights(before[:3])
    assert same(before, state(model.optimizer))


def test_a_file_in_shards(tmp_path: Path) -> None:
    """Of a kilobyte each, so that one optimizer's state lies in several."""
    saved, model, theirs = trained(Signum(0.125, **BOTH)), built(Signum(0.5, **BOTH)), trained(keras.optimizers.Adam())
    for each in (saved, theirs):
        each.save_weights(tmp_path / f"{each.optimizer.name}.weights.json", max_shard_size=1e-7)
    assert len(list(tmp_path.glob("signum*.h5"))) > 3
    model.load_weights(tmp_path / f"{saved.optimizer.name}.weights.json")
    assert same(state(model.optimizer), state(saved.optimizer))
    with pytest.raises(ValueError, match="looks like that of keras.optimizers.Adam"):
        model.load_weights(tmp_path / f"{theirs.optimizer.name}.weights.json")
    assert same(state(model.optimizer), state(saved.optimizer))
