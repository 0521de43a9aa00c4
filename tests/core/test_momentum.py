from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core import (
    check_betas,
    direction,
    finite,
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
    monkeypatch.setattr("signsgd_core.momentum._WARMUP_SEARCH_LIMIT", 1000)
    with pytest.raises(ValueError, match=r"^beta=0\.999 would need over 1000 warmup steps"):
        warmup_steps(0.999)


@pytest.mark.parametrize("betas", [(0, 0), (0.9, 0.99), [0.5, 0.25], np.array([0.0, 0.75])])
def test_good_betas(betas: object) -> None:
    checked = check_betas(betas)
    assert checked == tuple(np.asarray(betas).tolist())
    assert [type(beta) for beta in checked] == [float, float]


@pytest.mark.parametrize("betas", [(1.2, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -1e-9), (float("nan"), 0.9)])
def test_betas_out_of_range(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="betas") as error:
        check_betas(betas)
    assert str(error.value) == f"betas must lie in [0, 1), got {betas}"


@pytest.mark.parametrize("betas", [0.9, None, (0.9,), (0.9, 0.9, 0.9), ("a", "b"), (None, 0.9)])
def test_betas_that_are_no_pair(betas: object) -> None:
    with pytest.raises(ValueError, match=r"^betas must be a pair of numbers such as \(0\.9, 0\.9\), got "):
        check_betas(betas)


def _allowed(beta: float, c: int) -> bool:
    exact = Fraction(beta)
    settled = Fraction(c, 2) * exact**c <= 1 / ((1 - exact**2) * (c + 1))
    return settled and exact ** (c + 1) <= Fraction(1, 2)
