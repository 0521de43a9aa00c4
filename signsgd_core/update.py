"""Gradient to direction to momentum, verdict to update: steps 1-3, 7 and 8 of the algorithm.

Everything but `finite` is written with arithmetic operators alone, so the same function runs on NumPy arrays,
PyTorch, TensorFlow and JAX tensors, and every front end calls it instead of writing the formula again.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any
"""An array of any framework that has arithmetic operators."""

_WARMUP_SEARCH_LIMIT = 1_000_000


def finite(gradient: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the gradient with every NaN and ±Inf replaced by 0 (step 1).

    Example:
        >>> finite(np.array([1.0, np.nan, -np.inf]))
        array([1., 0., 0.])
    """
    return np.where(np.isfinite(gradient), gradient, np.zeros((), gradient.dtype))


def direction(momentum: Array, gradient: Array, beta1: float) -> Array:
    """Return what a worker votes with, ``c = β1·m + (1−β1)·g`` (step 2).

    Args:
        momentum: `m`, any shape.
        gradient: `g`, finite, the same shape.
        beta1: weight of the momentum, in [0, 1).

    Example:
        >>> direction(4.0, 8.0, 0.75)
        5.0
    """
    return _average(momentum, gradient, beta1)


def update_momentum(momentum: Array, gradient: Array, beta2: float) -> Array:
    """Return the worker's next momentum, ``m ← β2·m + (1−β2)·g`` (step 3).

    Example:
        >>> update_momentum(4.0, 8.0, 0.5)
        6.0
    """
    return _average(momentum, gradient, beta2)


def update_verdict_momentum(average: Array, verdict: Array, gamma: float) -> Array:
    """Return the running mean of the verdicts, ``u ← γ·u + (1−γ)·V`` (step 7).

    Its magnitude is near 1 where the workers agree from step to step and near 0 where they see only noise.

    Example:
        >>> update_verdict_momentum(0.5, -1.0, 0.75)
        0.125
    """
    return _average(average, verdict, gamma)


def decayed(x: Array, u: Array, weight_decay: float) -> Array:
    """Return what the parameters move against, ``u + λ·x``; for variables that take ``lr`` times it away in place.

    Example:
        >>> decayed(1.0, -1.0, 0.5)
        -0.5
    """
    return u if weight_decay == 0 else u + weight_decay * x


def update_parameters(x: Array, u: Array, lr: float, weight_decay: float) -> Array:
    """Return the parameters after one step, ``x ← x − lr·(u + λ·x)`` (step 8).

    Args:
        x: parameters, any shape.
        u: verdict, or its momentum, the same shape.
        lr: learning rate.
        weight_decay: λ, decoupled from the vote.

    Example:
        >>> update_parameters(1.0, -1.0, 0.25, 0.5)
        1.125
    """
    return x - lr * decayed(x, u, weight_decay)


@lru_cache
def warmup_steps(beta: float) -> int:
    """Return C(β), for how many first steps the ballot is the sign of the gradient, not of the momentum.

    The smallest ``C ≥ 1`` with ``(C/2)·β^C ≤ 1/((1−β²)(C+1))`` and ``β^(C+1) ≤ 1/2``
    (Theorem 3 of arXiv 1802.04434). It is not a learning-rate warmup.

    Raises:
        ValueError: if `beta` does not lie in [0, 1), or C(β) would pass one million.

    Example:
        >>> [warmup_steps(beta) for beta in (0.5, 0.8, 0.9, 0.95, 0.99)]
        [1, 19, 54, 132, 894]
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must lie in [0, 1), got {beta!r}")
    for count in range(1, _WARMUP_SEARCH_LIMIT):
        settled = count / 2 * beta**count <= 1 / ((1 - beta**2) * (count + 1))
        if settled and beta ** (count + 1) <= 0.5:
            return count
    raise ValueError(f"beta={beta!r} would need over {_WARMUP_SEARCH_LIMIT} warmup steps; take a smaller one")


def _average(old: Array, new: Array, beta: float) -> Array:
    return beta * old + (1 - beta) * new
