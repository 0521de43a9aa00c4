"""Workers killed under ``torchrun --max-restarts``: training goes on from the last checkpoint, to the same bits."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lightning.models import Net, trainer
from tests.workers import Workers

from .conftest import Fault
from .test_killed_runs import assert_same

NIGHTLY = pytest.mark.nightly
pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tutorials" / "torchrun_restarts.py"


@contextlib.contextmanager
def _started(folder: Path, restarts: int) -> Iterator[subprocess.Popen[bytes]]:
    """The tutorial's script under torchrun in a folder of its own; none of its processes outlives it."""
    folder.mkdir()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", str(restarts), str(SCRIPT)]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=out)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)
        for pid in [process.pid, *_left(folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _left(folder: Path) -> list[int]:
    """The processes that work in a folder: torchrun and its workers, whoever their parent is by now."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
    return found


def _children(pid: int) -> list[int]:
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(child) for one in children for child in one)


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=240) == 0, (folder / "out").read_text()
    assert _left(folder) == []


def _saved(folder: Path) -> int:
    """When the last checkpoint was written."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    return 0


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _kill_one(process: subprocess.Popen[bytes], folder: Path, draw: random.Random, seen: list[int]) -> None:
    """Kill one of the workers at a random moment after new ones have saved something."""

    def fresh() -> list[int]:
        return [pid for pid in _children(process.pid) if pid not in seen]

    _wait(lambda: len(fresh()) == 2, process)
    before = _saved(folder)
    _wait(lambda: _saved(folder) != before, process)
    time.sleep(draw.uniform(0, 0.2))
    workers = fresh()
    assert len(workers) == 2, "they ended before one was killed"
    os.kill(draw.choice(workers), signal.SIGKILL)
    seen += workers


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [pytest.param(1, marks=NIGHTLY), pytest.param(5, marks=pytest.mark.slow)])
def test_killed_workers_change_nothing(kills: int, tmp_path: Path, fault: Fault) -> None:
    with _started(tmp_path / "straight", 0) as straight:
        _finish(straight, tmp_path / "straight")
    draw, folder, seen = random.Random(kills), tmp_path / "killed", list[int]()
    with (
        fault("a worker is killed under torchrun --max-restarts, and training ends with the same bits", kills),
        _started(folder, kills + 1) as run,
    ):
        for _ in range(kills):
            _kill_one(run, folder, draw, seen)
        _finish(run, folder)
        assert not [pid for pid in seen if Path(f"/proc/{pid}").exists()]
        _judge(tmp_path / "straight", folder, kills)


def _judge(straight: Path, folder: Path, kills: int) -> None:
    said = (folder / "out").read_text()
    assert said.count("Restored all states from the checkpoint") == kills, "they began anew instead of going on"
    (told,) = (line for line in said.splitlines() if line.startswith("test accuracy"))
    assert told in (straight / "out").read_text().splitlines()
    assert told.endswith("after 300 steps")
    assert_same(*(one / "checkpoints" / "last.ckpt" for one in (straight, folder)))


def _warnings(environment: dict[str, str]) -> list[str]:
    os.environ.update(environment)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer().fit(Net())
    finally:
        for name in environment:
            del os.environ[name]
    return [str(warning.message) for warning in caught if "torchrun" in str(warning.message)]


@pytest.mark.parametrize(("restarts", "shared", "warned"), [("3", "True", 1), ("0", "True", 0), ("3", "False", 0)])
def test_a_store_that_outlives_its_workers_is_warned_of(
    restarts: str, shared: str, warned: int, workers: Workers
) -> None:
    environment = {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
    first, second = workers.run(2, _warnings, environment)
    assert [len(first), len(second)] == [warned, 0]
    assert all("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in message for message in first)
