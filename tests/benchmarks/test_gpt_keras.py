"""The GPT in Keras: what it looks at, and the table as a whole."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.test_training import _run
from tests.clusters import Cluster

pytestmark = [pytest.mark.nightly, pytest.mark.multiprocess]


def _logits(rows: list[list[int]]) -> Any:
    from benchmarks.papers.gpt_keras import KerasText

    model = KerasText(Path(json.__file__), 16, 1, 8).keras_model()
    return model(np.array(rows)).detach().numpy()


def test_no_byte_is_told_by_later_ones(backend: Any) -> None:
    alone: Cluster = backend("torch")
    (logits,) = alone.run(_logits, [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9]])
    assert logits.shape == (2, 8, 256)
    np.testing.assert_allclose(logits[0, :4], logits[1, :4], atol=1e-6)
    assert np.abs(logits[0, 4:] - logits[1, 4:]).max() > 1e-3


@pytest.mark.timeout(900)
def test_the_whole_table(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.gpt_keras", "--short", "--out", tmp_path, timeout=880)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    row = r"^  (?:\S.*?) +[\d.e-]+(?: +[\d.e-]+)? +0\.1 +2\*? +5\.\d{4} +0\.\d{4}$"
    assert len(re.findall(row, printed, re.MULTILINE)) == 4
