r"""What the papers prove about signSGD, Signum and the vote, as functions of named quantities.

Words and symbols: the objective `f` starts `gap` = ``f_0 − f*`` above its infimum; `curvature` is ``L``, one entry a
coordinate, with ``|f(y) − f(x) − gᵀ(y−x)| ≤ ½ Σ_i L_i (y_i − x_i)²``; `noise` is ``σ``, one standard deviation a
coordinate, of a stochastic gradient of one example; `calls` is ``N``, how many such gradients each worker has asked
for. Bounds are on the mean over all steps of the gradient's norm, in the units of the gradient, or of its square.

Sources: arXiv 1802.04434 ("2018") and arXiv 1810.05291 ("2019").
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..update import warmup_steps

Vector = Sequence[float] | npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]

CRITICAL_SNR = 2 / 3**0.5
"""``2/√3``: the signal-to-noise above which Gauss' inequality has its other branch."""


def sign_error(snr: npt.ArrayLike) -> Floats:
    r"""Return how often a stochastic gradient's sign is wrong, at most, if its noise is unimodal and symmetric.

    .. math::
        P[\mathrm{sign}(\tilde g) ≠ \mathrm{sign}(g)] ≤ \begin{cases}
            \frac{2}{9 S^2} & S > 2/\sqrt 3 \\ \frac12 − \frac{S}{2 \sqrt 3} & \text{else} \end{cases}

    Args:
        snr: ``S = |g| / σ``, 0 or more, any shape; infinite without noise.

    Returns:
        The bound, of the same shape, in [0, ½].

    Raises:
        ValueError: if a ratio is negative or NaN.

    Source: Lemma D.1 of 2018, by Gauss' inequality of 1823. A uniform noise attains the second branch.

    Example:
        >>> sign_error([0.0, 2.0]).tolist()
        [0.5, 0.05555555555555555]
    """
    s = np.asarray(snr, np.float64)
    if not (s >= 0).all():
        raise ValueError(f"snr must be 0 or more, got {float(s[~(s >= 0)].flat[0])}")
    with np.errstate(divide="ignore"):
        return np.where(s > CRITICAL_SNR, 2 / (9 * s**2), 0.5 - s / (2 * 3**0.5))


def sgd_bound(gap: float, curvature: Vector, noise: Vector, calls: int) -> float:
    r"""Return the bound on SGD's mean **squared** gradient ``‖g‖₂²``, to which signSGD is compared.

    .. math:: E\Big[\frac1K \sum_k \|g_k\|_2^2\Big] ≤ \frac{1}{\sqrt N} \big(2 \|L\|_∞ (f_0 − f^*) + \|σ\|_2^2\big)

    It holds with ``K = √N`` steps, batches of ``K`` and the learning rate ``1/‖L‖_∞``.

    Raises:
        ValueError: if a quantity is outside its range.

    Source: 2018, section 3.

    Example:
        >>> sgd_bound(1.0, [1.0, 1.0], [3.0, 4.0], calls=10_000)
        0.27
    """
    curve, spread = _check(gap, curvature, noise, calls)
    return float((2 * curve.max() * gap + (spread**2).sum()) / calls**0.5)


def signsgd_bound(gap: float, curvature: Vector, noise: Vector, calls: int) -> float:
    r"""Return the bound on signSGD's mean gradient ``‖g‖₁`` of one worker; no assumption about the noise's shape.

    .. math::
        E\Big[\frac1K \sum_k \|g_k\|_1\Big]^2 ≤
            \frac{1}{\sqrt N} \Big(\sqrt{\|L\|_1} (f_0 − f^* + \tfrac12) + 2 \|σ\|_1\Big)^2

    It holds with ``K = √N`` steps, batches of ``K`` and the `learning_rate` of `K`. This is its square root.

    Raises:
        ValueError: if a quantity is outside its range.

    Source: Theorem 1 of 2018.

    Example:
        >>> signsgd_bound(0.5, [4.0], [1.0], calls=10_000)
        0.4
    """
    return majority_vote_bound(gap, curvature, noise, calls, workers=1, unimodal_symmetric=False)


def majority_vote_bound(
    gap: float, curvature: Vector, noise: Vector, calls: int, workers: int, unimodal_symmetric: bool
) -> float:
    r"""Return the bound on the mean gradient ``‖g‖₁`` of signSGD by majority vote.

    .. math::
        E\Big[\frac1K \sum_k \|g_k\|_1\Big]^2 ≤
            \frac{1}{\sqrt N} \Big(\sqrt{\|L\|_1} (f_0 − f^* + \tfrac12) + \frac{2}{\sqrt M} \|σ\|_1\Big)^2

    with ``M`` workers if the noise of each coordinate is unimodal and symmetric about its mean (b); else as for one
    (a). Steps, batches and learning rate as for `signsgd_bound`, batches on each worker.

    Raises:
        ValueError: if a quantity is outside its range.

    Source: Theorem 2 of 2018. Without symmetry a vote may be worse than one worker: of gradients of which a tenth is
    50 and the rest −1, most workers get the sign of the mean wrong, 4.1, and the more of them the surer.

    Example:
        >>> majority_vote_bound(0.5, [4.0], [1.0], calls=10_000, workers=4, unimodal_symmetric=True)
        0.3
    """
    curve, spread = _check(gap, curvature, noise, calls)
    voters = _check_workers(workers) if unimodal_symmetric else 1
    return float((curve.sum() ** 0.5 * (gap + 0.5) + 2 * spread.sum() / voters**0.5) / calls**0.25)


def signum_rate(gap: float, curvature: Vector, noise: Vector, calls: int, beta: float, lr: float) -> float:
    r"""Return what the mean gradient ``‖g‖₁`` of Signum is of the order of, after its momentum has settled.

    .. math::
        \frac{1}{N^{1/4}} \Big(\frac{f_C − f^*}{δ} + (1 + \log N)
            \Big(\frac{δ \|L\|_1}{1 − β} + \|σ\|_1 \sqrt{1 − β}\Big)\Big)

    up to a constant that the theorem leaves open: it compares settings, and bounds nothing. It is of step ``k`` with
    the learning rate ``δ/√(k+1)`` and batches of ``k + 1``, from step ``C(β)`` on (`warmup_steps`), before which the
    ballot is the gradient's sign.

    Args:
        gap: ``f_C − f*``, after the warmup.
        curvature: L.
        noise: σ.
        calls: N.
        beta: of the momentum, in [0, 1).
        lr: δ, above 0.

    Raises:
        ValueError: if a quantity is outside its range, or fewer calls were made than the warmup takes.

    Source: Theorem 3 of 2018.

    Example:
        >>> signum_rate(1.0, [1.0], [0.0], calls=10_000, beta=0.5, lr=1.0) < 3
        True
    """
    curve, spread = _check(gap, curvature, noise, calls)
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr!r}")
    settled = warmup_steps(beta)
    needed = settled * (settled + 1) // 2  # of batches 1, 2, …, C
    if calls <= needed:
        raise ValueError(f"calls must be more than the warmup of beta={beta} takes, {needed}, got {calls!r}")
    kept = lr * curve.sum() / (1 - beta) + spread.sum() * (1 - beta) ** 0.5
    return float((gap / lr + (1 + np.log(calls)) * kept) / calls**0.25)


def mixed_norm(gradient: npt.ArrayLike, noise: npt.ArrayLike) -> float:
    r"""Return how large a gradient is beside its noise, as Theorem 1 of 2019 measures it.

    .. math:: \sum_{i ∈ H} |g_i| + \sum_{i ∉ H} \frac{g_i^2}{σ_i}, \quad H = \{i: |g_i| > 2/\sqrt 3 \, σ_i\}

    Raises:
        ValueError: if a standard deviation is negative.

    Example:
        >>> mixed_norm([3.0, 1.0], [1.0, 2.0])
        3.5
    """
    g, sigma = np.abs(np.asarray(gradient, np.float64)), np.asarray(noise, np.float64)
    if not (sigma >= 0).all():
        raise ValueError(f"noise must be 0 or more everywhere, got {sigma.min()}")
    sure = g > CRITICAL_SNR * sigma
    return float(np.where(sure, g, g**2 / np.where(sigma > 0, sigma, 1.0)).sum())


def small_batch_bound(gap: float, curvature: Vector, calls: int) -> float:
    r"""Return the bound on signSGD's mean `mixed_norm` with batches of one, noise unimodal and symmetric.

    .. math:: \frac1K \sum_k E\big[\text{mixed norm of } g_k\big] ≤ 3 \sqrt{\frac{\|L\|_1 (f_0 − f^*)}{N}}

    with ``K = N`` steps of the learning rate ``√((f_0 − f*) / (‖L‖₁ K))``.

    Raises:
        ValueError: if a quantity is outside its range.

    Source: Theorem 1 of 2019.

    Example:
        >>> small_batch_bound(1.0, [1.0], calls=900)
        0.1
    """
    curve, _ = _check(gap, curvature, np.zeros(np.shape(curvature)), calls)
    return float(3 * (curve.sum() * gap / calls) ** 0.5)


def inverters_bound(gap: float, curvature: Vector, noise: Vector, calls: int, workers: int, inverters: float) -> float:
    r"""Return the bound on the mean gradient ``‖g‖₁`` of a vote in which a share of the workers inverts its signs.

    .. math::
        \Big[\frac1K \sum_k E \|g_k\|_1\Big]^2 ≤
            \frac{4}{\sqrt N} \Big(\frac{1}{1 − 2α} \frac{\|σ\|_1}{\sqrt M} + \sqrt{\|L\|_1 (f_0 − f^*)}\Big)^2

    with noise unimodal and symmetric, ``K = √N`` steps, batches of ``K`` on each worker and the learning rate
    ``√((f_0 − f*) / (‖L‖₁ K))``.

    Args:
        gap: f_0 − f*.
        curvature: L.
        noise: σ.
        calls: N, of each worker.
        workers: M, those that invert included.
        inverters: α, their share, in [0, ½).

    Raises:
        ValueError: if a quantity is outside its range.

    Source: Theorem 2 of 2019.

    Example:
        >>> inverters_bound(1.0, [4.0], [1.0], calls=10_000, workers=4, inverters=0.25)
        0.6
    """
    curve, spread = _check(gap, curvature, noise, calls)
    if not 0 <= inverters < 0.5:
        raise ValueError(f"inverters must be a share in [0, 0.5): half of the voters decide, got {inverters!r}")
    voted = spread.sum() / _check_workers(workers) ** 0.5 / (1 - 2 * inverters)
    return float(2 * (voted + (curve.sum() * gap) ** 0.5) / calls**0.25)


def learning_rate(curvature: Vector, steps: int, gap: float = 1.0) -> float:
    r"""Return the constant learning rate of the theorems, ``√(gap / (‖L‖₁ K))``; 2018 takes 1 for the gap.

    Raises:
        ValueError: if a quantity is outside its range.

    Example:
        >>> learning_rate([1.0, 3.0], steps=25)
        0.1
    """
    curve, _ = _check(gap, curvature, np.zeros(np.shape(curvature)), steps)
    return float((gap / (curve.sum() * steps)) ** 0.5)


def _check(gap: float, curvature: Vector, noise: Vector, calls: int) -> tuple[Floats, Floats]:
    curve, spread = np.asarray(curvature, np.float64), np.asarray(noise, np.float64)
    if not (np.isfinite(gap) and gap >= 0):
        raise ValueError(f"gap must be 0 or more and finite, got {gap!r}")
    if calls < 1:
        raise ValueError(f"calls must be 1 or more, got {calls!r}")
    for name, values in (("curvature", curve), ("noise", spread)):
        if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{name} must be a vector of finite numbers of 0 or more, got {values.tolist()!r:.80}")
    if curve.shape != spread.shape:
        raise ValueError(f"curvature and noise must have one entry a coordinate, got {curve.size} and {spread.size}")
    if not curve.any():
        raise ValueError("curvature must be above 0 somewhere, got zeros")
    return curve, spread


def _check_workers(workers: int) -> int:
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers!r}")
    return workers
