"""What a model's gradients say about training it by signs: ``python -m signsgd_core.analysis.advice FILE``.

FILE is the `geometry.json` that a `GeometryMonitor` writes. Every sentence names the number that it rests on.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..settings import check_count
from ..update import warmup_steps
from .geometry import NAMES
from .theory import CRITICAL_SNR

BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
"""What is proposed."""

_SPARSER, _DENSER = 0.5, 10.0
"""Ratios of densities below and above that decide. A GPT and a ResNet had 1 to 4, which told nothing."""
_WRONG = 0.1
"""How often the median coordinate's verdict may be wrong before more workers stop to matter."""
_SKEWED, _BIMODAL = 1.0, 5 / 9
_ENOUGH = 50
"""Samples from which on the median skewness of a normal noise is below 0.25."""
_MATRICES = (
    "Matrices: if the model has hidden ones, or kernels, let these vote by their polar factors (SignMuon), of which "
    "the figures say nothing. Measured with four workers: on a GPT a loss of 1.85, verdict momentum 2.25, AdamW 2.16; "
    "on a ResNet an accuracy of 63.8%, 52.4%, 53.7%. It takes betas=(0.9, 0.95), whatever is said of momentum above."
)
"""The same for all: figures of gradients' coordinates tell nothing of polar factors; benchmarks/papers/README.md."""


def advise(records: Sequence[Mapping[str, float | None]], workers: int) -> list[str]:
    r"""Return what to do, a sentence each: signs or gradients, how many workers, which momentum, and matrices.

    Signs, if both of ``R1 = √φ(L)/φ(g)`` and ``R2 = φ(σ)/φ(g)`` are below 0.5, gradients if both are above 10.
    Workers: a vote of ``M`` errs at signal-to-noise ``S`` with ``Φ(−√M·q/√(1−q²))``, ``q = erf(S/√2)``, normal noise.
    Momentum multiplies ``S`` by ``√((1+β)/(1−β))``.

    Args:
        records: figures of `geometry.figures`, None for NaN, with ``samples``, how many gradients each rests on; their
            median over the records counts.
        workers: of the run that they are of.

    Raises:
        ValueError: without any record, or if one lacks a figure.

    Source: arXiv 1802.04434, section 3.3, Lemma D.1 and Theorem 3.

    Example:
        >>> clear = dict.fromkeys(NAMES, 0.3) | {"geometry/signal": 0.9, "samples": 400.0}
        >>> print(advise([clear], workers=4)[0])
        Signs: R2 = 0.30 and R1 = 0.30, both well below 1: noise and curvature are sparser than the gradient.
    """
    if not records:
        raise ValueError("there is no record to advise from: let the monitor see more steps")
    for name in (*NAMES, "samples"):
        if any(name not in record for record in records):
            raise ValueError(f"a record lacks {name!r}: take a file that a GeometryMonitor wrote")
    values = {name: _median([record[name] for record in records]) for name in NAMES}
    samples = _median([record["samples"] for record in records])
    snr, signal = values["geometry/snr"], values["geometry/signal"]
    return [
        _signs(values["geometry/noise_ratio"], values["geometry/curvature_ratio"], signal, samples),
        _workers(snr, workers, samples),
        _momentum(snr),
        _shape(values["geometry/skewness"], values["geometry/bimodality"], samples),
        _MATRICES,
    ]


def _signs(noise: float, curvature: float, signal: float, samples: float) -> str:
    if not signal >= 0.5:
        enough = f"about {samples * (1 - signal) / signal:,.0f}" if signal > 0 else "a few hundred"
        return (
            f"Signs or gradients: cannot tell. Noise explains {1 - signal:.0%} of the mean of {samples:,.0f} "
            f"gradients, so its density is the noise's. Let the monitor see {enough} with lr=0: what turns with the "
            "weights counts as noise."
        )
    known = [("R2", noise)] + ([] if math.isnan(curvature) else [("R1", curvature)])
    said = " and ".join(f"{name} = {value:.2f}" for name, value in known)
    what = "noise and curvature are" if len(known) == 2 else "the noise is"
    rest = "" if len(known) == 2 else " By the noise alone: the curvature was not measured."
    if all(value < _SPARSER for _, value in known):
        both = "both " if len(known) == 2 else ""
        return f"Signs: {said}, {both}well below 1: {what} sparser than the gradient.{rest}"
    if all(value > _DENSER for _, value in known):
        both = "both " if len(known) == 2 else ""
        return (
            f"Gradients: {said}, {both}well above 1: {what} denser than the gradient, and signs give each a vote.{rest}"
        )
    return f"Signs or gradients: {said}, so the bounds favour neither; signs save 31 of 32 bits.{rest}"


def _workers(snr: float, workers: int, samples: float) -> str:
    if not snr > 0:
        return (
            f"Workers: cannot tell. The median coordinate shows no signal in {samples:,.0f} gradients; as far as that "
            "goes every worker helps."
        )
    one = math.erf(snr / 2**0.5)
    z = -NormalDist().inv_cdf(_WRONG)
    enough = max(1, math.ceil(z**2 * (1 - one**2) / one**2))
    if enough == 1:
        return f"Workers: one is enough, whose signs are right at the median coordinate's S = {snr:.2g}."
    now = NormalDist().cdf(-(workers**0.5) * one / (1 - one**2) ** 0.5) if one < 1 else 0.0
    return (
        f"Workers: up to about {enough:,} still help. At the median coordinate's S = {snr:.2g} the verdict of "
        f"{workers} is wrong {now:.0%} of the time and that of {enough:,} {_WRONG:.0%}, if the noise is normal."
    )


def _momentum(snr: float) -> str:
    if not snr > 0:
        return "Momentum: cannot tell, for the same reason; 0.9 is the papers'."
    gained = {beta: snr * ((1 + beta) / (1 - beta)) ** 0.5 for beta in BETAS}
    beta = next((beta for beta in BETAS if gained[beta] > CRITICAL_SNR), BETAS[-1])
    if not beta:
        return f"Momentum: none is needed, betas=(0, 0): S = {snr:.2g} is above 2/√3 without, and so needs no warmup."
    reached = "above" if gained[beta] > CRITICAL_SNR else "still below"
    return (
        f"Momentum: betas=({beta:g}, {beta:g}) lift S from {snr:.2g} to {gained[beta]:.2g}, {reached} the 2/√3 where "
        f'signs get reliable; warmup_steps="auto" votes by the gradient for the {warmup_steps(beta):,} steps that this '
        "takes."
    )


def _shape(skewness: float, bimodality: float, samples: float) -> str:
    said = f"median skewness {skewness:.2f}, Sarle's coefficient {bimodality:.2f} over {samples:,.0f} gradients"
    if math.isnan(skewness):
        return "Noise: there is none."
    if samples < _ENOUGH:
        return f"Noise: cannot tell its shape from {samples:,.0f} gradients; {_ENOUGH} would do."
    if skewness > _SKEWED or bimodality > _BIMODAL:
        return (
            f"Noise: not unimodal and symmetric ({said}), so more workers need not make the vote better; larger "
            "batches on each bring it nearer to a normal one."
        )
    return f"Noise: unimodal and symmetric as far as seen ({said}), as Theorem 2 wants it."


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.median(known)) if known else math.nan


def read(path: Path) -> dict[str, Any]:
    """Return what a `GeometryMonitor` wrote.

    Raises:
        ValueError: if the file is not that, with its name and what is missing.
    """
    try:
        document = json.loads(path.read_text())
        records, workers = list(document["records"]), int(document["workers"])
        check_count("workers", workers, 1)
        if not all(value is None or float(value) == value for record in records for value in record.values()):
            raise ValueError("its records hold something else than numbers")
        return {"records": records, "workers": workers}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no file of a GeometryMonitor: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the advice for a file."""
    parser = argparse.ArgumentParser(
        prog="python -m signsgd_core.analysis.advice", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("file", type=Path, help="geometry.json, as a GeometryMonitor writes it")
    path = parser.parse_args(arguments).file
    if not path.is_file():
        parser.error(f"argument file: no file {str(path)!r}")
    try:
        print("\n".join(advise(**read(path))))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
