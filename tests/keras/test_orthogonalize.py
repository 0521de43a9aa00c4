"""`Signum(orthogonalize=True)` with one replica is the specification's, on every backend."""

from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest

from signsgd_core import NS_COEFFICIENTS, TILE, polar
from signsgd_keras import Signum
from tests.tiers import nightly_where

from .backends import Array, assert_equal, eighths, everywhere, everywhere_jax_nightly, numbers, train, variables
from .orthogonal import LR, MATRICES, RATIO, SETTINGS, SHAPES, Judge, gradients, parameters
from .test_optimizer import COMPILED
from .test_optimizer_fit import losses, model_of, policy

FAMILY: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.5, "zeros": "alternate", "warmup_steps": 2},
    {"weight_decay": 0.25, "zeros": "positive", "betas": (0.0, 0.0), "verdict_momentum": 0.0},
)


def signum(**settings: Any) -> Signum:
    if "betas" in settings:
        settings["beta_1"], settings["beta_2"] = settings.pop("betas")
    return Signum(**{**SETTINGS, **settings})


@everywhere
@pytest.mark.parametrize("settings", nightly_where(lambda one: "warmup_steps" in one, FAMILY), ids=str)
def test_is_the_specifications(settings: dict[str, Any]) -> None:
    """Operation by operation and compiled."""
    for compiled in (None, *COMPILED[keras.backend.backend()]):
        optimizer, xs, judge = signum(**settings), variables(parameters()), Judge(**settings)
        optimizer.build(xs)
        take = compiled and compiled(optimizer, xs)
        for ((*step,),) in gradients():
            if take is None:
                train(optimizer, [step], xs)
            else:
                take([keras.ops.convert_to_tensor(g) for g in step])
            judge.step([step])
            judge.check([numbers(x) for x in xs])
        names = [path.split("/")[-1] for path in optimizer.orthogonalized]
        assert names == [f"x{k}" for k in MATRICES]


@everywhere_jax_nightly
def test_accumulation_and_an_average_are_as_without() -> None:
    optimizer, xs, judge = signum(gradient_accumulation_steps=2, use_ema=True), variables(parameters()), Judge()
    steps = gradients(6)
    for t, ((*step,),) in enumerate(steps):
        train(optimizer, [step], xs)
        if t % 2:
            judge.step([[(a + b) / 2 for a, b in zip(steps[t - 1][0], step, strict=True)]])
        judge.check([numbers(x) for x in xs])


@everywhere
def test_gradients_are_clipped_before() -> None:
    optimizer, xs, judge = signum(clipvalue=0.25), variables(parameters()), Judge()
    for ((*step,),) in gradients():
        train(optimizer, [step], xs)
        judge.step([[np.clip(g, -0.25, 0.25) for g in step]])
    judge.check([numbers(x) for x in xs])


@everywhere
@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (4, 4), (2, 2, 4, 5), (4, 1), (3, 0), (4, 4, 3)], ids=str)
def test_polar_factor(shape: tuple[int, ...]) -> None:
    """That of the first direction, whatever its size; of zeros the zero rule's."""
    g = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    optimizer = signum(zeros="positive")
    x = keras.Variable(np.zeros(shape, np.float32), name="x")
    optimizer.build([x])
    factor: Any = optimizer.slot(x).update.polar
    rows_first = np.moveaxis(g, -1, 0)
    expected = np.moveaxis(polar(rows_first), 0, -1)
    for size in (1.0, 1e30, 1e-30):
        found = numbers(factor(keras.ops.convert_to_tensor(np.float32(size) * g)))
        np.testing.assert_allclose(found, expected, atol=2e-5)
    zeros = factor(keras.ops.zeros(shape))
    assert not numbers(zeros).any()
    assert keras.backend.standardize_dtype(zeros.dtype) == "float32"


@everywhere
def test_columns_of_dead_units_are_zeros() -> None:
    """The others are as if there were none."""
    g = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    g[:, 1::2] *= np.float32(2.0**-60)
    optimizer = signum()
    x = keras.Variable(np.zeros(g.shape, np.float32), name="x")
    optimizer.build([x])
    factor: Any = optimizer.slot(x).update.polar
    found = numbers(factor(keras.ops.convert_to_tensor(g)))
    assert not found[:, 1::2].any()
    np.testing.assert_allclose(found, polar(g.T).T, atol=2e-5)


@everywhere
def test_a_matrix_of_several_tiles() -> None:
    """A backend that works on tiles takes it whole."""
    start: list[Array] = [eighths(256, 2 + TILE // 256)]
    xs, optimizer, judge = variables(start), signum(), Judge(start=start, matrices=[0])
    for t in range(2):
        g = np.random.default_rng(t).standard_normal(start[0].shape).astype(np.float32)
        train(optimizer, [[g]], xs)
        judge.step([[np.asarray(g, np.float32)]])
    judge.check([numbers(x) for x in xs])


@everywhere
def test_other_newton_schulz() -> None:
    x = keras.Variable(np.zeros((4, 3), np.float32), name="x")
    optimizer = signum(ns_steps=2, ns_coefficients=[1.5, -0.5, 0.0])
    optimizer.build([x])
    g: Array = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    factor: Any = optimizer.slot(x).update.polar
    found = numbers(factor(keras.ops.convert_to_tensor(g)))
    np.testing.assert_allclose(found, polar(g.T, 2, (1.5, -0.5, 0.0)).T, atol=1e-6)
    assert np.abs(found - polar(g.T, 5, NS_COEFFICIENTS).T).max() > 0.01


@everywhere
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_variables_round_once(dtype: str) -> None:
    """The polar factor and the momentum are float32, so every verdict is that of float32 variables."""
    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    optimizer, xs = signum(weight_decay=0.25), variables(parameters(), dtype)
    whole, ys = signum(weight_decay=0.25), variables(parameters())
    for ((*step,),) in gradients(3):
        for y, x in zip(ys, xs, strict=True):
            y.assign(numbers(x).astype(np.float32))
        train(optimizer, [step], xs)
        train(whole, [step], ys)
        for x, y in zip(xs, ys, strict=True):
            np.testing.assert_array_equal(numbers(x).astype(half), numbers(y).astype(half))
    assert {keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables[2:]} == {"float32"}


@everywhere
def test_state_is_what_the_settings_need() -> None:
    for settings, kinds in (
        ({}, ["momentum", "verdict_momentum"]),
        ({"beta_1": 0.0}, ["verdict_momentum"]),
        ({"verdict_momentum": 0.0}, ["momentum"]),
        ({"beta_1": 0.0, "verdict_momentum": 0.0}, []),
    ):
        optimizer, xs = signum(**settings, name="vote"), variables(parameters())
        optimizer.build(xs)
        expected = [f"vote/x{k}_{kind}" for kind in kinds for k in range(len(SHAPES))]
        assert [v.path for v in optimizer.variables] == ["vote/iteration", "vote/learning_rate", *expected]


@everywhere
def test_whatever_changes_the_rate_changes_both() -> None:
    """A rate that is set, a schedule, and a callable; each in the proportion that was given."""
    rates = [LR, LR / 2, LR / 4, LR / 4]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], rates[:3])
    given = iter(rates)
    for rate in (None, schedule, lambda: keras.ops.convert_to_tensor(next(given))):
        proportion = {"other_learning_rate": None, "other_lr_ratio": RATIO, "learning_rate": rate}
        optimizer = signum(**({} if rate is None else proportion))
        xs, judge = variables(parameters()), Judge()
        for lr, ((*step,),) in zip(rates, gradients(4), strict=True):
            if rate is None:
                optimizer.learning_rate = lr
            train(optimizer, [step], xs)
            judge.step([step], lr)
            judge.check([numbers(x) for x in xs])


@everywhere
def test_a_schedule_needs_the_proportion_itself() -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.5, 10)
    with pytest.raises(ValueError, match=r"other_learning_rate=0.25 needs a learning_rate above 0 .* other_lr_ratio"):
        signum(learning_rate=schedule, other_learning_rate=0.25)


@everywhere
def test_the_configuration_keeps_the_proportion() -> None:
    """Also where the rate is 0 by then, and where a quotient of rates would round to another."""
    original = signum(learning_rate=0.1, other_learning_rate=0.03)
    original.learning_rate = 0.0
    copy = Signum.from_config(original.get_config())
    copy.learning_rate = original.learning_rate = 0.07
    start = [variables(parameters()) for _ in range(2)]
    ends = [train(one, [g for (g,) in gradients()], xs) for one, xs in zip((original, copy), start, strict=True)]
    assert_equal(*ends)
    assert copy.get_config() == {**original.get_config(), "learning_rate": copy.get_config()["learning_rate"]}


@everywhere_jax_nightly
@pytest.mark.parametrize(
    "precision",
    [
        "mixed_float16",
        "bfloat16",
        pytest.param("float32", marks=pytest.mark.nightly),
        pytest.param("mixed_bfloat16", marks=pytest.mark.nightly),
    ],
)
def test_it_learns_in_every_precision(precision: str) -> None:
    with policy(precision):
        history = losses(model_of(Signum(0.05, orthogonalize=True)), epochs=8)
    assert history[-1] < 0.6 * history[0]


@everywhere
def test_settings_may_change_between_steps() -> None:
    optimizer, xs, judge = signum(), variables(parameters()), Judge()
    for t, ((*step,),) in enumerate(gradients()):
        if t == 2:
            optimizer.beta_1, optimizer.other_lr_ratio = 0.25, 2 * RATIO
            judge.references[True].betas, judge.ratio = (0.25, 0.75), 2 * RATIO
        train(optimizer, [step], xs)
        judge.step([step])
    judge.check([numbers(x) for x in xs])
