"""A machine whose cable is pulled: every other one ends with an error that names its rank, within the timeout."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.network import Network, available
from tests.workers import environment

from .conftest import Fault
from .test_lost import GROUP_TIMEOUT, RANKS, SPAN, judge

SCRIPT = """
import json, sys
from datetime import timedelta
from pathlib import Path
import torch
from tests.faults.endless import train
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=float(sys.argv[1])))
end = train(int(sys.argv[2]), Path(sys.argv[3]))
Path(sys.argv[4]).write_text(json.dumps(end))
"""

NIGHTLY = pytest.mark.nightly
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.net,
    pytest.mark.skipif(not available(), reason="network namespaces need root and iproute2"),
]


def _start(network: Network, rank: int, victim: int, folder: Path) -> subprocess.Popen[bytes]:
    settings = environment(rank, RANKS, 29500) | {
        "MASTER_ADDR": network.address(0),
        "GLOO_SOCKET_IFNAME": network.interface,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    arguments = [str(GROUP_TIMEOUT), str(victim), str(folder / "started"), str(folder / f"end {rank}")]
    return subprocess.Popen(
        network.command(rank, sys.executable, "-c", SCRIPT, *arguments),
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"log {rank}").open("wb"),
    )


def _pull(victim: int, delay: float, folder: Path) -> None:
    folder.mkdir()
    with Network(RANKS) as network:
        processes = [_start(network, rank, victim, folder) for rank in range(RANKS)]
        try:
            deadline = time.monotonic() + 60
            while not (folder / "started").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(delay)
            when = time.monotonic()
            network.cut(victim)
            for process in processes:
                assert process.wait(timeout=60) is not None
        finally:
            for process in processes:
                process.kill()
                process.wait()
    ends = [
        json.loads(path.read_text()) if (path := folder / f"end {rank}").exists() else None for rank in range(RANKS)
    ]
    judge(ends, victim, when)


@pytest.mark.parametrize(
    "moments",
    [pytest.param(1, marks=NIGHTLY), pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_cut_off_rank_is_named(moments: int, tmp_path: Path, fault: Fault) -> None:
    draw = random.Random(3)
    for k in range(moments):
        with fault(f"a rank is cut off the network at a random point of training, {RANKS} ranks"):
            _pull(draw.randrange(RANKS), draw.uniform(0, SPAN), tmp_path / str(k))
