"""The papers' bounds against simulation: they hold, are tight where they are said to be, and fall as they should."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from signsgd_core.analysis import theory

Floats = npt.NDArray[np.float64]
Sample = Callable[[np.random.Generator, tuple[int, ...]], Floats]

CURVATURE = np.array([8.0, 2.0, 1.0, 1.0, 0.5, 0.25])
START = np.array([0.5, -1.0, 1.0, 2.0, -2.0, 1.0])
NOISE = np.array([4.0, 0.5, 1.0, 0.1, 2.0, 1.0])
GAP = float(CURVATURE @ START**2 / 2)

SHAPES: dict[str, Sample] = {
    "normal": lambda random, size: random.standard_normal(size),
    "uniform": lambda random, size: random.uniform(-(3**0.5), 3**0.5, size),
    "Laplace": lambda random, size: random.laplace(0.0, 0.5**0.5, size),
}
"""Of mean 0 and standard deviation 1, unimodal and symmetric."""


def skewed(random: np.random.Generator, size: tuple[int, ...]) -> Floats:
    """Mostly a little below its mean of 0, rarely far above; standard deviation 1."""
    return np.where(random.random(size) < 0.1, 3.0, -1 / 3)


def descend(
    steps: int,
    lr: float,
    batch: int,
    sample: Sample,
    workers: int = 1,
    inverters: int = 0,
    signs: bool = True,
    seed: int = 0,
) -> Floats:
    """Return the gradients ``g_k`` of a quadratic on the way down, shape (steps, coordinates)."""
    random, x = np.random.default_rng(seed), START.copy()
    honest = np.where(np.arange(workers) < inverters, -1, 1)[:, None]
    path = []
    for _ in range(steps):
        g = CURVATURE * x
        path.append(g)
        noise = sample(random, (workers, batch, len(x))).mean(1) if batch > 1 else sample(random, (workers, len(x)))
        gradients = g + NOISE * noise
        step = np.sign((honest * np.sign(gradients)).sum(0)) if signs else gradients.mean(0)
        x = x - lr * step
    return np.array(path)


def mean_norm(steps: int, seeds: int = 8, **settings: Any) -> float:
    """Return the mean ``‖g_k‖₁`` over the way down and over seeds, with the batches of the theorems of 2018."""
    lr = settings.pop("lr", theory.learning_rate(CURVATURE, steps))
    runs = [np.abs(descend(steps, lr, batch=steps, seed=seed, **settings)).sum(1).mean() for seed in range(seeds)]
    return float(np.mean(runs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("snr", [0.0, 0.1, 0.5, 1.0, theory.CRITICAL_SNR, 1.2, 2.0, 5.0])
def test_the_lemma_holds(shape: str, snr: float) -> None:
    noise, count = SHAPES[shape](np.random.default_rng(0), (400_000,)), 400_000
    wrong = float((snr + noise < 0).mean())
    assert wrong <= float(theory.sign_error(snr)) + 4 * (0.25 / count) ** 0.5


def test_the_lemma_is_tight() -> None:
    """Uniform noise attains the second branch; nothing but a flat top of the right width, else 0, the first."""
    random, count = np.random.default_rng(0), 400_000
    for snr in (0.1, 0.5, 1.0, 1.15):
        wrong = (snr + SHAPES["uniform"](random, (count,)) < 0).mean()
        assert wrong == pytest.approx(float(theory.sign_error(snr)), abs=4 * (0.25 / count) ** 0.5)
    for snr in (1.2, 2.0, 4.0):
        wide = random.uniform(-1.5 * snr, 1.5 * snr, count)
        noise = np.where(random.random(count) < 4 / (3 * snr**2), wide, 0.0)
        assert noise.std() == pytest.approx(1.0, abs=0.02)
        assert (snr + noise < 0).mean() == pytest.approx(float(theory.sign_error(snr)), abs=0.001)


def test_the_branches_meet() -> None:
    below, above = theory.sign_error([theory.CRITICAL_SNR, np.nextafter(theory.CRITICAL_SNR, 2)])
    assert below == pytest.approx(1 / 6)
    assert above == pytest.approx(1 / 6)
    assert theory.sign_error(np.inf) == 0


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_sgd(steps: int) -> None:
    lr = 1 / CURVATURE.max()
    runs = [descend(steps, lr, steps, SHAPES["normal"], signs=False, seed=seed) for seed in range(8)]
    squares = np.mean([(run**2).sum(1).mean() for run in runs])
    assert squares <= theory.sgd_bound(GAP, CURVATURE, NOISE, steps**2)


@pytest.mark.parametrize("sample", [*SHAPES.values(), skewed], ids=[*SHAPES, "skewed"])
@pytest.mark.parametrize("steps", [4, 16, 64])
def test_signsgd(sample: Sample, steps: int) -> None:
    assert mean_norm(steps, sample=sample) <= theory.signsgd_bound(GAP, CURVATURE, NOISE, steps**2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workers", [1, 3, 4, 9])
def test_majority_vote_with_symmetric_noise(shape: str, workers: int) -> None:
    bound = theory.majority_vote_bound(GAP, CURVATURE, NOISE, 16**2, workers, unimodal_symmetric=True)
    assert mean_norm(16, sample=SHAPES[shape], workers=workers) <= bound


@pytest.mark.parametrize("workers", [3, 9])
def test_majority_vote_with_any_noise(workers: int) -> None:
    bound = theory.majority_vote_bound(GAP, CURVATURE, NOISE, 16**2, workers, unimodal_symmetric=False)
    assert bound == theory.signsgd_bound(GAP, CURVATURE, NOISE, 16**2)
    assert mean_norm(16, sample=skewed, workers=workers) <= bound


@pytest.mark.parametrize("shape", SHAPES)
def test_small_batches(shape: str) -> None:
    steps = 400
    lr = theory.learning_rate(CURVATURE, steps, GAP)
    norms = [
        np.mean([theory.mixed_norm(g, NOISE) for g in descend(steps, lr, 1, SHAPES[shape], seed=seed)])
        for seed in range(8)
    ]
    assert np.mean(norms) <= theory.small_batch_bound(GAP, CURVATURE, steps)


@pytest.mark.parametrize(("workers", "inverters"), [(1, 0), (7, 0), (7, 2), (7, 3), (27, 13)])
def test_inverters(workers: int, inverters: int) -> None:
    bound = theory.inverters_bound(GAP, CURVATURE, NOISE, 16**2, workers, inverters / workers)
    lr = theory.learning_rate(CURVATURE, 16, GAP)
    assert mean_norm(16, sample=SHAPES["normal"], workers=workers, inverters=inverters, lr=lr) <= bound


def test_noise_falls_with_the_root_of_the_workers() -> None:
    """What a vote loses to noise is ``|g|`` where its sign is wrong: at the worst gradient, as ``σ/√M``."""
    random, counts, draws = np.random.default_rng(0), np.array([1, 5, 25, 125, 625]), 100_000
    worst = []
    for workers in counts:
        snrs = np.linspace(0.2, 1.6, 15) / workers**0.5
        means = [(random.standard_normal(draws) < snr).mean() for snr in snrs]  # how often one worker is right
        right = [random.binomial(workers, p, draws) for p in means]
        worst.append(max(snr * (votes < workers / 2).mean() for snr, votes in zip(snrs, right, strict=True)))
    slope = np.polyfit(np.log(counts), np.log(worst), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.05)


def test_skewed_noise_gets_worse_with_more_workers() -> None:
    """A tenth of the gradients is 50, the rest −1: the mean is 4.1."""
    random = np.random.default_rng(0)
    wrong = []
    for workers in (1, 3, 9, 27):
        gradients = np.where(random.random((20_000, workers)) < 0.1, 50.0, -1.0)
        wrong.append(float((np.sign(gradients).sum(1) < 0).mean()))
    assert wrong == sorted(wrong)
    assert wrong[0] == pytest.approx(0.9, abs=0.01)
    assert wrong[-1] > 0.999


def test_signum_rate_weighs_noise_against_curvature() -> None:
    def rate(beta: float, **changed: Any) -> float:
        quantities: dict[str, Any] = {"gap": GAP, "curvature": CURVATURE, "noise": NOISE, "calls": 10**7, "lr": 0.01}
        return theory.signum_rate(**quantities | changed, beta=beta)

    assert rate(0.9) < rate(0.0)  # noise counts √(1−β)
    assert rate(0.9, noise=0 * NOISE) > rate(0.0, noise=0 * NOISE)  # and curvature 1/(1−β)
    gap = 0.0
    ratio = rate(0.75, gap=gap, noise=0 * NOISE) / rate(0.0, gap=gap, noise=0 * NOISE)
    assert ratio == pytest.approx(4)
    exact = 10**-1.75 * (GAP / 0.01 + (1 + np.log(10**7)) * (0.02 * CURVATURE.sum() + 0.5**0.5 * NOISE.sum()))
    assert rate(0.5) == pytest.approx(exact)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: theory.sign_error([1.0, -2.0]), r"snr must be 0 or more, got -2\.0"),
    (lambda: theory.sign_error(np.nan), "snr must be 0 or more, got nan"),
    (lambda: theory.signsgd_bound(-1.0, [1.0], [1.0], 4), r"gap must be 0 or more and finite, got -1\.0"),
    (lambda: theory.signsgd_bound(1.0, [1.0], [1.0], 0), "calls must be 1 or more, got 0"),
    (lambda: theory.signsgd_bound(1.0, [1.0], [-1.0], 4), "noise must be a vector of finite numbers of 0 or more"),
    (lambda: theory.signsgd_bound(1.0, [1.0, np.inf], [1.0], 4), "curvature must be a vector of finite numbers"),
    (lambda: theory.signsgd_bound(1.0, [1.0, 2.0], [1.0], 4), "one entry a coordinate, got 2 and 1"),
    (lambda: theory.sgd_bound(1.0, [0.0], [1.0], 4), "curvature must be above 0 somewhere"),
    (lambda: theory.majority_vote_bound(1.0, [1.0], [1.0], 4, 0, True), "workers must be 1 or more, got 0"),
    (lambda: theory.inverters_bound(1.0, [1.0], [1.0], 4, 4, 0.5), r"share in \[0, 0\.5\): half .*, got 0\.5"),
    (lambda: theory.mixed_norm([1.0], [-1.0]), r"noise must be 0 or more everywhere, got -1\.0"),
    (lambda: theory.mixed_norm([1.0], [np.nan]), "noise must be 0 or more everywhere, got nan"),
    (lambda: theory.learning_rate(np.array(4.0), 25), "curvature must be a vector of finite numbers"),
    (lambda: theory.small_batch_bound(1.0, np.array(4.0), 900), "curvature must be a vector of finite numbers"),
    (lambda: theory.signum_rate(1.0, [1.0], [1.0], 100, 0.9, 0.1), r"the warmup of beta=0\.9 takes, 1485, got 100"),
    (lambda: theory.signum_rate(1.0, [1.0], [1.0], 100, 0.0, 0.0), r"lr must be above 0, got 0\.0"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_is_out_of_range_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
