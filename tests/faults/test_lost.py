"""A rank that is killed or stopped at any point of the step ends every other one with an error that names it."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.workers import fresh_workers

from .conftest import Fault
from .endless import train

pytestmark = pytest.mark.multiprocess

RANKS, GROUP_TIMEOUT = 4, 5.0
SPAN = 0.1
"""Seconds within which a fault comes: several steps."""


class Assassin(threading.Thread):
    """Sends a signal to a process at a moment after a file appears."""

    def __init__(self, pid: int | None, number: signal.Signals, started: Path, delay: float) -> None:
        super().__init__(daemon=True)
        assert pid is not None
        self.pid, self.number, self.started, self.delay, self.when = pid, number, started, delay, 0.0

    def run(self) -> None:
        while not self.started.exists():
            time.sleep(0.001)
        time.sleep(self.delay)
        self.when = time.monotonic()
        os.kill(self.pid, self.number)


def _lose(number: signal.Signals, victim: int, delay: float, started: Path, ranks_per_node: int | None = None) -> None:
    with fresh_workers(RANKS) as workers:
        assassin = Assassin(workers.processes[victim].pid, number, started, delay)
        assassin.start()
        ends = workers.run(
            RANKS,
            train,
            victim,
            started,
            ranks_per_node,
            lost=(victim,),
            group_timeout=GROUP_TIMEOUT,
            timeout=60,
            ranks_per_node=ranks_per_node,
        )
    judge(ends, victim, assassin.when)
    assert not any(process.is_alive() for process in workers.processes)


def judge(ends: list[tuple[str, float] | None], victim: int, when: float) -> None:
    """Demand that every rank but the victim named it, in time."""
    for rank, end in enumerate(ends):
        if rank != victim:
            assert end is not None
            message, failed = end
            assert message.startswith(f"rank {victim} stopped answering while the ranks "), message
            assert 0 < failed - when < GROUP_TIMEOUT + 5


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("moments", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_lost_rank_is_named(number: signal.Signals, moments: int, tmp_path: Path, fault: Fault) -> None:
    draw = random.Random(int(number))
    for k in range(moments):
        with fault(f"a rank gets {number.name} at a random point of training, {RANKS} ranks"):
            _lose(number, draw.randrange(RANKS), draw.uniform(0, SPAN), tmp_path / f"started {k}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lost_rank_of_a_node_is_named(number: signal.Signals, tmp_path: Path, fault: Fault) -> None:
    draw = random.Random(int(number) + 1)
    for k in range(20):
        with fault(f"a rank gets {number.name} at a random point of a vote between nodes, 2 x {RANKS // 2} ranks"):
            _lose(number, draw.randrange(RANKS), draw.uniform(0, SPAN), tmp_path / f"started {k}", RANKS // 2)


def test_ranks_that_lose_nobody_train_on(tmp_path: Path) -> None:
    """What `train` reports is a fault's doing: without one it goes on."""
    with pytest.raises(TimeoutError), fresh_workers(2) as own:
        own.run(2, train, 0, tmp_path / "started", timeout=4)
    assert (tmp_path / "started").exists()
