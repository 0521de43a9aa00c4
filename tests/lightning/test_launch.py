"""The ways users start several processes, as they do it: Lightning's own launchers, and torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workers import free_port

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
LIGHTNING = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from signsgd_lightning import Signum


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        return (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return Signum(self.parameters(), lr=0.01)

    def on_train_end(self):
        votes = self.trainer.optimizers[0].vote.topology.workers.world_size
        line = f"{self.trainer.global_step} steps, {votes} votes, {self.layer.weight.tolist()}"
        Path(sys.argv[2], f"rank{self.global_rank}").write_text(line)


if __name__ == "__main__":
    data = TensorDataset(torch.randn(32, 4))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=sys.argv[1], max_epochs=1, **quiet)
    trainer.fit(Model(), DataLoader(data, batch_size=4))
"""
PLAIN_DDP = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = Signum(model.parameters(), lr=0.01)
enable_majority_vote(model, optimizer)
for step in range(4):
    optimizer.zero_grad()
    x = torch.randn(8, 4)
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
line = f"{step + 1} steps, {dist.get_world_size()} votes, {model.module.weight.tolist()}"
Path(sys.argv[1], f"rank{dist.get_rank()}").write_text(line)
dist.destroy_process_group()
"""


def _run(*command: str, folder: Path) -> None:
    """Run a command to its end, with all processes that it starts; none may outlive it."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(timeout=200)
            log.seek(0)
            assert code == 0, log.read()
            assert _ends(process.pid), "a process was left behind"
        finally:
            if not _ends(process.pid, patience=0):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ends(group: int, patience: float = 20) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _same_on_both_ranks(folder: Path) -> None:
    lines = [(folder / f"rank{rank}").read_text() for rank in range(2)]
    assert lines[0] == lines[1]
    assert lines[0].startswith("4 steps, 2 votes, [[")


@pytest.mark.parametrize("strategy", ["majority_vote", "majority_vote_spawn", "majority_vote_fork"])
@pytest.mark.nightly  # test_demo.py starts processes as the first does
def test_lightnings_own_launchers(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LIGHTNING)
    _run("train.py", strategy, str(tmp_path), folder=tmp_path)
    _same_on_both_ranks(tmp_path)


@pytest.mark.nightly  # tests/tutorials runs one, too
def test_torchrun_of_a_plain_ddp_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN_DDP)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    _run(*torchrun, f"--master-port={free_port()}", "train.py", str(tmp_path), folder=tmp_path)
    _same_on_both_ranks(tmp_path)
