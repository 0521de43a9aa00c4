r"""What is proved about votes on matrices: descent in the spectral norm, and how noise falls with the workers.

The objective `f` of an ``(m, n)`` matrix starts `gap` = ``f_0 − f*`` above its infimum. `smoothness` is ``L`` of the
spectral norm: ``f(Y) ≤ f(X) + ⟨G, Y − X⟩ + (L/2)·‖Y − X‖₂²``. The step is ``X ← X − η·V/√(mn)``, whose spectral norm is
at most `η`, since ``‖V‖₂ ≤ ‖V‖_F = √(mn)`` for signs. The statements are of the signs of gradients, as the paper's
are; those of polar factors are not covered.

Source: arXiv 2605.16311.
"""

import math

import numpy as np
import numpy.typing as npt

from ..settings import check_count, check_factor, check_size


def matrix_descent(norm: float, smoothness: float, lr: float, shape: tuple[int, int]) -> float:
    r"""Return by how much one step along the gradient's signs lowers the objective, at least.

    .. math:: f(X) − f(X − η V/\sqrt{mn}) ≥ \frac{η}{\sqrt{mn}} \|G\|_1 − \frac{L η^2}{2}, \quad V = \mathrm{sign}(G)

    Args:
        norm: ``‖G‖₁``, the sum of the gradient's magnitudes.
        smoothness: L, above 0.
        lr: η, above 0.
        shape: m, n.

    Raises:
        ValueError: if a quantity is outside its range.

    Example:
        >>> matrix_descent(8.0, smoothness=1.0, lr=0.5, shape=(4, 4))
        0.875
    """
    check_size("norm", norm)
    _check_positive(smoothness=smoothness, lr=lr)
    return lr * norm / _root(shape) - smoothness * lr**2 / 2


def matrix_learning_rate(gap: float, smoothness: float, steps: int) -> float:
    r"""Return the constant η of `matrix_vote_bound`, ``√(2·(f_0 − f*) / (L·T))``.

    Raises:
        ValueError: if a quantity is outside its range.

    Example:
        >>> matrix_learning_rate(gap=2.0, smoothness=1.0, steps=100)
        0.2
    """
    check_size("gap", gap)
    _check_positive(smoothness=smoothness, steps=steps)
    return math.sqrt(2 * gap / (smoothness * steps))


def matrix_vote_bound(
    gap: float, smoothness: float, noise: npt.ArrayLike, steps: int, workers: int = 1, batch: int = 1
) -> float:
    r"""Return the bound on the mean gradient ``‖G‖₁`` of the vote on a matrix, noise unimodal and symmetric.

    .. math::
        E\Big[\frac1T \sum_k \|G_k\|_1\Big] ≤ \sqrt{mn} \sqrt{\frac{2 L (f_0 − f^*)}{T}} + \frac{2 \|σ\|_1}{\sqrt{M B}}

    with the η of `matrix_learning_rate`. Of the two terms the first falls with the steps, the second with the workers.

    Args:
        gap: f_0 − f*.
        smoothness: L.
        noise: ``σ``, one standard deviation an entry of a gradient of one example, shape (m, n).
        steps: T.
        workers: M.
        batch: B, examples of each worker a step.

    Raises:
        ValueError: if a quantity is outside its range.

    Example:
        >>> matrix_vote_bound(2.0, 1.0, [[1.0, 1.0], [0.0, 0.0]], steps=100, workers=4)
        2.4
    """
    spread = np.asarray(noise, np.float64)
    if spread.ndim != 2 or not (np.isfinite(spread) & (spread >= 0)).all():
        raise ValueError(f"noise must be a matrix of finite numbers of 0 or more, got {spread.tolist()!r:.80}")
    check_size("gap", gap)
    _check_positive(smoothness=smoothness, steps=steps, workers=workers, batch=batch)
    rows, columns = spread.shape
    settled = _root((rows, columns)) * math.sqrt(2 * smoothness * gap / steps)
    return settled + 2 * float(spread.sum()) / math.sqrt(workers * batch)


def _root(shape: tuple[int, int]) -> float:
    for side in shape:
        check_count("each side of a matrix", side, 1)
    return math.sqrt(math.prod(shape))


def _check_positive(**quantities: float) -> None:
    for name, value in quantities.items():
        check_factor(name, value)
