"""`GeometryMonitor` with one replica, on every backend: its figures are those of gradients worked out by NumPy."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_core.analysis.geometry import NAMES, Moments, density, figures, sample
from signsgd_keras import GeometryMonitor, Signum
from signsgd_keras.backend import current

from .backends import Array, assert_equal, everywhere, everywhere_jax_nightly, numbers
from .models import compiled, data, net

STEPS, ROWS, PARAMETERS = 8, 4, 19
"""Of an epoch, with so many rows each."""


def gradients(x: Array, y: Array) -> Array:
    """Of `net` at its start, those of each batch in one row, float64."""
    w1, b1, w2, b2 = (numbers(v).astype(np.float64) for v in net().trainable_variables)
    found = []
    for first in range(0, len(x), ROWS):
        rows, target = x[first : first + ROWS], y[first : first + ROWS]
        hidden = np.maximum(rows @ w1 + b1, 0)
        error = 2 * (hidden @ w2 + b2 - target) / ROWS
        back = error @ w2.T * (hidden > 0)
        parts = (rows.T @ back, back.sum(0), hidden.T @ error, error.sum(0))
        found.append(np.concatenate([part.ravel() for part in parts]))
    return np.array(found)


def at(coordinates: int) -> Array:
    """Which coordinates of `net` are looked at."""
    starts = np.cumsum([0, 12, 3, 3])
    return np.concatenate([part + k for part, k in zip(sample([12, 3, 3, 1], coordinates), starts, strict=True)])


def fit(model: Any, monitor: GeometryMonitor, *callbacks: Any, epochs: int = 2, batches: Any = None) -> Any:
    x, y = batches or data(STEPS * ROWS)
    options: dict[str, Any] = {"batch_size": ROWS, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(x, y, callbacks=[monitor, *callbacks], **options)


def assert_record(record: dict[str, Any], rows: Array, curvature: float = math.nan) -> None:
    assert record["samples"] == len(rows)
    for name, value in figures(Moments.of(rows), curvature).items():
        expected = None if math.isnan(value) else pytest.approx(value, rel=1e-4, abs=1e-6)
        assert record[name] == expected, name


def records(monitor: GeometryMonitor) -> list[dict[str, Any]]:
    assert monitor.report is not None
    return monitor.report.records


def _optimizer(name: str) -> Any:
    plain = {"SGD": keras.optimizers.SGD, "Adam": keras.optimizers.Adam, "Signum": Signum}
    if name in plain:
        return plain[name](learning_rate=0.0)
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=8.0)


@everywhere
@pytest.mark.parametrize("name_of_optimizer", ["Adam", "SGD", "Signum", "LossScaleOptimizer"])
def test_figures(name_of_optimizer: str) -> None:
    """Twice in two epochs: the first 4 of each 6 steps, 9 of 19 parameters."""
    monitor = GeometryMonitor(every_n_steps=6, samples=4, coordinates=9, directory=None)
    history = fit(compiled(_optimizer(name_of_optimizer)), monitor).history
    seen = np.tile(gradients(*data(STEPS * ROWS)), (2, 1))[:, at(9)]
    assert [record["step"] for record in records(monitor)] == [6, 12]
    for record, first in zip(records(monitor), (0, 6), strict=True):
        assert_record(record, seen[first : first + 4])
    for name in NAMES:
        assert history[name] == [pytest.approx(record[name] or math.nan, nan_ok=True) for record in records(monitor)]


@everywhere
@pytest.mark.parametrize("settings", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}])
def test_however_the_step_is_run(settings: dict[str, Any]) -> None:
    if keras.backend.backend() == "torch" and settings.get("jit_compile"):
        return  # takes a compiler of C++, which not every machine has
    monitor = GeometryMonitor(every_n_steps=8, samples=8, directory=None)
    fit(compiled(_optimizer("SGD"), **settings), monitor)
    for record in records(monitor):
        assert_record(record, gradients(*data(STEPS * ROWS)))
    assert len(records(monitor)) == 2


@everywhere
def test_several_steps_at_once() -> None:
    """All of them are seen; one that is not the last of its call is reckoned to it."""
    if keras.backend.backend() == "torch":
        return  # Keras refuses
    monitor = GeometryMonitor(every_n_steps=3, samples=3, directory=None)
    fit(compiled(_optimizer("SGD"), steps_per_execution=4), monitor)
    assert [record["step"] for record in records(monitor)] == [4, 8, 12, 16]
    seen = gradients(*data(STEPS * ROWS))
    for k, record in enumerate(records(monitor)):
        first = 4 * (k % 2)
        assert_record(record, seen[first : first + 3])


def test_a_loop_of_ones_own_that_tells_callbacks_no_params() -> None:
    model, monitor = compiled(_optimizer("SGD")), GeometryMonitor(8, 8, directory=None)
    callbacks = keras.callbacks.CallbackList([monitor], model=model)
    callbacks.on_train_begin()
    for _ in range(3):
        model.train_on_batch(*data(ROWS))
    callbacks.on_train_end()
    assert [record["samples"] for record in records(monitor)] == [3]


def test_two_of_one_fit_see_the_same() -> None:
    model, monitors = compiled(_optimizer("SGD")), [GeometryMonitor(8, 8, directory=None) for _ in range(2)]
    for _ in range(2):  # the second time they replace nothing but themselves
        fit(model, *monitors)
        assert len(records(monitors[0])) == 2
        assert records(monitors[0]) == records(monitors[1])
        assert "apply" not in vars(model.optimizer)


@everywhere_jax_nightly
def test_where_gradients_are_accumulated_a_step_is_an_update() -> None:
    """Of 2 batches, in the midst of an epoch, too; of 6 single gradients the first 3 are looked at."""
    monitor = GeometryMonitor(every_n_steps=3, samples=3, directory=None)
    fit(compiled(Signum(0.0, gradient_accumulation_steps=2)), monitor)
    assert [record["step"] for record in records(monitor)] == [3, 6]
    seen = np.tile(gradients(*data(STEPS * ROWS)), (2, 1))
    for record, first in zip(records(monitor), (0, 6), strict=True):
        assert_record(record, seen[first : first + 3])


@everywhere_jax_nightly
def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    x, y = data(STEPS * ROWS)
    y[2 * ROWS] = np.nan
    monitor = GeometryMonitor(every_n_steps=8, samples=8, directory=None)
    fit(compiled(Signum(0.0)), monitor, epochs=1, batches=(x, y))
    assert_record(records(monitor)[0], np.delete(gradients(x, y), 2, axis=0))


@everywhere_jax_nightly
def test_steps_that_a_loss_scale_skips_do_not_count() -> None:
    """Nor is there a record of a stretch without a gradient."""
    x, y = data(STEPS * ROWS)
    y[::ROWS] = np.nan
    monitor = GeometryMonitor(every_n_steps=2, samples=2, directory=None)
    history = fit(compiled(_optimizer("LossScaleOptimizer")), monitor, epochs=1, batches=(x, y)).history
    assert records(monitor) == []
    assert np.isnan([history[name] for name in NAMES]).all()


@everywhere
def test_what_is_still_being_computed_is_waited_for() -> None:
    if keras.backend.backend() != "jax":
        return  # the others wait by themselves
    import jax

    place = current().gradient_rows(None, 40, 3)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: x @ x, x))
    put = jax.jit(lambda x: place.put(lambda: x[0, :3]))
    for _ in range(10):
        put(slow(np.eye(300, dtype=np.float32)))
        assert place.take()[0].tolist() == [[1.0, 0.0, 0.0]]


class _Idle(keras.layers.Layer):  # type: ignore[misc]
    """Has a weight that nothing depends on."""

    def build(self, shape: Any) -> None:
        self.idle = self.add_weight(shape=(5,), initializer="ones", name="idle")

    def call(self, inputs: Any) -> Any:
        return inputs


@everywhere_jax_nightly
def test_a_parameter_without_a_gradient_has_zeros() -> None:
    model, monitor = net(), GeometryMonitor(every_n_steps=8, samples=8, directory=None)
    model.add(_Idle())
    fit(compiled(_optimizer("SGD"), lambda: model), monitor, epochs=1)
    assert_record(records(monitor)[0], np.pad(gradients(*data(STEPS * ROWS)), [(0, 0), (0, 5)]))


@everywhere
@pytest.mark.parametrize("first", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_training_is_the_same_and_the_optimizer_as_before(first: bool) -> None:
    """Bit for bit, and also where the step was traced before; a later `fit` is not looked at."""
    x, y = data(STEPS * ROWS)
    ends = []
    for watched in (False, True):
        keras.utils.set_random_seed(1)
        model = compiled(keras.optimizers.Adam(0.05))
        monitor = GeometryMonitor(2, 2, curvature_loss=_cubic, directory=None)
        for watch in (watched and first, watched, False):
            model.fit(x, y, batch_size=ROWS, verbose=0, callbacks=[monitor] if watch else [])
            assert "apply" not in vars(model.optimizer)
        if watched:
            assert len(records(monitor)) == STEPS // 2
            assert monitor._rows.take()[0].size == 0
        ends.append([numbers(v) for v in (*model.trainable_variables, *model.optimizer.variables)])
    assert_equal(*ends)


def _cubic(model: Any) -> Any:
    """Has the Hessian w, 2·w, 3·w, … on its diagonal, w the first kernel, and nothing else."""
    kernel = keras.ops.reshape(model.trainable_variables[0], (-1,))
    return keras.ops.sum(keras.ops.arange(1, 13, dtype="float32") * kernel**3) / 6


@everywhere
def test_curvature_of_a_diagonal() -> None:
    """In the midst of an epoch, when JAX' training loop has the variables."""
    monitor = GeometryMonitor(3, 3, coordinates=9, curvature_loss=_cubic, directory=None)
    fit(compiled(_optimizer("SGD")), monitor, epochs=1)
    diagonal = np.pad(np.arange(1, 13) * numbers(net().trainable_variables[0]).ravel(), [(0, 7)])
    seen = gradients(*data(STEPS * ROWS))[:, at(9)]
    assert [record["step"] for record in records(monitor)] == [3, 6]
    for record, first in zip(records(monitor), (0, 3), strict=True):
        assert_record(record, seen[first : first + 3], density(diagonal[at(9)]))


@everywhere
def test_products_with_a_hessian() -> None:
    """Of `(½·wᵀ A w)` for a dense A, and of a loss without curvature."""
    random = np.random.default_rng(0)
    a, z = random.normal(size=(12, 12)).astype(np.float32), random.normal(size=(4, 3)).astype(np.float32)
    model = compiled(keras.optimizers.SGD())
    variables = model.trainable_variables[:2]
    tensors = [keras.ops.convert_to_tensor(each) for each in (z, np.ones(3, np.float32))]

    def curved(model: Any) -> Any:
        w = keras.ops.reshape(model.trainable_variables[0], (1, -1))
        return keras.ops.sum(w @ keras.ops.convert_to_tensor(a) @ keras.ops.transpose(w)) / 2

    product = current().hessian_product
    bent, none = product(curved, model, variables)(tensors)
    np.testing.assert_allclose(numbers(bent).ravel(), (a + a.T) / 2 @ z.ravel(), rtol=1e-4, atol=1e-5)
    for flat in (none, *product(lambda model: keras.ops.sum(model.trainable_variables[0]), model, variables)(tensors)):
        assert flat is None or not numbers(flat).any()


def test_files_logs_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = GeometryMonitor(12, 8, directory=tmp_path / "of" / "run")
    fit(compiled(_optimizer("SGD")), monitor, keras.callbacks.CSVLogger(str(tmp_path / "log.csv")))
    with (tmp_path / "log.csv").open() as file:
        first, second = csv.DictReader(file)
    assert [math.isnan(float(first[name])) for name in NAMES] == [True] * len(NAMES)
    assert float(second["geometry/signal"]) == pytest.approx(records(monitor)[0]["geometry/signal"])
    document = json.loads((tmp_path / "of" / "run" / "geometry.json").read_text())
    assert (document["workers"], document["parameters"], document["coordinates"]) == (1, PARAMETERS, PARAMETERS)
    assert document["records"] == records(monitor)
    assert (tmp_path / "of" / "run" / "geometry.png").stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    for beginning in ("Signs", "Workers: ", "Momentum: ", "Noise: ", "Matrices: "):
        assert any(line.startswith(beginning) for line in lines)


def test_a_run_shorter_than_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is looked at as far as it goes, and none of a single step; without a directory nothing is written."""
    monkeypatch.chdir(tmp_path)
    monitor = GeometryMonitor(directory=None)
    fit(compiled(_optimizer("SGD")), monitor, epochs=1)
    assert_record(records(monitor)[0], gradients(*data(STEPS * ROWS)))
    assert "Momentum: " in capsys.readouterr().out
    fit(compiled(_optimizer("SGD")), monitor, epochs=1, batches=data(ROWS))
    assert records(monitor) == []
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 1}, "every_n_steps must be a whole number of 2 or more, got 1"),
        ({"samples": 1}, "samples must be a whole number of 2 or more, got 1"),
        ({"samples": 300}, "samples must be at most every_n_steps=200, got 300"),
        ({"coordinates": 0.5}, "coordinates must be a whole number of 1 or more, got 0.5"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometryMonitor(**settings)


def test_no_optimizer() -> None:
    with pytest.raises(RuntimeError, match="no gradients to look at: compile the model with an optimizer"):
        fit(compiled(None), GeometryMonitor())
