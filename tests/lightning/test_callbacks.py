"""`VoteMonitor`: its figures are exact on given gradients, and reach whatever logger the user has."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger

from signsgd_core import Zeros
from signsgd_core.network.traffic import majority_vote
from signsgd_core.wire import HEADER_BYTES
from signsgd_lightning import VoteMonitor, kernels
from signsgd_lightning.vote.observers import VoteStatistics
from tests.votes import SIZES, STEPS, Figures, expected_figures, given_gradients
from tests.workers import Workers

from .models import Given, GivenByTwo, Net, trainer


class Notes(Logger):
    """A user's own logger: keeps what it is given."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, Figures]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def _monitor(given: Any, settings: dict[str, Any], **signum: Any) -> tuple[list[Any], Figures]:
    notes = Notes()
    run = trainer(callbacks=[VoteMonitor()], logger=notes, **settings)
    run.fit(Given(given, betas=(0.0, 0.0), **signum))
    rows = [row for row in notes.rows if "vote/ties" in row[1]]
    return rows, {name: float(value) for name, value in run.callback_metrics.items()}


def _observe(given: Any, zeros: Zeros, every: int) -> tuple[list[Any], Figures]:
    return _monitor(given, {"log_every_n_steps": every}, zeros=zeros)


@pytest.mark.parametrize(
    ("ranks", "zeros", "every"),
    [
        pytest.param(ranks, zeros, every, marks=[] if (ranks + k + every) % 2 else [pytest.mark.nightly])
        for ranks in (2, 3, 4)
        for k, zeros in enumerate(("alternate", "abstain", "positive"))
        for every in (2, 3)
    ],  # by default every two of the three meet
)
def test_figures_are_exact(ranks: int, zeros: Zeros, every: int, workers: Workers) -> None:
    given = given_gradients(ranks)
    bytes_per_step = majority_vote(sum(SIZES), ranks, zeros)
    for rows, metrics in workers.run(ranks, _observe, given, zeros, every):
        assert [step for step, _ in rows] == list(range(every - 1, STEPS, every))
        for k, ((_, row), expected) in enumerate(zip(rows, expected_figures(given, zeros, every), strict=True)):
            first = 0 if k else HEADER_BYTES * (ranks - 1) / every  # the ranks compare their weights, once
            assert row.pop("vote/bytes_per_step") == pytest.approx(bytes_per_step + first, rel=1e-12)
            assert 0 < row.pop("vote/exchange_seconds") < 5
            assert row == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert metrics["vote/nonfinite"] == rows[-1][1]["vote/nonfinite"] > 0


def _sparse_use(given: Any) -> tuple[list[Any], Figures]:
    return _monitor(given, {"log_every_n_steps": 1, "strategy": "majority_vote_find_unused_parameters_true"})


def test_bytes_with_presence_bits(workers: Workers) -> None:
    """One bit a parameter and peer, where somebody lacks one; nothing for coordinates that nobody votes on."""
    given = given_gradients(3)
    given[1][2][0] = None
    for worker in given[3]:
        worker[2] = None
    whole = majority_vote(sum(SIZES), 3)
    without = majority_vote(SIZES[0] + SIZES[1], 3)
    expected = [whole + 2 * HEADER_BYTES, whole + 2 * 1, whole, without + 2 * 1, whole, whole]
    for rows, _ in workers.run(3, _sparse_use, given):
        assert [row["vote/bytes_per_step"] for _, row in rows] == expected


def _accumulated(given: Any) -> tuple[list[Any], Figures]:
    return _monitor(given, {"log_every_n_steps": 3, "accumulate_grad_batches": 2})


def test_bytes_of_a_vote_on_several_batches(workers: Workers) -> None:
    whole = majority_vote(sum(SIZES), 2)
    for rows, _ in workers.run(2, _accumulated, given_gradients(2)):
        assert [row["vote/bytes_per_step"] for _, row in rows] == [pytest.approx(whole + HEADER_BYTES / 3)]


def test_padding_is_no_coordinate_where_a_mask_tells_of_some() -> None:
    """Of 50 coordinates in 64 bits a rank voted on all but three, in one of them unlike the verdict."""
    statistics, ballot = VoteStatistics(), torch.zeros(1, 8, dtype=torch.uint8)
    mask = torch.full((1, 8), 255, dtype=torch.uint8)
    mask[0, 0] = 0b11111000
    bits = torch.zeros(1, 8, dtype=torch.uint8)
    bits[0, 0] = 0b00001001  # the first of these is where it did not vote
    statistics.verdict(kernels.for_device(ballot.device), 0, 50, ballot, bits, mask)
    assert statistics.take(["coordinates", "disagreements"]) == [47, 1]


def _to_csv(given: Any, folder: str) -> None:
    logger = CSVLogger(folder, name="", version="")
    run = trainer(callbacks=[VoteMonitor()], logger=logger, log_every_n_steps=3)
    run.fit(Given(given, betas=(0.0, 0.0)))


def test_csv_logger(tmp_path: Path, workers: Workers) -> None:
    given = given_gradients(2)
    workers.run(2, _to_csv, given, str(tmp_path))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["vote/ties"]]
    assert [int(row["step"]) for row in rows] == [2, 5]
    for row, expected in zip(rows, expected_figures(given, "alternate", 3), strict=True):
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-12)


def _two(given: Any) -> list[Any]:
    notes = Notes()
    trainer(callbacks=[VoteMonitor()], logger=notes, log_every_n_steps=2).fit(GivenByTwo(given))
    return [row for _, row in notes.rows]


def test_several_optimizers_are_added_up(workers: Workers) -> None:
    sizes = (70, 130)
    given = given_gradients(2, sizes=sizes)
    bytes_of_both = sum(majority_vote(size, 2) for size in sizes)
    for rows in workers.run(2, _two, given):
        for k, (row, expected) in enumerate(zip(rows, expected_figures(given, "alternate", 2), strict=True)):
            first = 0 if k else HEADER_BYTES  # two optimizers, two steps
            assert row.pop("vote/bytes_per_step") == bytes_of_both + first
            assert row.pop("vote/exchange_seconds") > 0
            assert row == pytest.approx(expected, rel=1e-12)


class _Looking(Callback):
    """Is anything counted while the model trains?"""

    def __init__(self) -> None:
        self.counting: set[int] = set()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.counting.add(len(optimizer.vote.observers))


def _looks(monitored: bool) -> tuple[set[int], bool]:
    looking = _Looking()
    run: Any = trainer(callbacks=[looking, *[VoteMonitor()] * monitored])
    run.fit(Net())
    return looking.counting, not run.optimizers[0].vote.observers


def test_nothing_is_counted_without_it_nor_after_it(workers: Workers) -> None:
    assert workers.run(2, _looks, False) == [({0}, True)] * 2
    assert workers.run(2, _looks, True) == [({1}, True)] * 2


class _Plain(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _no_vote(strategy: str) -> str:
    model = Net() if dist.get_world_size() == 1 else _Plain()
    try:
        trainer(strategy=strategy, callbacks=[VoteMonitor()]).fit(model)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "majority_vote"), (2, "ddp")])
def test_nothing_to_watch(ranks: int, strategy: str, workers: Workers) -> None:
    message = "VoteMonitor has no vote to watch: it needs strategy='majority_vote' and several ranks, or 'local_vote'"
    assert workers.run(ranks, _no_vote, strategy) == [message] * ranks
