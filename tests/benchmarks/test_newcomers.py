"""Workers that are replaced, simulated and as processes: the tables as a whole."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.test_training import _run


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_the_whole_table(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.newcomers", "--short", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    assert len(re.findall(r"^Sign\w+ *(?: +\d\.\d{3} ± \d\.\d{3}){4}$", printed, re.MULTILINE)) == 2


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_churn(tmp_path: Path) -> None:
    """Processes are killed and started anew, and all hold the same model in the end."""
    pytest.importorskip("torchft", reason="the extra `elastic` is not installed")
    printed = _run("benchmarks.papers.churn", "--short", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".txt"]
    workers = [
        float(x) for x in re.findall(r"^(?:undisturbed|every worker lost twice) +(\d\.\d\d) ", printed, re.MULTILINE)
    ]
    assert workers[0] == 4
    assert 3 <= workers[1] < 4
