"""A worker that is cut off from the network at random moments: the others go on, and it comes back."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.network import Network, available
from tests.elastic import TIMEOUT

pytest.importorskip("torchft", reason="the extra `elastic` is not installed")
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.net,
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not available(), reason="network namespaces need root and iproute2"),
]
WORKERS = [1, 2, 3]
"""Machines; the lighthouse is on the first one."""
SHINE = "import sys; from tests.elastic import _shine; _shine(29510, sys.argv[1])"
WORK = """
import sys
from pathlib import Path
from tests.elastic import Task, _train, _work
_work(Path(sys.argv[1]), sys.argv[2], Task(steps=10**6, pause=0.01, min_workers=1, hostname=sys.argv[3]), _train)
"""


@contextlib.contextmanager
def running(network: Network, folder: Path) -> Iterator[None]:
    """The lighthouse and the workers, all of which end."""
    commands: list[tuple[Any, ...]] = [(0, SHINE, network.address(0))]
    lighthouse = f"http://{network.address(0)}:29510"
    commands += [(k, WORK, str(folder / f"{k}.jsonl"), lighthouse, network.address(k)) for k in WORKERS]
    settings = {"GLOO_SOCKET_IFNAME": network.interface, "PYTHONPATH": os.pathsep.join(sys.path), "RUST_LOG": "error"}
    processes = [
        subprocess.Popen(
            network.command(machine, sys.executable, "-c", *words),
            env={**os.environ, **settings},
            stderr=(folder / f"log{machine}").open("wb"),
        )
        for machine, *words in commands
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def step(folder: Path, machine: int) -> int:
    path = folder / f"{machine}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait(folder: Path, machines: list[int], reached: int, seconds: float = 60.0) -> float:
    """Wait until machines have come so far; return how long that took."""
    begin = time.monotonic()
    while min(step(folder, machine) for machine in machines) <= reached:
        if time.monotonic() > begin + seconds:
            said = {k: (step(folder, k), (folder / f"{k}.stderr").read_text()[-500:]) for k in WORKERS}
            raise TimeoutError(f"not within {seconds} s: {said}")
        time.sleep(0.02)
    return time.monotonic() - begin


def test_twenty_cuts_at_random(tmp_path: Path) -> None:
    random = np.random.default_rng(26)
    waited = []
    with Network(4) as network, running(network, tmp_path):
        wait(tmp_path, WORKERS, 3)
        for _ in range(20):
            time.sleep(random.random() / 2)
            lost = int(random.choice(WORKERS))
            left = [machine for machine in WORKERS if machine != lost]
            network.cut(lost)
            time.sleep(0.1)
            reached = max(step(tmp_path, machine) for machine in left)
            waited.append(wait(tmp_path, left, reached + 1))
            network.mend(lost)
            wait(tmp_path, WORKERS, max(step(tmp_path, machine) for machine in left) + 1)
    print("waited", [round(seconds, 1) for seconds in waited])
    bits: dict[int, set[str]] = {}
    for machine in WORKERS:
        for line in map(json.loads, (tmp_path / f"{machine}.jsonl").read_text().split("\n")[:-1]):
            bits.setdefault(line["step"], set()).add(line["bits"])
    assert all(len(found) == 1 for found in bits.values())
    assert max(waited) < TIMEOUT + 2, waited
