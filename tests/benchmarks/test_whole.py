"""Whole trainings: scores along the way, and the table as a whole."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.papers.methods import Job
from benchmarks.papers.tasks import Text
from benchmarks.papers.training import Store, train
from tests.benchmarks.test_training import _run

pytestmark = pytest.mark.multiprocess


def test_scores_along_the_way_are_those_of_a_training_that_ends_there(tmp_path: Path) -> None:
    text = Text(Path(json.__file__), 16, 1, 16, global_batch=4)
    job = Job(text.key, "SGD", 0.1, workers=1, steps=4)
    plain, scored = train(text, job), train(text, job, points=2, scored=True)
    assert not plain.scores
    assert [step for step, _ in scored.scores] == [2, 4]
    assert scored.scores[-1] == (4, scored.score)
    assert scored.score == plain.score
    store = Store(tmp_path, processes=1, scored=True)
    kept = store.run(text, [job], "")[0]
    again = Store(tmp_path).run(text, [job], "")[0]
    assert kept.scores[-1] == (4, plain.score)
    assert [tuple(point) for point in again.scores] == kept.scores


@pytest.mark.nightly
def test_the_whole_table(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.whole", "--short", "--seeds", "2", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".png", ".txt", ".txt"]
    row = r"^  (?:\S.*?) +[\d.e-]+(?: +[\d.e-]+)? +\d+ +\d\.\d{4} +[1-6] +\d\.\d{4} +\d\.\d{4}   \d\.\d{4}$"
    assert len(re.findall(row, printed, re.MULTILINE)) == 18
