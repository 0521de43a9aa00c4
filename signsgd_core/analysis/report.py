"""What a GeometryMonitor of any front end keeps and leaves behind: records, plots, and a word of advice."""

import contextlib
import json
import math
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .advice import advise
from .geometry import Moments, figures
from .theory import CRITICAL_SNR

_SNR_EDGES = np.geomspace(1e-3, 1e2, 51)
_SKEWNESS_EDGES = np.linspace(-3, 3, 61)
_MOST_RECORDS = 1_000
"""However long a run is; then every other one goes."""


class GeometryReport:
    """Records of `signsgd_core.analysis.geometry`, and from the last of them the histograms of all coordinates.

    Args:
        workers: whose gradients they are of.
        parameters: of the model.
        coordinates: of them, how many are looked at.

    Example:
        >>> report = GeometryReport(workers=1, parameters=3, coordinates=3)
        >>> moments = Moments.of(np.random.default_rng(0).normal(size=(50, 3)))
        >>> round(report.add(50, moments)["geometry/noise_density"])
        1
    """

    def __init__(self, workers: int, parameters: int, coordinates: int) -> None:
        self.workers, self.parameters, self.coordinates = workers, parameters, coordinates
        self.records: list[dict[str, float | None]] = []
        self._last: Moments | None = None

    def add(self, step: int, moments: Moments, curvature_density: float = math.nan) -> dict[str, float]:
        """Keep the figures of some gradients, and return them.

        Args:
            step: the training step they were seen before.
            moments: of the gradients of all workers.
            curvature_density: as in `signsgd_core.analysis.geometry.figures`.
        """
        values = figures(moments, curvature_density)
        self._last = moments
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        self.records.append({"step": step, "samples": moments.count, **known})
        if len(self.records) > _MOST_RECORDS:
            del self.records[1::2]
        return values

    def save(self, directory: Path | None) -> list[str]:
        """Return the advice; write `geometry.json` and, where matplotlib is installed, `geometry.png`."""
        if self._last is None:
            return []
        if directory is not None:
            self._write(directory, self._last)
        return advise(self.records, self.workers)

    def _write(self, directory: Path, last: Moments) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        document = {
            "workers": self.workers,
            "parameters": self.parameters,
            "coordinates": self.coordinates,
            "records": self.records,
            "snr": _histogram(last.snr, _SNR_EDGES),
            "skewness": _histogram(last.skewness, _SKEWNESS_EDGES),
        }
        (directory / "geometry.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        with contextlib.suppress(ModuleNotFoundError):  # the numbers are there
            plot(document, directory / "geometry.png")


def check_monitor(every_n_steps: int, samples: int, coordinates: int) -> None:
    """Make sure that a monitor's settings are whole numbers in their ranges.

    Raises:
        ValueError: if one is not.
    """
    for name, value, least in (
        ("every_n_steps", every_n_steps, 2),
        ("samples", samples, 2),
        ("coordinates", coordinates, 1),
    ):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
    if samples > every_n_steps:
        raise ValueError(f"samples must be at most every_n_steps={every_n_steps}, got {samples}")


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw what a `geometry.json` holds: densities through training, signal-to-noise, and how symmetric the noise is.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's

    figure = Figure(figsize=(14, 4), layout="constrained")
    densities, snr, skewness = figure.subplots(1, 3)
    steps = [record["step"] for record in document["records"]]
    for what, symbol in (("gradient", "g"), ("noise", "σ"), ("curvature", "L")):
        values = [record[f"geometry/{what}_density"] for record in document["records"]]
        if any(value is not None for value in values):
            drawn = [math.nan if value is None else value for value in values]
            densities.plot(steps, drawn, marker=".", label=f"{what}, φ({symbol})")
    densities.set(title="densities through training", xlabel="step", ylim=(0, 1.02))
    densities.legend()
    _bars(snr, document["snr"])
    snr.axvline(CRITICAL_SNR, color="black", linewidth=0.8, linestyle="--", label="2/√3")
    snr.set(title="signal-to-noise at the end", xscale="log", xlabel="S = |g|/σ", ylabel="coordinates")
    snr.legend()
    _bars(skewness, document["skewness"])
    skewness.set(title="symmetry of the noise at the end", xlabel="skewness")
    figure.suptitle(
        f"{document['coordinates']:,} of {document['parameters']:,} coordinates, workers: {document['workers']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _histogram(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> dict[str, list[float]]:
    """Count values between edges; those beyond count at the ends, NaN nowhere."""
    inside = np.clip(values[~np.isnan(values)], edges[0], edges[-1])
    return {"edges": edges.tolist(), "counts": np.histogram(inside, edges)[0].tolist()}


def _bars(axes: Any, histogram: dict[str, list[float]]) -> None:
    axes.stairs(histogram["counts"], histogram["edges"], fill=True)
