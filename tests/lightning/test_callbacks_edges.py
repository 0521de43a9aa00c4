"""VoteMonitor where fits go on, gradients are missing, optimizers are several, and errors end the run."""

from typing import Any

import numpy as np
import pytest
import torch

from signsgd_core.network.traffic import majority_vote
from signsgd_core.wire import HEADER_BYTES
from signsgd_lightning import VoteMonitor
from tests.workers import Workers

from .models import Array, Given, GivenByTwo, Net, trainer

UNUSED = "majority_vote_find_unused_parameters_true"


class _Notes(VoteMonitor):
    """Keeps what it logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def _gather(self, steps: int, device: torch.device) -> dict[str, float]:
        self.rows.append(dict(super()._gather(steps, device)))
        return self.rows[-1]


def _monitored(given: Any, settings: dict[str, Any]) -> list[dict[str, float]]:
    notes = _Notes()
    trainer(callbacks=[notes], **settings).fit(Given(given, betas=(0.0, 0.0)))
    return notes.rows


def _constant(*signs: float, size: int = 64) -> list[Array]:
    return [np.full(size, sign, np.float32) for sign in signs]


def test_never_logging(workers: Workers) -> None:
    given = [[_constant(1.0)] * 2] * 3
    assert workers.run(2, _monitored, given, {"log_every_n_steps": 0}) == [[], []]


def _goes_on() -> list[float]:
    model, notes = Net(), _Notes()
    run = trainer(callbacks=[notes], log_every_n_steps=2)
    run.fit(model)
    run.fit_loop.max_epochs = 2
    run.fit(model)
    return [row["vote/bytes_per_step"] for row in notes.rows]


def test_bytes_per_step_when_fit_goes_on(workers: Workers) -> None:
    expected = majority_vote(4 * 6 + 6 + 6 + 1, 2)
    first = expected + HEADER_BYTES / 2  # the ranks compare their weights before the first vote of a fit
    assert workers.run(2, _goes_on) == [[first, expected] * 2] * 2


def test_a_rank_without_a_gradient_neither_agrees_nor_disagrees(workers: Workers) -> None:
    given: Any = [[_constant(1.0, 1.0), [_constant(1.0)[0], None]]] * 2
    for rows in workers.run(2, _monitored, given, {"strategy": UNUSED, "log_every_n_steps": 2}):
        assert rows[0]["vote/agreement/rank0"] == 1.0
        assert rows[0]["vote/agreement/rank1"] == 1.0


def test_flips_compare_a_coordinate_with_itself(workers: Workers) -> None:
    up, down = _constant(1.0, -1.0)
    given: Any = [[[up, None]] * 2, [[None, down]] * 2] * 2
    for rows in workers.run(2, _monitored, given, {"strategy": UNUSED, "log_every_n_steps": 4}):
        assert rows[0].get("vote/flips", 0.0) == 0.0


class _Failing(Net):
    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 2:
            raise ValueError("a mistake of the user's")


def _fails() -> bool:
    model = _Failing()
    run: Any = trainer(callbacks=[VoteMonitor()])
    with pytest.raises(ValueError, match="mistake"):
        run.fit(model)
    return not run.optimizers[0].vote.observers


def test_off_after_an_error(workers: Workers) -> None:
    assert workers.run(2, _fails) == [True, True]


def _by_twos(given: Any, every: int) -> int:
    notes = _Notes()
    trainer(callbacks=[notes], log_every_n_steps=every).fit(GivenByTwo(given))
    return len(notes.rows)


@pytest.mark.parametrize("every", [2])
def test_logged_as_often_as_lightning_logs(every: int, workers: Workers) -> None:
    given = [[_constant(1.0, -1.0)] * 2] * 6
    assert workers.run(2, _by_twos, given, every) == [6 // every] * 2
