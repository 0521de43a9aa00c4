r"""The geometry of gradients and of their noise, which says when a sign is as good as a gradient.

Both papers' bounds differ by how dense vectors are, ``φ(v) = ‖v‖₁² / (d·‖v‖₂²)``, 1 if all coordinates are as large
and ``1/d`` if only one is not 0: signs do better where the noise is sparser than the gradient, and worse where it is
denser. What the monitors of all front ends log, of a sample of coordinates and of gradients of one batch of one worker:

| name | meaning |
|---|---|
| ``geometry/gradient_density`` | ``φ(g)`` of the mean gradient |
| ``geometry/noise_density`` | ``φ(σ)``, σ the standard deviation of each coordinate |
| ``geometry/noise_ratio`` | ``R2 = φ(σ)/φ(g)`` |
| ``geometry/curvature_density`` | ``φ(L)``, L the absolute diagonal of the Hessian; where it is asked for |
| ``geometry/curvature_ratio`` | ``R1 = √φ(L)/φ(g)`` |
| ``geometry/signal`` | the share of ``‖g‖₂²`` that the noise of the mean does not explain, 0 to 1 |
| ``geometry/snr`` | median of ``S = |g|/σ``, the noise of the mean subtracted |
| ``geometry/snr_share`` | share of coordinates with ``S > 2/√3``, from where on Gauss' inequality bounds well |
| ``geometry/skewness`` | median of each coordinate's absolute skewness; symmetric noise has 0 |
| ``geometry/bimodality`` | median of Sarle's coefficient: 1/3 for a normal noise, 5/9 a uniform one, 1 for two points |

Monitors take consecutive steps, and the weights move between them: a gradient that turns with them counts as noise.
That is what a momentum averages, too. But a small ResNet under AdamW had a signal of 0 that way and of 0.97 with
``lr=0``, where the weights stand still, as in the paper.

Source: arXiv 1802.04434, section 3 and appendix; the curvature's density is not in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .theory import CRITICAL_SNR

Floats = npt.NDArray[np.float64]

NAMES = tuple(
    f"geometry/{name}"
    for name in (
        *("gradient_density", "noise_density", "noise_ratio", "curvature_density", "curvature_ratio"),
        *("signal", "snr", "snr_share", "skewness", "bimodality"),
    )
)
"""Of all figures, in the order of the table."""

PROBES = 8
"""Products with the Hessian for one estimate of its diagonal."""


def density(vector: npt.ArrayLike) -> float:
    r"""Return how dense a vector is.

    .. math:: φ(v) = \frac{\|v\|_1^2}{d \, \|v\|_2^2}

    Args:
        vector: ``v``, any shape, `d` numbers.

    Returns:
        From ``1/d`` to 1; NaN for a vector of zeros.

    Raises:
        ValueError: without any number.

    Source: arXiv 1802.04434, section 3.

    Example:
        >>> density([1, -1, 1, 1]), density([0, 0, 5, 0])
        (1.0, 0.25)
    """
    v = np.asarray(vector, np.float64)
    if not v.size:
        raise ValueError("density needs a vector of at least one number, got none")
    largest = np.abs(v).max()
    if not largest > 0:
        return float("nan")
    v = v / largest  # squares neither overflow nor vanish
    return float(np.abs(v).sum() ** 2 / (v.size * (v**2).sum()))


@dataclass(frozen=True)
class Moments:
    r"""Mean and central moments of each of `d` coordinates; those of two sets of samples merge into those of both.

    Attributes:
        count: of samples.
        mean: shape (d,).
        second: ``Σ (x − mean)²``, shape (d,).
        third: ``Σ (x − mean)³``.
        fourth: ``Σ (x − mean)⁴``.

    Source: Chan, Golub and LeVeque 1979 (Welford's method in parallel); Pébay, SAND2008-6212, for the third and fourth.

    Example:
        >>> a, b = Moments.of([[1.0], [2.0]]), Moments.of([[6.0]])
        >>> a.merge(b).mean, a.merge(b).variance
        (array([3.]), array([7.]))
    """

    count: int
    mean: Floats
    second: Floats
    third: Floats
    fourth: Floats

    @classmethod
    def of(cls, samples: npt.ArrayLike) -> "Moments":
        """Return the moments of samples of shape (count, d).

        Raises:
            ValueError: for another shape, or without a sample.
        """
        x = np.asarray(samples, np.float64)
        if x.ndim != 2 or not len(x):
            raise ValueError(f"samples must be of shape (count, coordinates), at least one, got {x.shape}")
        mean = x.mean(0)
        apart = x - mean
        square = apart**2
        return cls(len(x), mean, square.sum(0), (square * apart).sum(0), (square**2).sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of samples."""
        a, b = self.count, other.count
        n = a + b
        delta = (other.mean - self.mean) / n
        second = self.second + other.second + delta**2 * (a * b * n)
        third = (
            self.third
            + other.third
            + delta**3 * (a * b * (a - b) * n)
            + 3 * delta * (a * other.second - b * self.second)
        )
        fourth = (
            self.fourth
            + other.fourth
            + delta**4 * (a * b * (a**2 - a * b + b**2) * n)
            + 6 * delta**2 * (a**2 * other.second + b**2 * self.second)
            + 4 * delta * (a * other.third - b * self.third)
        )
        return Moments(n, self.mean + b * delta, second, third, fourth)

    @staticmethod
    def pack(moments: "Moments | None", coordinates: int) -> Floats:
        """Return them in one row, for a wire: a row of zeros, if there are none."""
        if moments is None:
            return np.zeros(1 + 4 * coordinates)
        return np.concatenate([[moments.count], moments.mean, moments.second, moments.third, moments.fourth])

    @classmethod
    def unpack(cls, rows: npt.ArrayLike) -> "Moments | None":
        """Return the merged moments of such rows, None if no row has a sample."""
        merged = None
        for count, *rest in ((row[0], *np.split(row[1:], 4)) for row in np.asarray(rows) if row[0]):
            one = cls(int(count), *rest)
            merged = one if merged is None else merged.merge(one)
        return merged

    @property
    def variance(self) -> Floats:
        """The unbiased variance, NaN of one sample."""
        return self.second / (self.count - 1 if self.count > 1 else np.nan)

    @property
    def snr(self) -> Floats:
        r"""``S = |g|/σ``, the noise of the mean subtracted: ``√max(mean²/σ² − 1/count, 0)``; NaN of one sample."""
        with np.errstate(divide="ignore", invalid="ignore"):
            squared: Floats = self.mean**2 / self.variance - 1 / self.count
            ratio: Floats = np.sqrt(np.maximum(squared, 0.0))
            return ratio

    @property
    def skewness(self) -> Floats:
        r"""``√n·Σ(x − mean)³ / (Σ(x − mean)²)^{3/2}``, NaN where nothing varies."""
        with np.errstate(divide="ignore", invalid="ignore"):
            skewness: Floats = self.count**0.5 * self.third / self.second**1.5
            return skewness

    @property
    def bimodality(self) -> Floats:
        r"""Sarle's coefficient ``(skewness² + 1) / kurtosis``, in (0, 1], NaN where nothing varies."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.skewness**2 + 1) / (self.count * self.fourth / self.second**2)


def figures(moments: Moments, curvature_density: float = float("nan")) -> dict[str, float]:
    """Return all figures of the table above by name.

    Args:
        moments: of gradients of one batch of one worker each, those of all workers together.
        curvature_density: ``φ(L)``, NaN where it was not measured.

    Raises:
        ValueError: with less than two samples.

    Example:
        >>> noisy = np.random.default_rng(0).normal(1.0, 0.1, (100, 1_000))
        >>> round(figures(Moments.of(noisy))["geometry/noise_ratio"], 2)
        0.99
    """
    if moments.count < 2:
        raise ValueError(f"the geometry of gradients needs 2 samples or more, got {moments.count}")
    deviation = np.sqrt(moments.variance)
    gradient, noise = density(moments.mean), density(deviation)
    alive = deviation > 0  # neither sign nor noise where the gradient never changed
    norm = float((moments.mean**2).sum())
    explained = float((deviation**2).sum()) / moments.count / norm if norm else 1.0
    snr = moments.snr[alive]
    values = (
        gradient,
        noise,
        noise / gradient,
        curvature_density,
        curvature_density**0.5 / gradient,
        max(0.0, 1.0 - explained),
        _median(snr),
        float((snr > CRITICAL_SNR).mean()) if alive.any() else float("nan"),
        _median(np.abs(moments.skewness[alive])),
        _median(moments.bimodality[alive]),
    )
    return dict(zip(NAMES, values, strict=True))


def sample(sizes: Sequence[int], coordinates: int, seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """Return which coordinates of each tensor to look at: so many of all, each as likely, in order.

    Args:
        sizes: of the tensors.
        coordinates: how many; all of them, if there are no more.
        seed: of the choice; workers with the same look at the same ones.

    Raises:
        ValueError: if `coordinates` is below 1.

    Example:
        >>> [len(chosen) for chosen in sample([900, 100], 100)]
        [90, 10]
    """
    if coordinates < 1:
        raise ValueError(f"coordinates must be 1 or more, got {coordinates!r}")
    total = sum(sizes)
    chosen = np.arange(total)
    if coordinates < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, coordinates, replace=False))
    ends = np.cumsum(sizes, dtype=np.int64)
    parts = np.split(chosen, np.searchsorted(chosen, ends))[: len(ends)]
    return [part - (end - size) for part, end, size in zip(parts, ends, sizes, strict=True)]


def hessian_diagonal(product: Callable[[Floats], npt.ArrayLike], coordinates: int) -> Floats:
    r"""Estimate the diagonal of a Hessian, or of its rows and columns of some coordinates, by Hutchinson's products.

    .. math:: \mathrm{diag}(H) ≈ \mathrm{mean}_z\; z ⊙ H z, \qquad z_i ∈ \{−1, +1\}

    Exact where the Hessian is diagonal. The random vectors are the same each time.

    Args:
        product: takes `z`, of shape (coordinates,), and returns ``H z`` in those coordinates; `z` is 0 in all others.
        coordinates: how many.

    Returns:
        Shape (coordinates,).

    Source: Bekas, Kokiopoulou and Saad 2007.

    Example:
        >>> hessian_diagonal(lambda z: [6.0, 12.0] * z, 2)
        array([ 6., 12.])
    """
    random, total = np.random.default_rng(0), np.zeros(coordinates)
    for _ in range(PROBES):
        z = random.choice([-1.0, 1.0], coordinates)
        total += z * np.asarray(product(z), np.float64)
    return total / PROBES


def _median(values: Floats) -> float:
    return float(np.median(values)) if values.size else float("nan")
