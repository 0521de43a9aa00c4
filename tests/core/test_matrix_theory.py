"""The statements about votes on matrices against simulation, on a quadratic that is smooth in the spectral norm.

``f(X) = ½·tr(Xᵀ·A·X)`` has the gradient ``A·X`` and the smoothness ``tr A``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core.analysis.matrix_theory import matrix_descent, matrix_learning_rate, matrix_vote_bound

Floats = npt.NDArray[np.float64]
SHAPE = (4, 6)
A = np.diag([3.0, 1.0, 0.5, 0.25])
START = np.random.default_rng(0).normal(size=SHAPE)
NOISE = np.abs(np.random.default_rng(1).normal(size=SHAPE))


def objective(x: Floats) -> float:
    return float(np.trace(x.T @ A @ x) / 2)


GAP, SMOOTHNESS = objective(START), float(np.trace(A))


def mean_norm(steps: int, workers: int, seed: int, noise: Floats = NOISE, batch: int = 1) -> float:
    """Return the mean ``‖G_k‖₁`` of one training by the vote."""
    random, x, norms = np.random.default_rng(seed), START.copy(), []
    lr = matrix_learning_rate(GAP, SMOOTHNESS, steps)
    for _ in range(steps):
        g = A @ x
        norms.append(np.abs(g).sum())
        gradients = g + noise * random.laplace(0, 0.5**0.5, (workers, batch, *SHAPE)).mean(1)
        verdict = np.sign(np.sign(gradients).sum(0))
        x = x - lr * verdict / np.sqrt(g.size)
    return float(np.mean(norms))


@given(seed=st.integers(0, 999), lr=st.floats(1e-3, 2.0))
def test_a_step_descends_as_much_at_least(seed: int, lr: float) -> None:
    x = np.random.default_rng(seed).normal(size=SHAPE)
    g = A @ x
    after = objective(x - lr * np.sign(g) / np.sqrt(g.size))
    assert objective(x) - after >= matrix_descent(float(np.abs(g).sum()), SMOOTHNESS, lr, SHAPE) - 1e-9


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_without_noise_the_bound_falls_with_the_root_of_the_steps(steps: int) -> None:
    bound = matrix_vote_bound(GAP, SMOOTHNESS, 0 * NOISE, steps)
    assert mean_norm(steps, 1, 0, 0 * NOISE) <= bound
    assert matrix_vote_bound(GAP, SMOOTHNESS, 0 * NOISE, 4 * steps) == pytest.approx(bound / 2)


@pytest.mark.parametrize("workers", [1, 3, 4, 15])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_vote_stays_below_the_bound(workers: int, batch: int) -> None:
    norms = [mean_norm(200, workers, seed, batch=batch) for seed in range(4)]
    assert np.mean(norms) <= matrix_vote_bound(GAP, SMOOTHNESS, NOISE, 200, workers, batch)


def test_the_noise_term_falls_with_the_root_of_the_workers() -> None:
    """In the bound; trainings, which have the other term too, get nearer with more workers."""
    noise_terms = [
        matrix_vote_bound(GAP, SMOOTHNESS, NOISE, 200, workers) - matrix_vote_bound(GAP, SMOOTHNESS, 0 * NOISE, 200)
        for workers in (1, 4, 16)
    ]
    assert noise_terms[0] == pytest.approx(2 * noise_terms[1]) == pytest.approx(4 * noise_terms[2])
    means = [np.mean([mean_norm(400, workers, seed, 20 * NOISE) for seed in range(4)]) for workers in (1, 5, 25)]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: matrix_descent(-1.0, 1.0, 1.0, SHAPE), "norm must be 0 or more and finite, got -1.0"),
        (lambda: matrix_descent(1.0, 0.0, 1.0, SHAPE), "smoothness must be above 0 and finite, got 0.0"),
        (lambda: matrix_descent(1.0, 1.0, 1.0, (0, 4)), "each side of a matrix must be a whole number of 1 or more"),
        (lambda: matrix_learning_rate(1.0, 1.0, 0), "steps must be above 0 and finite, got 0"),
        (lambda: matrix_vote_bound(1.0, 1.0, [1.0], 5), r"noise must be a matrix .* got \[1.0\]"),
        (lambda: matrix_vote_bound(1.0, 1.0, [[1.0]], 5, workers=0), "workers must be above 0"),
    ],
)
def test_what_is_out_of_range_is_said(call: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        call()
