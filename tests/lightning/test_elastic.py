"""Workers that come and go: whoever is there votes, all of them have the same bits, and nobody waits for the dead."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from signsgd_core import Reference
from tests.elastic import SHARED, TIMEOUT, Crew, Lighthouse, Task, ask_apart, crew, give_up, gradient

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")
pytestmark = pytest.mark.multiprocess

Here = tuple[Crew, Lighthouse]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with crew(tmp_path) as found:
        yield found


def lines_by_step(workers: Crew) -> dict[int, list[dict[str, Any]]]:
    """Return what was written of every step, by all who took it; each took none twice."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for name in range(len(workers.processes)):
        log = workers.log(name)
        taken = [line["step"] for line in log]
        assert taken == sorted(set(taken))
        for line in log:
            steps.setdefault(line["step"], []).append(line)
    return dict(sorted(steps.items()))


def judge(workers: Crew) -> list[int]:
    """Demand the same bits of all who took a step, and those of `Reference`; return how many workers each step had.

    A newcomer's bits are those of the others before its first step, too. No batch is voted on twice, or left out.
    """
    steps = lines_by_step(workers)
    assert list(steps) == list(range(1, len(steps) + 1))
    start = [np.array(x, np.float32) for x in steps[1][0]["before"]]
    reference = Reference(start, 1, 1.0, (0.0, 0.0), verdict_momentum=0.5, zeros="alternate")
    voted = 0
    for step, lines in steps.items():
        first = lines[0]
        for name in ("bits", "before", "workers", "batches", "lr", "zeros"):
            assert all(line[name] == first[name] for line in lines), (step, name)
        reference.workers, reference.lr = first["workers"], first["lr"]
        reference.momenta = [[np.zeros_like(x) for x in start] for _ in range(reference.workers)]
        for x, given in zip(reference.parameters, first["before"], strict=True):
            np.testing.assert_array_equal(x, np.array(given, np.float32), f"before step {step}")
        numbers = range(reference.workers)
        assert all(line["drawn"] == voted + line["number"] for line in lines)
        reference.step([gradient(voted + number) for number in numbers])
        voted += reference.workers
        assert first["batches"] == voted
        for x, given in zip(reference.parameters, first["after"], strict=True):
            np.testing.assert_array_equal(x, np.array(given, np.float32), f"after step {step}")
    return [lines[0]["workers"] for lines in steps.values()]


def test_they_train_as_the_reference_does(here: Here) -> None:
    workers, _ = here
    names = [workers.start(Task(min_workers=3)) for _ in range(3)]
    workers.join(*names)
    assert judge(workers) == [3] * 30
    assert workers.log(0)[-1]["lr"] < SHARED["lr"]


def test_killed_at_every_point(here: Here) -> None:
    """In the exchange, at the commit, while it takes over the state or hands it on: the others go on."""
    workers, _ = here
    stay = [workers.start(Task(steps=100_000, pause=0.01)) for _ in range(2)]
    waited = []
    for place in ("HEADER", "BALLOTS", "VERDICTS", "commit", "apply", "heal", "load"):
        begun = workers.step(stay[0])
        name = workers.start(Task(steps=100_000, die=(place, begun + 3 if place not in ("heal", "load") else 0)))
        workers.wait(lambda name=name: not workers.processes[name].is_alive())  # type: ignore[misc]
        assert workers.processes[name].exitcode == -signal.SIGKILL, workers.said(name)
        reached = workers.step(stay[0])
        waited.append(workers.wait(lambda reached=reached: min(map(workers.step, stay)) > reached + 3))  # type: ignore[misc]
    assert max(waited) < TIMEOUT + 2, waited


def test_killed_while_it_hands_the_state_on(here: Here) -> None:
    """Two newcomers lose their only source, and start from each other."""
    workers, _ = here
    giver = workers.start(Task(steps=100_000, min_workers=1, die=("save", 1)))
    workers.wait(lambda: workers.step(giver) > 1)
    names = [workers.start(Task()) for _ in range(2)]
    workers.join(*names)
    assert workers.processes[giver].exitcode == -signal.SIGKILL
    assert workers.log(names[0])[-1]["bits"] == workers.log(names[1])[-1]["bits"]


def test_stopped_and_gone_on(here: Here) -> None:
    """One that hangs is left behind, and takes over what the others did meanwhile."""
    workers, _ = here
    names = [workers.start(Task(steps=100_000, pause=0.01, min_workers=1)) for _ in range(3)]
    workers.wait(lambda: min(map(workers.step, names)) > 5)
    workers.signal(names[0], signal.SIGSTOP)
    time.sleep(0.2)
    reached = max(map(workers.step, names))
    assert workers.wait(lambda: min(map(workers.step, names[1:])) > reached + 3) < TIMEOUT + 2
    workers.signal(names[0], signal.SIGCONT)
    workers.wait(lambda: workers.step(names[0]) > reached + 10)
    assert 2 in judge(workers)


def test_half_leave_and_come_back(here: Here) -> None:
    """4 -> 1 -> 4 with the zero rule of several workers throughout."""
    workers, _ = here
    task = Task(steps=100_000, pause=0.01, min_workers=1)
    names = [workers.start(task) for _ in range(4)]
    workers.wait(lambda: (workers.log(names[0]) or [{"workers": 0}])[-1]["workers"] == 4)
    for name in names[1:]:
        workers.signal(name, signal.SIGKILL)
    workers.wait(lambda: workers.log(names[0])[-1]["workers"] == 1)
    names += [workers.start(task) for _ in range(3)]
    workers.wait(lambda: workers.log(names[0])[-1]["workers"] == 4)
    sizes = judge(workers)
    assert {1, 4} <= set(sizes)
    assert "waits" not in workers.said(names[0])


def test_too_few_wait(here: Here) -> None:
    workers, _ = here
    first = workers.start(Task(steps=100_000, pause=0.01))
    workers.wait(lambda: "training waits: 1 of at least 2 workers" in workers.said(first))
    time.sleep(1)
    assert workers.step(first) == 0
    second = workers.start(Task(steps=100_000, pause=0.01))
    workers.wait(lambda: min(workers.step(first), workers.step(second)) > 3)
    workers.signal(second, signal.SIGKILL)
    workers.wait(lambda: workers.said(first).count("training waits: 1 of") == 2)
    time.sleep(0.5)
    workers.start(Task(steps=100_000))
    reached = workers.step(first)
    workers.wait(lambda: workers.step(first) > reached + 3)
    assert set(judge(workers)) == {2}
    assert workers.said(first).count("training goes on with 2 workers") == 2


def test_the_lighthouse_is_lost_and_found(here: Here) -> None:
    workers, lighthouse = here
    names = [workers.start(Task(steps=100_000, pause=0.01, min_workers=3)) for _ in range(3)]
    workers.wait(lambda: min(map(workers.step, names)) > 3)
    lighthouse.stop()
    words = f"the lighthouse at {lighthouse.address} does not answer"
    workers.wait(lambda: all(words in workers.said(name) for name in names))
    assert all(process.is_alive() for process in workers.processes)
    reached = max(map(workers.step, names))
    lighthouse.start()
    workers.wait(lambda: min(map(workers.step, names)) > reached + 3)
    assert set(judge(workers)) == {3}


REFUSED = [
    (Task(sizes=(70, 2)), "«1: shape (3,), torch.float32» where worker 1 has «1: shape (2,), torch.float32»"),
    (Task(signum={**SHARED, "betas": (0.5, 0.5)}), "group 0: betas=(0.0, 0.0)"),
    (Task(scheduler=False), "state 'scheduler'» where worker 1 has «nothing»"),
]


def test_one_that_differs_may_not_join(here: Here) -> None:
    """It is told so by name, and the others go on."""
    workers, _ = here
    names = [workers.start(Task(steps=100_000, pause=0.01)) for _ in range(2)]
    for other, words in REFUSED:
        reached = max(map(workers.step, names))
        workers.wait(lambda reached=reached: min(map(workers.step, names)) > reached + 3)  # type: ignore[misc]
        name = workers.start(other)
        workers.wait(lambda name=name: not workers.processes[name].is_alive())  # type: ignore[misc]
        assert "this worker cannot join" in workers.said(name)
        assert words in workers.said(name)
    reached = max(map(workers.step, names))
    workers.wait(lambda: min(map(workers.step, names)) > reached + 3)
    assert set(judge(workers)) == {2}


def test_a_private_momentum_starts_at_zero(here: Here) -> None:
    """A newcomer's is that of its first gradient alone, which every attempt takes in; all have the same parameters."""
    workers, _ = here
    task = Task(steps=100_000, pause=0.01, signum={"lr": 2.0**-6, "betas": (0.5, 0.5)}, closure=False)
    names = [workers.start(task) for _ in range(2)]
    workers.wait(lambda: min(map(workers.step, names)) > 3)
    newcomer = workers.start(task)
    workers.wait(lambda: workers.step(newcomer) > 0)
    first = workers.log(newcomer)[0]
    drawn = gradient(first["drawn"])[0]
    assert first["momentum"] in [((1 - 0.5**attempts) * drawn).tolist() for attempts in (1, 2, 3)]
    for lines in lines_by_step(workers).values():
        assert len({line["bits"] for line in lines}) == 1


@pytest.mark.nightly
def test_a_memory_error_is_mended(here: Here) -> None:
    """One whose bits differ is named, and takes over those of the others."""
    workers, _ = here
    names = [workers.start(Task(steps=60, min_workers=3, flip=at)) for at in (-1, 12, -1)]
    workers.join(*names)
    assert "differ from the others in 0, and take over their state" in workers.said(names[0])
    ends = [workers.log(name)[-1] for name in names]
    assert len({line["bits"] for line in ends}) == 1


def test_who_gives_up_a_step_lets_the_others_know(here: Here) -> None:
    assert give_up(here[1]) < TIMEOUT / 2


def test_a_question_outlasts_who_is_stuck(here: Here) -> None:
    """One asks for the quorum while the other waits for a lost one, and is there when that comes back."""
    _, lighthouse = here
    asked, stuck = ask_apart(lighthouse, TIMEOUT + 0.05)
    assert asked == pytest.approx(TIMEOUT + 0.05, abs=0.5)
    assert stuck < 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_twenty_at_random(here: Here, number: signal.Signals) -> None:
    """One after the other is lost and replaced at random moments: no run ends."""
    workers, _ = here
    waited = workers.lose_twenty(lambda: workers.start(Task(steps=100_000, min_workers=1)), number, seed=19)
    judge(workers)
    assert max(waited) < TIMEOUT + 2, waited


@pytest.mark.nightly
def test_churn(here: Here) -> None:
    """300 steps, every worker lost and started anew twice, never fewer than two alive."""
    workers, _ = here
    names = [workers.start(Task(steps=300, pause=0.03)) for _ in range(4)]
    workers.wait(lambda: min(map(workers.step, names)) > 3)
    for place in [0, 1, 2, 3] * 2:
        workers.signal(names[place], signal.SIGKILL)
        reached = max(map(workers.step, [name for k, name in enumerate(names) if k != place]))
        others = [name for k, name in enumerate(names) if k != place]
        workers.wait(lambda others=others, reached=reached: min(map(workers.step, others)) > reached + 5)  # type: ignore[misc]
        names[place] = workers.start(Task(steps=300, pause=0.03))
        workers.wait(lambda place=place: workers.step(names[place]) > 0)  # type: ignore[misc]
    workers.join(*names)
    sizes = judge(workers)
    assert len(sizes) == 300
    assert min(sizes) >= 2


@pytest.mark.nightly
def test_joins_at_twenty_random_moments(here: Here) -> None:
    """A newcomer has the others' bits at its first committed step, and before it."""
    workers, _ = here
    random = np.random.default_rng(20)
    stay = [workers.start(Task(steps=100_000)) for _ in range(2)]
    workers.wait(lambda: min(map(workers.step, stay)) > 3)
    for _ in range(20):
        time.sleep(random.random() / 4)
        newcomer = workers.start(Task(steps=100_000))
        workers.wait(lambda newcomer=newcomer: workers.step(newcomer) > 2)  # type: ignore[misc]
        first = workers.log(newcomer)[0]
        workers.wait(lambda first=first: min(map(workers.step, stay)) > first["step"])  # type: ignore[misc]
        for name in stay:
            line = next(line for line in workers.log(name) if line["step"] == first["step"])
            assert (line["bits"], line["before"]) == (first["bits"], first["before"])
        workers.signal(newcomer, signal.SIGKILL)
    judge(workers)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_two_hundred_changes_leave_nothing_behind(here: Here) -> None:
    """Memory, threads and open files of one that stays, while another one leaves and joins."""
    workers, _ = here
    stay = workers.start(Task(steps=100_000, pause=0.01))
    guest = workers.start(Task(steps=100_000, pause=0.01, leave_every=2))
    sizes = []
    for changes in (50, 100, 150, 200):
        workers.wait(lambda changes=changes: workers.step(guest) >= 2 * changes, 200)  # type: ignore[misc]
        sizes.append((workers.threads(stay), workers.files(stay), workers.memory(stay)))
    print(sizes)
    assert workers.processes[guest].is_alive()
    for threads, files, memory in sizes[1:]:
        assert threads <= sizes[0][0] + 2, sizes
        assert files <= sizes[0][1] + 4, sizes
        assert memory < sizes[0][2] + 30, sizes
