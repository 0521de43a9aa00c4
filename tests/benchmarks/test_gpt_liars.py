"""Workers that send the opposite of their gradients: what mean and median make of them, and the table as a whole."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.papers.methods import MEDIAN, Job, update_by
from benchmarks.papers.tasks import Text
from benchmarks.papers.training import train
from tests.benchmarks.test_training import _run

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(Path(json.__file__), 16, 1, 16, global_batch=6)


def _step(method: str, gradients: list[list[Tensor]], model: torch.nn.Module) -> list[Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    update_by(model, Job("", method, 1.0, workers=3))(gradients, 1.0)
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("method", ["SGD", f"SGD{MEDIAN}"])
def test_gradients_are_put_together_by_the_mean_or_the_median(method: str) -> None:
    model, source = torch.nn.Linear(4, 3), np.random.default_rng(0)
    gradients = [[torch.tensor(source.normal(size=p.shape)).float() for p in model.parameters()] for _ in range(3)]
    combine = np.median if MEDIAN in method else np.mean
    for moved, of_workers in zip(_step(method, gradients, model), zip(*gradients, strict=True), strict=True):
        assert moved.numpy() == pytest.approx(combine([g.numpy() for g in of_workers], axis=0), abs=1e-6)


def test_liars_send_the_opposite(text: Text) -> None:
    """All three as liars climb by as much as three honest workers descend; two of three turn the mean to a third."""
    job = Job(text.key, "SGD", 1e-3, workers=3, steps=1, seed=1)
    torch.manual_seed(job.seed)
    start = text.score(text.model())
    honest, one, two, three = (train(text, job._replace(liars=n)).score - start for n in range(4))
    assert honest < 0 < three
    assert three == pytest.approx(-honest, rel=0.05)
    assert honest < one < two < three
    assert job._replace(liars=None).key == job.key


@pytest.mark.nightly
def test_the_whole_table(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.gpt_liars", "--short", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    assert len(re.findall(r"^(?:SignMuon|Signum|AdamW).*(?: +\d\.\d{3} ± \d\.\d{3}){4}$", printed, re.MULTILINE)) == 4
