"""Local steps of workers that come and go: rounds are taken with whoever is left, on the steps that they have."""

import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ml_dtypes import bfloat16
from torch import nn

from signsgd_core.adversaries import invert
from signsgd_lightning import ElasticBatches, enable_elastic_local_steps
from tests.elastic import TIMEOUT, Crew, crew
from tests.elastic_rounds import Rounds, judge_rounds, train_rounds

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")
multiprocess = pytest.mark.multiprocess


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as (found, _):
        yield found


@multiprocess
def test_one_lost_and_one_come_within_a_round(workers: Crew, tmp_path: Path) -> None:
    """Two vote again on the steps that they have; the newcomer abstains from that, and trains with them then."""
    stay = [workers.start(Rounds(rounds=10**6, pause=0.02), train_rounds) for _ in range(2)]
    lost = workers.start(Rounds(rounds=10**6, pause=0.02, stuck=4), train_rounds)
    workers.wait((tmp_path / f"worker{lost}.stuck").exists)
    newcomer = workers.start(Rounds(rounds=10**6, pause=0.02), train_rounds)
    time.sleep(1)  # it asks for the quorum, in vain until the others vote again
    reached = max(map(workers.step, stay))
    workers.signal(lost, signal.SIGKILL)
    assert workers.wait(lambda: min(map(workers.step, stay)) > reached) < TIMEOUT + 2
    workers.wait(lambda: workers.step(newcomer) > reached + 3)
    sizes = judge_rounds(workers)
    assert (3, 3) in sizes
    assert (3, 2) in sizes, "the newcomer was there, and abstained"
    again = sizes.index((3, 2)) + 1
    assert all(line["step"] != again for line in workers.log(newcomer))
    lines = [line for name in stay for line in workers.log(name) if line["step"] == again]
    assert all(len(line["drawn"]) == 3 for line in lines), "no step was taken twice"


@multiprocess
def test_other_settings_may_not_join(workers: Crew) -> None:
    stay = [workers.start(Rounds(rounds=10**6, pause=0.01), train_rounds) for _ in range(2)]
    workers.wait(lambda: min(map(workers.step, stay)) > 1)
    other = workers.start(Rounds(sync_every=4), train_rounds)
    workers.wait(lambda: not workers.processes[other].is_alive())
    assert "«sync_every=3, outer_lr=0.5, outer_momentum=0.5» where worker 1 has «sync_every=4" in workers.said(other)
    reached = max(map(workers.step, stay))
    workers.wait(lambda: min(map(workers.step, stay)) > reached + 2)
    assert {size for size, _ in judge_rounds(workers)} == {2}


@multiprocess
def test_a_liar_in_bfloat16(workers: Crew) -> None:
    """Whoever has number 1 inverts; parameters round once a round."""
    task = Rounds(min_workers=3, dtype="bfloat16", adversaries={1: invert})
    workers.join(*[workers.start(task, train_rounds) for _ in range(3)])
    assert judge_rounds(workers, dtype=bfloat16, adversaries=task.adversaries) == [(3, 3)] * task.rounds


@multiprocess
def test_a_memory_error_is_mended(workers: Crew) -> None:
    """One whose bits differ is named, and takes over those of the others."""
    tasks = [Rounds(rounds=12, min_workers=3, verify=2, flip=at) for at in (-1, 5, -1)]
    names = [workers.start(task, train_rounds) for task in tasks]
    workers.join(*names)
    assert "differ from the others in 0, and take over their state" in workers.said(names[0])
    ends = [workers.log(name)[-1] for name in names]
    assert len({line["bits"] for line in ends}) == 1


@multiprocess
@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_twenty_at_random(workers: Crew, number: signal.Signals) -> None:
    """One after the other is lost and replaced at random moments: no run ends, no batch is drawn twice."""
    waited = workers.lose_twenty(lambda: workers.start(Rounds(rounds=10**6, pause=0.01), train_rounds), number, seed=25)
    judge_rounds(workers, exact=False)
    assert max(waited) < TIMEOUT + 2, waited


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    net = nn.Linear(2, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="needs a lighthouse"):
        enable_elastic_local_steps(net, sgd)
    with pytest.raises(ValueError, match="sync_every must be a whole number of 1 or more, got 0"):
        enable_elastic_local_steps(net, sgd, sync_every=0, lighthouse="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="min_workers must be"):
        enable_elastic_local_steps(net, sgd, min_workers=0, lighthouse="http://127.0.0.1:9")


def test_closed() -> None:
    net = nn.Linear(2, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    local = enable_elastic_local_steps(net, sgd, lighthouse="http://127.0.0.1:9", timeout=timedelta(seconds=1))
    batches = ElasticBatches(4, 2, local)
    local.close()
    with pytest.raises(RuntimeError, match="were closed"):
        next(batches)
    net(torch.ones(1, 2)).sum().backward()
    sgd.step()
