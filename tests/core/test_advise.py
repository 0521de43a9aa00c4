"""Advice: what is said of gradients whose geometry is known, and what is not said of those that show too little."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from signsgd_core.analysis.advice import advise
from signsgd_core.analysis.geometry import NAMES, Moments
from signsgd_core.analysis.report import GeometryReport


def told(gradients: np.ndarray, workers: int = 4, curvature: float = math.nan) -> list[str]:
    report = GeometryReport(workers, gradients.shape[1], gradients.shape[1])
    report.add(len(gradients), Moments.of(gradients), curvature)
    return advise(report.records, workers)


def gradients(mean: float | np.ndarray, spread: float | np.ndarray, n: int = 500, d: int = 1_000) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, spread, (n, d))


SPARSE = np.where(np.arange(1_000) < 10, 1.0, 1e-3)
"""Large on a hundredth of the coordinates."""


def test_signs_where_the_noise_is_sparser() -> None:
    assert told(gradients(1.0, SPARSE))[0].startswith("Signs: R2 = 0.0")
    assert "curvature was not measured" in told(gradients(1.0, SPARSE))[0]
    assert told(gradients(1.0, SPARSE), curvature=0.01)[0].startswith(
        "Signs: R2 = 0.01 and R1 = 0.10, both well below 1"
    )


def test_gradients_where_the_noise_is_denser() -> None:
    assert told(gradients(SPARSE * 10, 1.0))[0].startswith("Gradients: R2 = ")
    assert told(gradients(SPARSE * 10, 1.0), curvature=1.0)[0].startswith("Gradients: R2 = ")
    assert "favour neither" in told(gradients(SPARSE * 10, 1.0), curvature=1e-4)[0]


def test_neither_where_the_noise_is_a_few_times_denser() -> None:
    """R2 = φ(σ)/φ(g) = 4, as of nets on which signs were faster than SGD."""
    quarter = np.where(np.arange(1_000) < 250, 10.0, 0.0)
    assert told(gradients(quarter, 1.0), 4)[0].startswith("Signs or gradients: R2 = 3.9")
    assert "favour neither" in told(gradients(quarter, 1.0), 4, 1.0)[0]


def test_neither_where_both_are_as_dense() -> None:
    assert told(gradients(1.0, 1.0))[0].startswith("Signs or gradients: R2 = 1.00, so the bounds favour neither")


def test_nothing_is_said_of_noise_alone() -> None:
    signs, workers, momentum, *_ = told(gradients(0.0, 1.0, n=50))
    assert signs.startswith("Signs or gradients: cannot tell. Noise explains")
    assert "cannot tell" in momentum or "still below" in momentum
    assert "of 50 gradients" in signs
    signs, workers, momentum, *_ = told(np.repeat([[1.0], [-1.0]], 25, axis=0) * np.ones(10))
    assert "cannot tell" in signs
    assert workers.startswith("Workers: cannot tell.")
    assert momentum.startswith("Momentum: cannot tell")


def test_one_worker_is_enough_where_signs_are_right() -> None:
    assert told(gradients(3.0, 1.0))[1].startswith("Workers: one is enough")


@pytest.mark.parametrize(("snr", "enough"), [(0.1, 257), (0.5, 10)])
def test_workers_until_a_tenth_of_the_verdicts_is_wrong(snr: float, enough: int) -> None:
    """Counted by simulation: an odd number of workers nearest to what is said, and one ten times as large."""
    sentence = told(gradients(snr, 1.0, n=4_000))[1]
    said = int(sentence.split("about ")[1].split(" ")[0].replace(",", ""))
    assert said == pytest.approx(enough, rel=0.08)
    rng = np.random.default_rng(1)

    def wrong(workers: int) -> float:
        return float((rng.binomial(workers, 0.5 * (1 + math.erf(snr / 2**0.5)), 100_000) < workers / 2).mean())

    assert wrong(said | 1) == pytest.approx(0.1, abs=0.03)
    assert wrong(4 * said | 1) < 0.02


def test_momentum_lifts_signal_to_noise_over_the_critical_one() -> None:
    """√((1+β)/(1−β)): with .9 it is 4.36, so .3 becomes 1.31, above 2/√3; with .8 it is 3, so it becomes .9."""
    assert "betas=(0.9, 0.9) lift S from 0.3 to 1.3, above" in told(gradients(0.3, 1.0, n=20_000, d=200))[2]
    assert 'warmup_steps="auto" votes by the gradient for the 54 steps' in told(gradients(0.3, 1.0, n=20_000, d=200))[2]
    assert "none is needed" in told(gradients(2.0, 1.0))[2]
    assert "betas=(0.99, 0.99)" in told(gradients(0.02, 1.0, n=20_000, d=200))[2]
    assert "still below" in told(gradients(0.02, 1.0, n=20_000, d=200))[2]


def test_the_shape_of_noise() -> None:
    rng = np.random.default_rng(2)
    assert "unimodal and symmetric as far as seen" in told(rng.normal(size=(500, 100)))[3]
    assert "not unimodal and symmetric" in told(rng.standard_exponential((500, 100)))[3]
    assert "not unimodal and symmetric" in told(rng.choice([-1.0, 1.0], (500, 100)))[3]
    assert told(np.ones((5, 3)))[3] == "Noise: there is none."
    assert told(rng.normal(size=(49, 100)))[3] == "Noise: cannot tell its shape from 49 gradients; 50 would do."


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_matrices_vote_by_polar_factors_whatever_the_gradients_say(mean: float) -> None:
    assert told(gradients(mean, 1.0))[-1].startswith("Matrices: if the model has hidden ones, or kernels")


def test_records_that_are_none() -> None:
    with pytest.raises(ValueError, match="no record"):
        advise([], 1)
    with pytest.raises(ValueError, match="lacks 'samples'"):
        advise([dict.fromkeys(NAMES, 1.0)], 1)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "signsgd_core.analysis.advice", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_report_is_read_again(tmp_path: Path) -> None:
    report = GeometryReport(workers=2, parameters=5_000, coordinates=1_000)
    for step in (100, 200):
        report.add(step, Moments.of(gradients(1.0, SPARSE)), 0.25)
    said = report.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["geometry.json", "geometry.png"]
    done = run(tmp_path / "new" / "geometry.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == said
    document = json.loads((tmp_path / "new" / "geometry.json").read_text())
    assert [record["step"] for record in document["records"]] == [100, 200]
    assert sum(document["snr"]["counts"]) == 1_000


def test_a_plot_leaves_the_users_backend_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    report = GeometryReport(1, 1_000, 1_000)
    report.add(100, Moments.of(gradients(1.0, SPARSE)))
    report.save(tmp_path)
    assert matplotlib.rcParams["backend"] == "svg"


def test_nothing_is_written_of_nothing(tmp_path: Path) -> None:
    assert GeometryReport(1, 3, 3).save(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_records_stay_bounded() -> None:
    report = GeometryReport(1, 3, 3)
    moments = Moments.of(np.arange(6.0).reshape(2, 3))
    for step in range(5_000):
        report.add(step, moments)
    assert len(report.records) <= 1_000
    assert report.records[0]["step"] == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        '{"workers": 2}',
        '{"workers": 2, "records": [{}]}',
        '{"workers": 2, "records": [1]}',
        '{"workers": 2, "records": [{"step": 1, "samples": "many"}]}',
        '{"workers": 0, "records": []}',
        "\udcff",
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    done = run(path)
    assert done.returncode == 2
    assert "GeometryMonitor" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_file(tmp_path: Path) -> None:
    assert "no file" in run(tmp_path / "none").stderr
