"""The polar factor against the singular value decomposition, and steps 2b and 8 of the reference."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core import NS_COEFFICIENTS, Reference, check_newton_schulz, matrices, newton_schulz, polar
from signsgd_core.polar import NEGLIGIBLE, Matrices

SHAPES = [(1, 1), (1, 7), (7, 1), (4, 4), (3, 8), (8, 3), (5, 2, 3), (4, 3, 2, 2), (16, 2, 1, 1)]


def random(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_keeps_the_singular_vectors(shape: tuple[int, ...]) -> None:
    """Every singular value goes through the polynomial, each by itself."""
    c = random(shape).reshape(shape[0], -1)
    u, s, vt = np.linalg.svd(c, full_matrices=False)
    s = s / np.linalg.norm(c)
    for _ in range(5):
        a, b, k = NS_COEFFICIENTS
        s = a * s + b * s**3 + k * s**5
    np.testing.assert_allclose(polar(c.reshape(shape)).reshape(c.shape), (u * s) @ vt, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_that_converge_reach_the_polar_factor(shape: tuple[int, ...]) -> None:
    """With those of the classical iteration of order five, all singular values become 1."""
    c = random(shape).reshape(shape[0], -1)
    u, _, vt = np.linalg.svd(c, full_matrices=False)
    exact = polar(c.reshape(shape), 60, (15 / 8, -10 / 8, 3 / 8)).reshape(c.shape)
    np.testing.assert_allclose(exact, u @ vt, atol=1e-8)


def test_five_steps_bring_singular_values_near_one() -> None:
    """Of those from a hundredth of the norm to all of it."""
    sigma = np.geomspace(0.01, 1, 400)
    lifted = newton_schulz(sigma[:, None, None], 5, NS_COEFFICIENTS, lambda x: x.mT)
    assert 0.6 < lifted.min() < lifted.max() < 1.3


@given(exponent=st.integers(-140, 120), seed=st.integers(0, 9))
def test_scale_does_not_matter(exponent: int, seed: int) -> None:
    c = random((3, 5), seed).astype(np.float32)
    scaled = np.ldexp(c.astype(np.float64), exponent)
    np.testing.assert_array_equal(polar(scaled), polar(c))


@given(seed=st.integers(0, 99), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_transposition_and_sign_pass_through(seed: int, rows: int, columns: int) -> None:
    c = random((rows, columns), seed)
    np.testing.assert_allclose(polar(c.T), polar(c).T, atol=1e-10)
    np.testing.assert_array_equal(polar(-c), -polar(c))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)])
def test_without_entries(shape: tuple[int, ...]) -> None:
    assert polar(np.zeros(shape)).shape == shape


def test_zeros_are_zeros() -> None:
    assert not polar(np.zeros((3, 4))).any()
    c = random((4, 3))
    c[1] = c[:, 2] = 0
    assert not polar(c)[1].any()
    assert not polar(c)[:, 2].any()


@pytest.mark.parametrize("exponent", [-300, -100, -45])
def test_rows_that_decayed_to_nothing_are_zeros(exponent: int) -> None:
    """Those of dead units; all others are as if they had none beside them."""
    c = random((6, 9))
    alive = polar(c[::2])
    c[1::2] = np.ldexp(c[1::2], exponent)
    np.testing.assert_array_equal(polar(c)[1::2], 0)
    np.testing.assert_allclose(polar(c)[::2], alive, atol=1e-12)


def test_what_is_above_nothing_counts() -> None:
    """Five steps multiply small singular values by 3.4445 each."""
    c = np.diag([1.0, 4 * NEGLIGIBLE])
    np.testing.assert_allclose(polar(c)[1, 1], 4 * NEGLIGIBLE * NS_COEFFICIENTS[0] ** 5, rtol=1e-9)


def test_a_kernel_is_the_matrix_of_its_rows() -> None:
    c = random((4, 3, 2, 2))
    np.testing.assert_array_equal(polar(c), polar(c.reshape(4, 12)).reshape(c.shape))


def test_a_fused_projection_is_three_matrices() -> None:
    q, k, v = random((3, 4, 6))
    whole = np.concatenate([q, 128 * k, v])
    np.testing.assert_array_equal(polar(whole, count=3), np.concatenate([*map(polar, (q, k, v))]))


@pytest.mark.parametrize(("shape", "count", "expected"), [((6, 4), 3, (3, 2, 4)), ((8, 3, 3, 3), 1, (1, 8, 27))])
def test_matrices(shape: tuple[int, ...], count: int, expected: tuple[int, int, int]) -> None:
    found = matrices(shape, count)
    assert found == Matrices(*expected)
    assert found.scale == 1 / np.sqrt(expected[2])


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2, 2, 2)])
def test_what_is_no_matrix_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="conv.bias has the shape .* put it in a group with orthogonalize=False"):
        matrices(shape, name="conv.bias")


def test_rows_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"qkv of shape \(8, 4\) is to hold 3 matrices, which do not divide"):
        matrices((8, 4), 3, "qkv")


@pytest.mark.parametrize("steps", [0, -1, 100, 2.5, "5", None])
def test_bad_ns_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match="ns_steps must be a whole number of 1 to 99, got"):
        check_newton_schulz(steps, NS_COEFFICIENTS)


@pytest.mark.parametrize("coefficients", [1.0, (1, 2), "abc", (1, 2, float("nan")), None, (1, 2, "3")])
def test_bad_ns_coefficients(coefficients: Any) -> None:
    with pytest.raises(ValueError, match="ns_coefficients must be three finite numbers such as"):
        check_newton_schulz(5, coefficients)


def sign_muon(workers: int, **settings: Any) -> Reference:
    return Reference([np.zeros((2, 4)), np.zeros(4)], workers, lr=1.0, betas=(0, 0), orthogonalize={0: 1}, **settings)


def test_ballots_are_those_of_the_polar_factor() -> None:
    """Not of the gradient: the second row is nearly the first, and what tells them apart decides."""
    reference, g = sign_muon(1), np.array([[1.0, 1, 1, 1], [1, 1, 1, 0.9]])
    reference.step([[g, g[0]]])
    # √4 = 2 halves the verdict on the matrix; the vector of its group is voted on as ever
    np.testing.assert_array_equal(reference.parameters[0], -np.sign(polar(g)) / 2)
    np.testing.assert_array_equal(reference.parameters[1], -np.ones(4))
    assert (np.sign(polar(g)) != np.sign(g)).any()


def test_a_matrix_of_zeros_casts_the_ballots_of_the_zero_rule() -> None:
    reference = sign_muon(1, zeros="alternate")
    for expected in (-0.5, 0.0):
        reference.step([[np.zeros((2, 4)), None]])
        np.testing.assert_array_equal(reference.parameters[0], np.full((2, 4), expected))
    assert not reference.undecided[0].any()


def test_entries_that_are_not_finite_count_as_zeros_before_the_norm() -> None:
    wild, tame = random((2, 4)), random((2, 4))
    wild[0, 1], tame[0, 1] = np.inf, 0
    ends: list[Any] = []
    for g in (wild, tame):
        reference = sign_muon(1)
        reference.step([[g, None]])
        ends.append(reference.parameters[0])
    np.testing.assert_array_equal(ends[0], ends[1])


def test_undecided_is_what_rounding_could_turn() -> None:
    reference = sign_muon(3, tolerance=0.05)
    gradients = random((3, 2, 4))
    reference.step([[g, None] for g in gradients])
    factors = np.stack([polar(g) for g in gradients.astype(np.float32)])
    near = np.abs(factors) < 0.05 * np.sqrt((factors**2).mean((1, 2), keepdims=True))
    votes = np.sign(factors)
    could = np.abs(np.where(near, 0, votes).sum(0)) <= near.sum(0)
    np.testing.assert_array_equal(reference.undecided[0], could & near.any(0))
    assert not sign_muon(3).undecided[0].any()


def test_undecided_stays_so() -> None:
    """A parameter that rounding moved is another one from then on."""
    reference, each = sign_muon(1, tolerance=0.6), []
    for seed in range(4):
        alone = sign_muon(1, tolerance=0.6)
        for one in (reference, alone):
            one.step([[random((2, 4), seed), None]])
        each.append(alone.undecided[0])
    assert (each[-1] != np.any(each, axis=0)).any()
    np.testing.assert_array_equal(reference.undecided[0], np.any(each, axis=0))
