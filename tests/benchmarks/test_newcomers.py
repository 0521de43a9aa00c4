"""Workers that are replaced: the table as a whole."""

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
