"""The polar factor of a matrix, by Newton–Schulz: step 2b of the algorithm, and what step 8 scales by.

A parameter of two to four dimensions is a matrix, or several of one size one below the other: its first dimension has
the rows, all others together are the `fan_in` columns. A layout that has the rows last, as Keras', is the front end's
to turn.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = Any
"""An array of any framework that has arithmetic operators and ``@``."""

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Those of Muon and `torch.optim.Muon`: they lift small singular values fast, and keep the others near 1, not at it."""
NEGLIGIBLE = 2.0**-40
"""Entries of at most so much of a direction's Frobenius norm count as 0.

Rows of units that are dead decay so far. The float32 products of two of them would be subnormal, for which a CPU's
matrix product takes 20 times as long; float32 rounds others by more.
"""


class Matrices(NamedTuple):
    """How a parameter is one matrix or several: ``(number, rows, fan_in)`` is a shape to view it in."""

    number: int
    rows: int
    fan_in: int

    @property
    def scale(self) -> float:
        """``1/√fan_in``, by which step 8 multiplies the verdict: the root mean square of an orthogonal update."""
        return 1 / math.sqrt(self.fan_in) if self.fan_in else 1.0


def matrices(shape: Sequence[int], count: int = 1, name: str = "a parameter") -> Matrices:
    """Return how a parameter of `shape`, rows first, is `count` matrices one below the other.

    Args:
        shape: of two to four dimensions.
        count: of matrices; 3 for a fused projection of queries, keys and values.
        name: of the parameter, for the error.

    Raises:
        ValueError: if it has another number of dimensions, or rows that `count` does not divide; for a `count` below 1.

    Example:
        >>> matrices((64, 16, 3, 3)), matrices((192, 64), count=3)
        (Matrices(number=1, rows=64, fan_in=144), Matrices(number=3, rows=64, fan_in=64))
    """
    if not 2 <= len(shape) <= 4:
        raise ValueError(
            f"orthogonalize=True takes parameters of 2 to 4 dimensions, {name} has the shape {tuple(shape)}: put it "
            "in a group with orthogonalize=False"
        )
    if count < 1:
        raise ValueError(f"{name} must hold 1 matrix or more, got {count!r}")
    if shape[0] % count:
        raise ValueError(
            f"{name} of shape {tuple(shape)} is to hold {count} matrices, which do not divide its {shape[0]} rows: "
            "name their number in its group"
        )
    return Matrices(count, shape[0] // count, math.prod(shape[1:]))


def newton_schulz(x: Array, steps: int, coefficients: Sequence[float], transposed: Callable[[Array], Array]) -> Array:
    """Return what `steps` iterations ``X ← a·X + (b·A + c·A²)·X`` with ``A = X·Xᵀ`` make of matrices.

    Each takes every singular value σ to ``a·σ + b·σ³ + c·σ⁵`` and leaves the singular vectors as they are.

    Args:
        x: shape (…, rows, columns), rows ≤ columns for speed, of a Frobenius norm of at most 1.
        steps: how many.
        coefficients: a, b, c.
        transposed: swaps the last two dimensions of an array.

    Source: arXiv 2502.16982 and the first Muon.
    """
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ transposed(x)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def polar(
    c: npt.NDArray[Any],
    ns_steps: int = NS_STEPS,
    ns_coefficients: Sequence[float] = NS_COEFFICIENTS,
    count: int = 1,
) -> npt.NDArray[np.float64]:
    """Return the polar factor of a direction, near ``U·Vᵀ`` of its singular value decomposition (step 2b).

    It is computed in float64. The direction is divided by its largest magnitude first, then by its Frobenius norm, so
    the factor of ``s·C`` is that of `C` for every ``s > 0``, and that of zeros is zeros. `NEGLIGIBLE` entries count as
    zeros.

    Args:
        c: finite, of two to four dimensions, rows first.
        ns_steps: Newton–Schulz iterations.
        ns_coefficients: of each.
        count: how many matrices it holds; each has a factor of its own.

    Returns:
        Of the shape of `c`.

    Raises:
        ValueError: as `matrices`.

    Example:
        >>> np.sign(polar(np.array([[2.0, 1.0], [-1.0, 2.0]])))
        array([[ 1.,  1.],
               [-1.,  1.]])
    """
    found = matrices(c.shape, count)
    x = np.asarray(c, np.float64).reshape(found)
    if x.size == 0:
        return x.reshape(c.shape)
    x = _divided(x, np.abs(x).max((1, 2), keepdims=True))
    x = _divided(x, np.sqrt((x * x).sum((1, 2), keepdims=True)))
    x = np.where(np.abs(x) <= NEGLIGIBLE, 0.0, x)
    tall = found.rows > found.fan_in
    x = x.mT if tall else x
    x = newton_schulz(x, ns_steps, ns_coefficients, lambda x: x.mT)
    return np.asarray(x.mT if tall else x).reshape(c.shape)


def _divided(x: npt.NDArray[Any], norm: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(x / np.where(norm == 0, 1.0, norm))
