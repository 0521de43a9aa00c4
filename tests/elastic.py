"""Workers that come and go, as real processes, and the lighthouse by which they meet."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .workers import PRELOADED, free_port

Array = npt.NDArray[Any]
SIZES = (70, 3)
LR = 2.0**-6
SHARED = {"lr": LR, "betas": (0.0, 0.0), "verdict_momentum": 0.5}
TIMEOUT = 3.0
"""Seconds that a worker which does not answer is waited for."""


def gradient(k: int) -> list[Array]:
    """The gradient of batch `k`, in eighths, zeros often."""
    values = np.random.default_rng([19, k]).integers(-2, 3, sum(SIZES)) / 8
    return list(np.split(values.astype(np.float32), np.cumsum(SIZES)[:-1]))


@dataclass
class Task:
    """What a worker does.

    Attributes:
        steps: until which it trains.
        min_workers: of the vote.
        die: where it kills itself, as `_die_at` knows it, and at which step.
        pause: seconds between steps.
        signum: settings.
        sizes: of the parameters.
        scheduler: whether there is one.
        closure: whether gradients are computed in one.
        leave_every: after how many steps it leaves the others, to join again with the next; 0 for never.
        hostname: by which the others reach it.
        flip: after which step a parameter changes on this worker alone; the workers look for that every fifth.
    """

    steps: int = 30
    min_workers: int = 2
    die: tuple[str, int] | None = None
    pause: float = 0.0
    signum: dict[str, Any] = field(default_factory=lambda: dict(SHARED))
    sizes: tuple[int, ...] = SIZES
    scheduler: bool = True
    closure: bool = True
    flip: int = -1
    hostname: str = "127.0.0.1"
    leave_every: int = 0


class Lighthouse:
    """The one service; `stop` and `start` it as often as wanted."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self._process: Any = _context().Process(target=_shine, args=(self.port,), daemon=True)
        self._process.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise TimeoutError("the lighthouse does not listen")

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


class Crew:
    """Workers, started one by one; each writes a line for every step that it has taken."""

    def __init__(self, folder: Path, lighthouse: Lighthouse) -> None:
        self._folder, self._lighthouse = folder, lighthouse
        self.processes: list[Any] = []

    def start(self, task: Any, train: Callable[[Path, str, Any], None] | None = None) -> int:
        """Start a worker, which trains by votes at every step or as `train` does; return what it is called."""
        name = len(self.processes)
        arguments = (self._path(name), self._lighthouse.address, task, train or _train)
        process = _context().Process(target=_work, args=arguments, daemon=True)
        process.start()
        self.processes.append(process)
        return name

    def lose_twenty(self, start: Callable[[], int], number: signal.Signals, seed: int) -> list[float]:
        """Lose one of four after the other at random moments, and replace it; return how long the others waited."""
        random = np.random.default_rng(seed)
        names = [start() for _ in range(4)]
        self.wait(lambda: min(map(self.step, names)) > 3)
        waited = []
        for _ in range(20):
            time.sleep(random.random() / 2)
            lost = names.pop(int(random.integers(4)))
            self.signal(lost, number)
            time.sleep(0.1)
            reached = max(map(self.step, names))
            waited.append(self.wait(lambda reached=reached: min(map(self.step, names)) > reached + 1))  # type: ignore[misc]
            names.append(start())
            if number is signal.SIGSTOP:
                self.signal(lost, signal.SIGCONT)
                self.signal(lost, signal.SIGKILL)
            if random.random() < 0.5:  # else somebody is lost while the newcomer takes over
                self.wait(lambda: self.step(names[-1]) > 0)
            else:
                time.sleep(random.random())
        return waited

    def signal(self, name: int, number: signal.Signals) -> None:
        os.kill(self.processes[name].pid, number)

    def log(self, name: int) -> list[dict[str, Any]]:
        """What a worker has written; a line that is not whole yet is left out."""
        path = self._path(name)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def said(self, name: int) -> str:
        """What it said on stderr."""
        path = self._path(name).with_suffix(".stderr")
        return path.read_text() if path.exists() else ""

    def step(self, name: int) -> int:
        """How many steps it has taken, 0 before the first."""
        lines = self.log(name)
        return lines[-1]["step"] if lines else 0

    def threads(self, name: int) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.processes[name].pid}/task"))

    def files(self, name: int) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.processes[name].pid}/fd"))

    def memory(self, name: int) -> float:
        """How much memory it has, in MiB."""
        pages = int(Path(f"/proc/{self.processes[name].pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def wait(self, reached: Callable[[], object], seconds: float = 40.0) -> float:
        """Wait until something is so; return how long that took."""
        begin = time.monotonic()
        while not reached():
            if time.monotonic() > begin + seconds:
                everyone = [(self.step(name), self.said(name)[-600:]) for name in range(len(self.processes))]
                raise TimeoutError(f"not within {seconds} s: {everyone}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def join(self, *names: int, seconds: float = 60.0) -> None:
        """Wait until workers have ended, well."""
        self.wait(lambda: not any(self.processes[name].is_alive() for name in names), seconds)
        for name in names:
            assert self.processes[name].exitcode == 0, self.said(name)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _path(self, name: int) -> Path:
        return self._folder / f"worker{name}.jsonl"


@contextlib.contextmanager
def crew(folder: Path) -> Iterator[tuple[Crew, Lighthouse]]:
    """Workers and their lighthouse, all of which end."""
    lighthouse = Lighthouse()
    workers = Crew(folder, lighthouse)
    try:
        yield workers, lighthouse
    finally:
        workers.close()
        lighthouse.stop()


def ask_apart(lighthouse: Lighthouse, seconds: float) -> list[float]:
    """Let two workers ask for their third quorum, the second one so much later; return how long each waited."""
    return _run_two(_ask, lighthouse.address, seconds)


def give_up(lighthouse: Lighthouse) -> float:
    """Let one of two workers give up a step in which the other waits for it; return how long that waited."""
    return max(_run_two(_give_up, lighthouse.address))


def _run_two(function: Callable[..., None], *arguments: Any) -> list[float]:
    """Return what two processes measure: each puts its number and that."""
    context = _context()
    arguments = (*arguments, context.Barrier(2), answers := context.Queue())
    processes = [context.Process(target=function, args=(k, *arguments), daemon=True) for k in range(2)]
    try:
        for process in processes:
            process.start()
        return [waited for _, waited in sorted(answers.get(timeout=30) for _ in processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _membership(lighthouse: str) -> Any:
    from signsgd_lightning.elastic.membership import Membership, Place
    from signsgd_lightning.elastic.transport import Members

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=TIMEOUT)
    return Membership(Place(lighthouse, 2, timeout, "127.0.0.1"), Members(timeout), dict, lambda _: None, lambda: 0)


def _ask(number: int, lighthouse: str, seconds: float, barrier: Any, answers: Any) -> None:
    membership = _membership(lighthouse)
    for late in (0.0, 0.0, seconds):
        barrier.wait(20)
        time.sleep(late * number)
        begin = time.monotonic()
        membership.meet()
        waited = time.monotonic() - begin
        barrier.wait(20)
        membership.commit()
    answers.put((number, waited))
    barrier.wait(20)


def _give_up(number: int, lighthouse: str, barrier: Any, answers: Any) -> None:
    import torch

    from signsgd_lightning.vote import PeerLostError
    from signsgd_lightning.vote.transport import Message

    def exchange(message: Message) -> None:
        wait = membership.workers.swap(torch.zeros(2, 1), torch.zeros(2, 1), message)
        if number == 1:
            raise PeerLostError("as if a third one had been lost")
        wait()

    membership = _membership(lighthouse)
    membership.meet()
    barrier.wait(20)
    begin, kept = time.monotonic(), None
    try:
        exchange((Message.BALLOTS, Message.HEADER)[number])
    except PeerLostError as error:
        kept = error
        membership.fail(error)
    answers.put((number, time.monotonic() - begin))
    barrier.wait(20)
    assert kept


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "signsgd_lightning.elastic"])
    return context


def _shine(port: int, host: str = "127.0.0.1") -> None:
    from torchft.coordination import LighthouseServer

    times = {"join_timeout_ms": 5000, "quorum_tick_ms": 20, "heartbeat_timeout_ms": 700}
    lighthouse = LighthouseServer(bind=f"{host}:{port}", min_replicas=1, **times)
    while lighthouse:
        signal.pause()


def _work(path: Path, lighthouse: str, task: Any, train: Callable[[Path, str, Any], None]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with path.with_suffix(".stderr").open("w", buffering=1) as stderr:
        os.dup2(stderr.fileno(), 2)
        train(path, lighthouse, task)


def _train(path: Path, lighthouse: str, task: Task) -> None:
    import torch
    from torch import nn

    from signsgd_lightning import Signum, enable_elastic_vote

    random = torch.Generator().manual_seed(os.getpid())  # each starts elsewhere
    model = nn.ParameterList([torch.rand(size, generator=random) for size in task.sizes])
    optimizer = Signum(model.parameters(), **task.signum)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5)
    vote = enable_elastic_vote(
        model,
        optimizer,
        lighthouse=lighthouse,
        min_workers=task.min_workers,
        timeout=timedelta(seconds=TIMEOUT),
        state={"scheduler": scheduler} if task.scheduler else {},
        hostname=task.hostname,
        verify_every_n_steps=5,
    )
    if task.die is not None:
        _die_at(vote, *task.die)
    drawn, lr, before = -1, 0.0, [x.tolist() for x in model]

    def closure() -> torch.Tensor:
        nonlocal drawn, lr, before
        optimizer.zero_grad()
        lr, before = optimizer.param_groups[0]["lr"], [x.tolist() for x in model]
        drawn = vote.batches + vote.number
        loss = torch.stack([(x * torch.from_numpy(g)).sum() for x, g in zip(model, gradient(drawn), strict=False)])
        loss.sum().backward()  # type: ignore[no-untyped-call]
        return loss.sum()

    with path.open("a") as log:
        while vote.step < task.steps:
            if task.closure:
                optimizer.step(closure)
            else:
                vote.begin()
                closure()
                optimizer.step()
            scheduler.step()
            if vote.step == task.flip:
                model[0].data[0] += 1
                task.flip = -1
            bits = b"".join(x.detach().numpy().tobytes() for x in model)
            line: dict[str, Any] = {
                "step": vote.step,
                "workers": vote.workers,
                "number": vote.number,
                "batches": vote.batches,
            }
            line |= {"drawn": drawn, "bits": hashlib.md5(bits).hexdigest(), "zeros": optimizer.zeros, "lr": lr}
            line |= {"before": before, "after": [x.tolist() for x in model], "time": time.time()}
            if "momentum" in optimizer.state[model[0]]:
                line["momentum"] = optimizer.state[model[0]]["momentum"].tolist()
            log.write(json.dumps(line) + "\n")
            log.flush()
            if task.leave_every and vote.step % task.leave_every == 0:
                vote._membership.leave()
            time.sleep(task.pause)
    vote.close()


def _die_at(vote: Any, place: str, step: int) -> None:
    """Kill this process at a place in the code, when so many steps were taken."""
    from signsgd_lightning import _compat
    from signsgd_lightning.elastic import membership, transport

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def die(*args: Any, **kwargs: Any) -> Any:
            if vote.step >= step and when(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, die)

    def message(kind: str) -> Callable[..., bool]:
        return lambda *args: args[-1].name == kind

    if place in ("HEADER", "BALLOTS", "VERDICTS"):
        before(transport.Members, "_start", message(place))
    elif place == "commit":
        before(membership.Membership, "commit")
    elif place == "apply":
        before(vote._vote, "_commit")
    elif place == "heal":
        before(_compat, "streaming_load")
    elif place == "load":
        before(vote._membership, "_load")
    else:
        assert place == "save"
        before(vote._membership, "_save")
