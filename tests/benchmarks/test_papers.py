"""The papers' experiments run as scripts, short: what is claimed of them shows at that size, and files are saved."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Seconds each on a quiet machine, many times that on a busy one.
pytestmark = [pytest.mark.timeout(600), pytest.mark.nightly, pytest.mark.multiprocess]


def _run(name: str, folder: Path) -> list[str]:
    """Return the lines that a short run printed, after looking at the files that it saved."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"benchmarks.papers.{name}", "--short", "--out", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"out"}, "it left files behind"
    assert {path.name for path in (folder / "out").iterdir()} == {f"{name}.txt", f"{name}.png"}
    assert (folder / "out" / f"{name}.txt").read_text() == done.stdout
    assert (folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    first, *lines = done.stdout.splitlines()
    assert re.fullmatch(rf".+, \d+ cores, .+: python -m benchmarks\.papers\.{name} --short --out out: \d+ s", first)
    return lines


def test_signs_win_where_the_noise_is_sparse_and_lose_where_the_gradient_is(tmp_path: Path) -> None:
    ratios, losses, problem = {}, {}, ""
    for line in _run("toy_sparse_noise", tmp_path):
        if match := re.match(r"(sparse .+): at the start R2 = ([\d.]+), R1", line):
            problem, ratios[match[1]] = match[1], float(match[2])
        elif match := re.match(r"  (signSGD|SGD) +mean of all steps +[\d.]+\*? +([\d.]+) \[", line):
            losses[problem, match[1]] = float(match[2])
    assert ratios["sparse noise"] < 0.5
    assert ratios["sparse gradient"] > 2
    assert losses["sparse noise", "signSGD"] < losses["sparse noise", "SGD"] / 2
    assert losses["sparse gradient", "SGD"] < losses["sparse gradient", "signSGD"] / 2


def test_a_vote_bears_more_inverters_than_averaging_at_its_rate_and_one_that_shouts(tmp_path: Path) -> None:
    cell = r" +(diverges|[\d.]+)(?: ± [\d.]+)?"
    rows = {}
    for line in _run("quadratic_liars", tmp_path):
        if match := re.match(rf"(\d+(?:, ×100)?) +(?:\d+% +)?{cell}{cell} +\S+{cell}{cell} +\S+$", line):
            rows[match[1]] = [float("inf") if loss == "diverges" else float(loss) for loss in match.groups()[1:]]
    fixed_vote, vote, fixed_averaging, averaging = ({column: row[k] for column, row in rows.items()} for k in range(4))
    for losses in (fixed_vote, vote, fixed_averaging, averaging):
        assert losses["0"] < losses["9"] < losses["13"] < 500
    assert fixed_vote["13"] < fixed_averaging["13"]
    assert fixed_vote["1, ×100"] < 1.5 * fixed_vote["0"]
    assert averaging["1, ×100"] == float("inf")


def test_the_rule_positive_drifts_and_the_others_do_not(tmp_path: Path) -> None:
    lines = _run("zeros_and_ties", tmp_path)
    cell = r" +([+-][\d.]+) \(([\d,]+)\)"
    drifts = {
        (int(match[1]), match[2]): [float(match[k]) for k in (3, 5, 7, 9)]
        for line in lines
        if (match := re.match(rf"(\d) +(\w+){cell * 4}$", line))
    }
    for workers in (2, 3):
        zero, noise, signal, ties = zip(
            *(drifts[workers, rule] for rule in ("alternate", "abstain", "positive")), strict=True
        )
        assert zero == (0, 0, -1)
        assert noise[2] == -1
        assert max(map(abs, noise[:2])) < 0.02
        assert signal[1] == 1
        assert signal[0] < 0.8, "one bit that alternates loses some of one worker's signal"
        assert ties[2] == pytest.approx(-0.5 if workers == 2 else 0, abs=0.02)
        assert max(map(abs, ties[:2])) < 0.02
    losses = {
        match[1]: float(match[2]) for line in lines if (match := re.match(r"signSGD +2 +(\w+) +\S+ +([\d.]+) ±", line))
    }
    assert losses["positive"] > 1.1 * max(losses["alternate"], losses["abstain"])


def test_warmup_votes_by_the_gradient_for_as_many_steps_as_the_theorem_says(tmp_path: Path) -> None:
    lines = _run("warmup", tmp_path)
    row = r"(quadratic|digits) +(\d) +([\d.]+) +(\d+) +(\d+) +([\d.]+) ± .+?([\d.]+)\*? +([\d.]+) ± ([\d.]+) +([\d.]+)"
    off, on = {}, {}
    for line in lines:
        if match := re.match(row, line):
            problem, workers, beta, length, step = match[1], int(match[2]), match[3], int(match[4]), int(match[5])
            assert length == {"0.9": 54, "0.99": 894}[beta]
            off[problem, workers, beta, step] = float(match[6])
            on[problem, workers, beta, step] = float(match[8])
    for problem in ("quadratic", "digits"):
        for workers in (1, 4):
            assert on[problem, workers, "0.9", 10] == on[problem, workers, "0.99", 10], "both are still warming up"
            assert on[problem, workers, "0.9", 60] != on[problem, workers, "0.99", 60], "one has momentum by now"
            assert off[problem, workers, "0.9", 10] != off[problem, workers, "0.99", 10], "both have momentum"
    for workers in (1, 4):
        assert on["quadratic", workers, "0.99", 60] < off["quadratic", workers, "0.99", 60] / 2
        assert off["digits", workers, "0.9", 60] < on["digits", workers, "0.9", 60]
    assert re.match(r"of all lines: ", lines[-1])
