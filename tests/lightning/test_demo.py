"""`python -m signsgd_lightning` as a user runs it, with a worker that lies; wrong options."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from signsgd_lightning.__main__ import main

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^(.{34}) *([\d.]+)% .* bit-identical$", re.MULTILINE)


@pytest.mark.parametrize("adversaries", ["nan", pytest.param("silent", marks=pytest.mark.nightly)])
def test_a_vote_outlives_a_worker_that_lies(adversaries: str, tmp_path: Path) -> None:
    """A mean does not outlive NaN."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    arguments = ["--workers=3", "--steps=16", f"--adversaries={adversaries}", "--no-plot"]
    process = subprocess.Popen(
        [sys.executable, "-m", "signsgd_lightning", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    rows = {method.strip(): float(accuracy) for method, accuracy in ROW.findall(output)}
    votes = ["Signum (0.9, 0.9), vote", "verdict momentum 0.8, vote", "SignMuon, vote"]
    assert list(rows) == ["AdamW, plain DDP", *votes], output
    mean, *voted = rows.values()
    assert (mean < 20) == (adversaries == "nan")
    assert min(voted) > 60
    assert f"adversaries: the last 1 of 3 workers ({adversaries}), in every run\n" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adversaries", "thief"], "--adversaries: must be names of invert, random, constant, silent, nan, collude"),
        (["--workers=2", "--adversaries=nan,nan"], "--adversaries: must be fewer than the 2 workers, got 2"),
    ],
)
def test_wrong_options_end_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m signsgd_lightning: error: ")
    assert sentence in last
