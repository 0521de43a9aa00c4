"""Tuning with as many runs for each method, Muon and SignMuon beside their own code, and the table as a whole."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.papers.methods import Job, hidden_groups, update_by
from benchmarks.papers.search import search
from benchmarks.papers.tasks import Images, Task, Text
from benchmarks.papers.training import Run, Store, schedule, train
from signsgd_lightning import Signum
from tests.benchmarks.test_training import _run

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def text() -> Task:
    return Text(Path(json.__file__), 16, 1, 16, global_batch=4)


class Bowl(Store):
    """Scores without training: lowest at a learning rate of 0.8 and another of 0.1."""

    def __init__(self) -> None:
        super().__init__(None)
        self.trained = list[Job]()

    def run(self, task: Task, jobs: Iterable[Job], title: str) -> list[Run]:
        jobs = list(jobs)
        self.trained += [job for job in jobs if job not in self.trained]
        return [Run(math.log(job.lr / 0.8) ** 2 + math.log((job.other_lr or 0.1) / 0.1) ** 2, []) for job in jobs]


@pytest.mark.parametrize("other_lr", [None, 0.1])
def test_a_search_ends_between_rates_that_are_worse(other_lr: float | None, text: Task) -> None:
    store = Bowl()
    found = search(text, store, Job("", "", 0.1, other_lr=other_lr), (0.0, 0.1), runs=5)
    assert (found.row.job.lr, found.row.job.other_lr, found.inside) == (0.8, other_lr, True)
    tuned = [job for job in store.trained if job.seed == 0]
    assert {0.4, 1.6} <= {job.lr for job in tuned}
    assert found.tried == len(tuned)


def test_a_search_has_its_runs_and_no_more_where_it_begins_at_the_best(text: Task) -> None:
    for other_lr in (None, 0.1):
        assert search(text, Bowl(), Job("", "", 0.8, other_lr=other_lr), (0.0, 0.1), runs=8).tried == 8
    short = search(text, Bowl(), Job("", "", 0.1), (0.0, 0.1), runs=2, most=2)
    assert (short.tried, short.inside) == (2, False)


def test_keys_of_older_runs_stay() -> None:
    assert "other_lr" not in Job("gpt", "AdamW", 0.1).key
    assert json.loads(Job("gpt", "Muon", 0.1, other_lr=0.01).key)["other_lr"] == 0.01


def test_bits_of_a_ring_and_of_a_vote() -> None:
    assert Job("", "AdamW", 1.0, workers=4, steps=480).bits == 23_040
    assert Job("", "SignMuon", 1.0, workers=4, steps=480).bits == 720


def test_the_vote_of_one_worker_is_signmuon_alone(text: Task) -> None:
    job = Job(text.key, "SignMuon", 0.04, 0.1, workers=1, steps=6, seed=3, other_lr=0.01)
    torch.manual_seed(job.seed)
    model, source = text.model(), np.random.default_rng([job.seed, 0])
    optimizer = Signum(hidden_groups(model, job), weight_decay=job.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(job.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, job.steps)
        optimizer.zero_grad()
        text.loss(model, text.batch(4, source)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert train(text, job).score == text.score(model)


def _moved(model: nn.Module, job: Job) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return each parameter before and after a step by random gradients."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    update_by(model, job)([[torch.randn_like(p) for p in model.parameters()]], 1.0)
    return {name: (before[name], p.detach()) for name, p in model.named_parameters()}


def test_muon_moves_each_matrix_by_a_root_mean_square_of_one_by_the_root_of_its_columns(text: Task) -> None:
    for model in (text.model(), Images(None, 4, 8, 8).model()):
        job = Job("", "Muon, clipped", 0.01, workers=1, other_lr=0.003)
        hidden = {id(p) for group in hidden_groups(model, job)[:-1] for _, p in group["params"]}
        names = [name for name, p in model.named_parameters() if id(p) in hidden]
        assert any(re.search(r"in_proj_weight|body\.0\.weight", name) for name in names)
        for name, (before, after) in _moved(model, job).items():
            step = float((after - before).square().mean().sqrt())
            columns = before[0].numel() if name in names else 1
            expected = 0.01 / math.sqrt(columns) if name in names else 0.003
            assert step == pytest.approx(expected, rel=0.3), name  # Newton–Schulz: singular values of 0.7 to 1.2


@pytest.mark.nightly
def test_the_whole_table(tmp_path: Path) -> None:
    printed = _run("benchmarks.papers.signmuon", "--short", "--out", tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png", ".txt"]
    for task in ("GPT on bytes, 2 steps", "ResNet on images, 2 steps"):
        assert task in printed
    for method in ("SGD, Nesterov", "AdamW, clipped", "Muon, clipped", "Lion, clipped", "SignMuon"):
        assert len(re.findall(rf"^  {method}.* \d\.\d{{4}} +\d\.\d{{4}}   \d\.\d{{4}}$", printed, re.MULTILINE)) >= 2
    for workers in (1, 3, 8):
        assert len(re.findall(rf" {workers} workers$", printed, re.MULTILINE)) == 6
