from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core import (
    decayed,
    direction,
    finite,
    redistribute,
    update_momentum,
    update_parameters,
    update_verdict_momentum,
    warmup_steps,
)

from .frameworks import FRAMEWORKS

AVERAGES = [direction, update_momentum, update_verdict_momentum]
"""Steps 2, 3 and 7 are one formula, ``β·old + (1−β)·new``."""

eighths = st.integers(-800, 800).map(lambda n: n / 8)
quarters = st.sampled_from([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("average", AVERAGES)
@given(old=eighths, new=eighths, beta=quarters)
def test_average(average: Callable[..., Any], old: float, new: float, beta: float) -> None:
    exact = Fraction(beta) * Fraction(old) + (1 - Fraction(beta)) * Fraction(new)
    assert Fraction(average(old, new, beta)) == exact


@given(x=eighths, u=eighths, decay=quarters, lr=st.sampled_from([0.0, 2.0**-10, 0.25, 1.0]))
def test_update_parameters(x: float, u: float, decay: float, lr: float) -> None:
    exact = Fraction(x) - Fraction(lr) * (Fraction(u) + Fraction(decay) * Fraction(x))
    assert Fraction(update_parameters(x, u, lr, decay)) == exact


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework(framework: str) -> None:
    """Dyadic numbers leave no room for rounding, so all frameworks must give exactly the same."""
    random = np.random.default_rng(0)
    old, new = random.integers(-80, 81, (2, 3, 5)).astype(np.float32) / 8
    a, b = FRAMEWORKS[framework](old), FRAMEWORKS[framework](new)
    for average in AVERAGES:
        result = np.asarray(average(a, b, 0.75))
        np.testing.assert_array_equal(result, (3 * old + new) / 4, strict=True)
    decayed, plain = update_parameters(a, b, 0.5, 0.25), update_parameters(a, b, 0.5, 0.0)
    np.testing.assert_array_equal(np.asarray(decayed), old - (4 * new + old) / 8, strict=True)
    np.testing.assert_array_equal(np.asarray(plain), old - new / 2, strict=True)
    np.testing.assert_array_equal(np.asarray(a), old)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finite(dtype: type[np.floating[Any]]) -> None:
    largest, smallest = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    gradient = np.array([[np.nan, np.inf, -np.inf, -2.0], [largest, -largest, smallest, 0.0]], dtype)
    before = gradient.copy()
    expected = np.array([[0.0, 0.0, 0.0, -2.0], [largest, -largest, smallest, 0.0]], dtype)
    np.testing.assert_array_equal(finite(gradient), expected, strict=True)
    np.testing.assert_array_equal(gradient, before)


@pytest.mark.parametrize(("beta", "steps"), [(0.5, 1), (0.8, 19), (0.9, 54), (0.95, 132), (0.99, 894)])
def test_warmup_steps(beta: float, steps: int) -> None:
    assert warmup_steps(beta) == steps


@pytest.mark.parametrize("beta", [k / 64 for k in range(63)])
def test_warmup_is_the_smallest_that_theorem_3_allows(beta: float) -> None:
    """In exact arithmetic; the first inequality holds, fails and holds again as C grows, so all smaller C must fail."""
    steps = warmup_steps(beta)
    assert _allowed(beta, steps)
    assert not any(_allowed(beta, smaller) for smaller in range(1, steps))


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_warmup_of_what_is_no_beta(beta: float) -> None:
    with pytest.raises(ValueError, match=r"^beta must lie in \[0, 1\), got "):
        warmup_steps(beta)


def test_warmup_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real limit takes seconds to reach."""
    monkeypatch.setattr("signsgd_core.update._WARMUP_SEARCH_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"^beta=0\.999 would need over 1000 warmup steps"):
        warmup_steps(0.999)


@given(x=eighths, u=eighths, decay=quarters, lr=st.sampled_from([0.0, 2.0**-10, 0.25, 1.0]))
def test_what_the_parameters_move_against(x: float, u: float, decay: float, lr: float) -> None:
    against = decayed(x, u, decay)
    assert Fraction(against) == Fraction(u) + Fraction(decay) * Fraction(x)
    assert update_parameters(x, u, lr, decay) == x - lr * against


def test_without_decay_the_parameters_are_not_read() -> None:
    """They may be infinite, or what does not multiply at all."""
    assert decayed(float("inf"), -1.0, 0.0) == -1.0
    assert decayed(None, 1.0, 0) == 1.0


@given(old=st.integers(1, 9), new=st.integers(1, 9))
def test_redistribute(old: int, new: int) -> None:
    """More workers: each new one takes that of old ``i mod M``. Fewer: the mean of the old ones it stands for."""
    momenta = np.random.default_rng(old).integers(-80, 81, (old, 3, 2)).astype(np.float32)
    before = momenta.copy()
    result = redistribute(momenta, new)
    assert result.shape == (new, 3, 2)
    assert result.dtype == np.float32
    for i in range(new):
        sources = [j for j in range(old) if j % new == i] if new < old else [i % old]
        np.testing.assert_allclose(result[i], sum(momenta[j] for j in sources) / np.float32(len(sources)), rtol=1e-6)
    np.testing.assert_array_equal(momenta, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_the_same_number_of_workers_keeps_every_bit(dtype: Any) -> None:
    momenta = np.array([[1, -2], [3, 0], [7, 5]], dtype)
    np.testing.assert_array_equal(redistribute(momenta, 3), momenta, strict=True)


def test_redistributed_scalars() -> None:
    """One momentum a worker, of a variable without axes."""
    np.testing.assert_array_equal(redistribute(np.array([1.0, 3.0]), 1), np.array([2.0]), strict=True)
    np.testing.assert_array_equal(redistribute(np.array([4.0]), 3), np.array([4.0, 4.0, 4.0]), strict=True)


def _allowed(beta: float, c: int) -> bool:
    exact = Fraction(beta)
    settled = Fraction(c, 2) * exact**c <= 1 / ((1 - exact**2) * (c + 1))
    return settled and exact ** (c + 1) <= Fraction(1, 2)
