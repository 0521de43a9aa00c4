"""Geometry: densities and moments against their formulas, figures of noises whose geometry is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from signsgd_core.analysis.geometry import NAMES, Moments, density, figures, sample

numbers = st.floats(-1e6, 1e6, width=32)


@given(arrays(np.float64, st.integers(1, 40), elements=numbers))
def test_a_density_is_between_one_coordinate_and_all(v: np.ndarray) -> None:
    if not v.any():
        assert math.isnan(density(v))
        return
    assert 1 / v.size - 1e-12 <= density(v) <= 1 + 1e-12
    assert density(-3 * v) == pytest.approx(density(v))


def test_densities_of_extreme_vectors() -> None:
    assert density(np.ones(1000)) == 1
    assert density(np.eye(1, 1000)) == pytest.approx(1e-3)
    assert density([1e300, 1e300]) == 1
    assert density([1e-300, 0, 0, 0]) == 0.25
    normal = np.random.default_rng(0).normal(size=1_000_000)
    assert density(normal) == pytest.approx(2 / math.pi, abs=0.003)  # E|z|² / E z²
    with pytest.raises(ValueError, match="at least one number"):
        density([])


@given(
    arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=st.floats(-100, 100)),
    st.integers(1, 11),
)
def test_moments_merge_into_those_of_all_samples(x: np.ndarray, at: int) -> None:
    at = min(at, len(x) - 1)
    whole, merged = Moments.of(x), Moments.of(x[:at]).merge(Moments.of(x[at:]))
    assert merged.count == len(x)
    scale = np.abs(x).max() + 1
    for power, name in enumerate(("mean", "second", "third", "fourth"), 1):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-10 * scale**power)


def test_moments_one_sample_at_a_time() -> None:
    x = np.random.default_rng(1).gamma(2.0, size=(500, 3)) + 1e4
    streamed = Moments.of(x[:1])
    for row in x[1:]:
        streamed = streamed.merge(Moments.of(row[None]))
    deviations = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(streamed.mean, x.mean(0))
    np.testing.assert_allclose(streamed.variance, x.var(0, ddof=1))
    np.testing.assert_allclose(streamed.skewness, (deviations**3).mean(0), rtol=1e-6)
    kurtosis = (deviations**4).mean(0)
    np.testing.assert_allclose(streamed.bimodality, ((deviations**3).mean(0) ** 2 + 1) / kurtosis, rtol=1e-6)


def test_samples_of_a_wrong_shape() -> None:
    for wrong in (np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="of shape"):
            Moments.of(wrong)
    with pytest.raises(ValueError, match="2 samples or more, got 1"):
        figures(Moments.of(np.zeros((1, 3))))


def test_the_first_papers_sparse_noise() -> None:
    """Noise on one coordinate of a hundred, gradients on all: R2 is near 1/d, where signs win; and its mirror image."""
    rng = np.random.default_rng(2)
    d, n = 100, 4_000
    sparse = np.ones((n, d))
    sparse[:, 0] += rng.normal(0, 10, n)
    found = figures(Moments.of(sparse), curvature_density=1.0)
    assert tuple(found) == NAMES
    assert found["geometry/noise_density"] == pytest.approx(1 / d)
    assert found["geometry/noise_ratio"] < 0.02
    assert found["geometry/curvature_ratio"] == pytest.approx(1 / found["geometry/gradient_density"])
    mirrored = rng.normal(0, 1, (n, d))
    mirrored[:, 0] += 10
    found = figures(Moments.of(mirrored))
    assert found["geometry/noise_density"] > 0.99
    assert found["geometry/noise_ratio"] > 20
    assert math.isnan(found["geometry/curvature_ratio"])


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0, 3.0])
def test_signal_to_noise(ratio: float) -> None:
    n, d = 400, 4_000
    found = figures(Moments.of(np.random.default_rng(3).normal(ratio, 1, (n, d))))
    spread = 1 / math.sqrt(n)
    assert found["geometry/snr"] == pytest.approx(ratio, abs=spread)
    assert found["geometry/signal"] == pytest.approx(ratio**2 / (ratio**2 + 1 / n), abs=0.05)
    assert found["geometry/snr_share"] == (1 if ratio == 3 else pytest.approx(0, abs=0.01))


@pytest.mark.parametrize(
    ("noise", "skewness", "bimodality"),
    [("normal", 0.0, 1 / 3), ("uniform", 0.0, 5 / 9), ("two points", 0.0, 1.0), ("exponential", 2.0, 5 / 9)],
)
def test_the_shape_of_noise(noise: str, skewness: float, bimodality: float) -> None:
    rng = np.random.default_rng(4)
    draw: dict[str, Callable[[tuple[int, int]], np.ndarray]] = {
        "normal": rng.standard_normal,
        "uniform": rng.random,
        "two points": lambda shape: rng.integers(0, 2, shape) * 1.0,
        "exponential": rng.standard_exponential,
    }
    found = figures(Moments.of(draw[noise]((20_000, 50))))
    assert found["geometry/skewness"] == pytest.approx(skewness, abs=0.05)
    assert found["geometry/bimodality"] == pytest.approx(bimodality, abs=0.02)


def test_gradients_that_never_change_have_no_signal_to_noise() -> None:
    found = figures(Moments.of(np.ones((10, 5))))
    assert found["geometry/gradient_density"] == 1
    assert found["geometry/signal"] == 1
    assert all(math.isnan(found[f"geometry/{name}"]) for name in ("noise_density", "snr", "snr_share", "skewness"))


def test_a_sample_of_coordinates() -> None:
    sizes = [70_000, 0, 1, 30_000]
    chosen = sample(sizes, 10_000)
    assert sum(map(len, chosen)) == 10_000
    assert len(chosen[0]) == pytest.approx(7_000, abs=200)
    for part, size in zip(chosen, sizes, strict=True):
        assert part.size == np.unique(part).size
        assert part.size == 0 or (part.min() >= 0 and part.max() < size)
    assert [part.tolist() for part in sample([3, 0, 2], 9)] == [[0, 1, 2], [], [0, 1]]
    assert all((a == b).all() for a, b in zip(chosen, sample(sizes, 10_000), strict=True))
    with pytest.raises(ValueError, match="coordinates must be 1 or more, got 0"):
        sample(sizes, 0)


def test_the_noise_of_the_mean_is_subtracted() -> None:
    """Four samples of mean 3 and variance 4: 9/4 without the correction, 9/4 − 1/4 with it."""
    rows = [np.array([3 + x], np.float32) for x in (-np.sqrt(3), -np.sqrt(3), np.sqrt(3), np.sqrt(3))]
    assert float(Moments.of(rows).snr[0]) == pytest.approx(math.sqrt(2), rel=1e-6)
