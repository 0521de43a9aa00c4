"""Workers that lie, go silent, or send NaN: what a worker hands on instead of its honest gradient.

An adversary is any function from the gradient a worker computed to the one it votes with; `None` casts no vote. Only
the minus sign and NumPy's random numbers are used, so `invert` and `silent` also take tensors of any framework.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Adversary = Callable[[Any], Any]
"""Maps an honest gradient to the one sent, or to `None` for no vote."""


def invert(gradient: Any) -> Any:
    """Return the opposite of the gradient: the strongest single-worker attack on a vote (arXiv 1810.05291, §4.2).

    Example:
        >>> invert(np.array([1.0, -2.0]))
        array([-1.,  2.])
    """
    return -gradient


def silent(gradient: Any) -> None:
    """Return no gradient: the worker abstains in every coordinate.

    Example:
        >>> silent(np.ones(2)) is None
        True
    """


def send_nan(gradient: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a gradient of NaN alone: by step 1 it counts as zero everywhere.

    Example:
        >>> send_nan(np.ones(2))
        array([nan, nan])
    """
    return np.full_like(gradient, np.nan)


def constant(gradient: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ones: the worker votes for the same direction everywhere and always.

    Example:
        >>> constant(np.array([-3.0, 2.0]))
        array([1., 1.])
    """
    return np.ones_like(gradient)


class Collude:
    """Workers that all send the same signs, chosen once: a fixed direction for tensors of each shape.

    Args:
        seed: the same on all that collude.

    Example:
        >>> one, other = Collude(seed=1), Collude(seed=1)
        >>> bool((one(np.ones(9)) == other(np.zeros(9))).all())
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, gradient: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the chosen signs, of the gradient's shape and dtype."""
        random = np.random.default_rng([self.seed, *gradient.shape])
        return random.choice([-1, 1], gradient.shape).astype(gradient.dtype)


class Randomize:
    """A worker whose gradient is pure noise, each sign as likely as the other.

    Args:
        seed: of its own random generator.

    Example:
        >>> Randomize(seed=0)(np.ones(2))
        array([ 0.12573022, -0.13210486])
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, gradient: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return noise of the gradient's shape and dtype."""
        return self._random.standard_normal(gradient.shape).astype(gradient.dtype)


ADVERSARIES: dict[str, Callable[[int], Adversary]] = {
    "invert": lambda seed: invert,
    "random": Randomize,
    "constant": lambda seed: constant,
    "silent": lambda seed: silent,
    "nan": lambda seed: send_nan,
    "collude": lambda seed: Collude(0),
}
"""Name -> the adversary that a worker with a seed of its own is."""


def check_lie(sent: Any, shape: tuple[int, ...]) -> None:
    """Make sure that what an adversary sends has the shape of the gradient that it got.

    Raises:
        ValueError: if not.
    """
    if np.shape(sent) != shape:
        raise ValueError(
            f"an adversary must return a gradient of the shape {tuple(shape)} that it got, not {np.shape(sent)}"
        )


def check_adversaries(adversaries: Mapping[int, Adversary] | None, workers: int, kind: str = "worker") -> None:
    """Make sure that only workers that there are get to lie, each by a function.

    Args:
        adversaries: number of the worker -> what it makes of its gradients.
        workers: how many there are.
        kind: what one is called: "worker", "rank" or "replica".

    Raises:
        ValueError: if there are others.
        TypeError: if it is no mapping, or something else than a function is to lie.

    Example:
        >>> check_adversaries({2: invert}, workers=2)
        Traceback (most recent call last):
        ValueError: adversaries must be workers 0 to 1, got [2]
    """
    if not isinstance(adversaries, Mapping | None):
        raise TypeError(f"adversaries must map a {kind} to its function, such as {{0: invert}}, got {adversaries!r}")
    unknown = sorted(set(adversaries or {}) - set(range(workers)), key=repr)
    if unknown:
        raise ValueError(f"adversaries must be {kind}s 0 to {workers - 1}, got {unknown}")
    for number, adversary in (adversaries or {}).items():
        if not callable(adversary):
            known = "as those of signsgd_core.adversaries"
            raise TypeError(f"adversaries must be functions, {known}, got {adversary!r} of {kind} {number}")
