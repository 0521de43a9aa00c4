"""A run that is killed at any moment, also while it writes, leaves whole checkpoints to go on from, bit for bit."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from signsgd_lightning import MajorityVoteStrategy
from tests.lightning.models import Net, trainer
from tests.workers import Workers

from .conftest import Fault

NIGHTLY = pytest.mark.nightly
pytestmark = pytest.mark.multiprocess

EPOCHS = 40
SCRIPT = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.lightning.models import QUIET, Net
import signsgd_lightning
folder, resume, epochs = sys.argv[1:]
save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
options = {**QUIET, "enable_checkpointing": True, "callbacks": [save]}
run = Trainer(accelerator="cpu", devices=2, strategy="majority_vote", max_epochs=int(epochs), **options)
run.fit(Net(samples=16), ckpt_path=resume or None)
"""


def _start(folder: Path, resume: str) -> subprocess.Popen[bytes]:
    """Start a run of two ranks in a session of its own, so that all of it can be killed at once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"  # Lightning starts the other rank with the same file
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder), resume, str(EPOCHS)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _newest(folder: Path) -> str:
    files = sorted(folder.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for path in files:
        torch.load(path, weights_only=True)  # each is whole
    return str(files[-1]) if files else ""


def _run_and_kill(folder: Path, kills: int) -> int:
    """Kill the run at random moments, each time once it has saved something new; then let it end."""
    moments, killed = random.Random(0), 0
    resume = ""
    for _ in range(kills):
        process = _start(folder, resume)
        before, deadline = resume, time.monotonic() + 120
        while _names(folder)[-1:] == _names_of(before) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.25))
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        resume = _newest(folder)
        assert resume, "it was killed before it saved anything"
    process = _start(folder, resume)
    try:
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return killed


def _names(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("epoch=*.ckpt")), key=lambda name: int(name[6:-5]))


def _names_of(path: str) -> list[str]:
    return [Path(path).name] if path else []


@pytest.mark.parametrize(
    "kills",
    [pytest.param(1, marks=NIGHTLY), pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_killed_runs_go_on_bit_for_bit(kills: int, tmp_path: Path, fault: Fault) -> None:
    with fault("the whole run is killed at a random moment and goes on from its checkpoint", kills):
        _compare(kills, tmp_path)


def _compare(kills: int, tmp_path: Path) -> None:
    straight = _start(tmp_path / "straight", "")
    assert straight.wait(timeout=120) == 0
    killed = _run_and_kill(tmp_path / "killed", kills)
    assert killed > 0, "every run had ended before it was killed"
    assert_same(*(tmp_path / name / f"epoch={EPOCHS - 1}.ckpt" for name in ("straight", "killed")))


def assert_same(straight: Path, killed: Path) -> None:
    """Demand of two checkpoints the same parameters, and the same momenta of all ranks, bit for bit."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (straight, killed))
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name])
    ours, theirs = (checkpoint["optimizer_states"][0] for checkpoint in (ours, theirs))
    for key, rows in ours["state_of_other_workers"]["momentum"].items():
        assert torch.equal(rows, theirs["state_of_other_workers"]["momentum"][key])
        assert torch.equal(ours["state"][key]["momentum"], theirs["state"][key]["momentum"])


def _fit(path: str) -> str:
    try:
        trainer().fit(Net(), ckpt_path=path)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "it was loaded"


def _save(folder: str) -> None:
    save = ModelCheckpoint(folder, filename="whole")
    trainer(enable_checkpointing=True, callbacks=[save], strategy=MajorityVoteStrategy()).fit(Net())


def test_broken_files_are_named(tmp_path: Path, workers: Workers, fault: Fault) -> None:
    workers.run(2, _save, str(tmp_path))
    whole = (tmp_path / "whole.ckpt").read_bytes()
    files = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint\n",
        "pickle": pickle.dumps({"state_dict": _Hostile()}),
    }
    for name, data in files.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(data)
        with fault("a checkpoint is cut short, empty, foreign, or holds code"):
            for message in workers.run(2, _fit, str(path)):
                assert message.startswith(f"{path} is not a whole checkpoint"), message
    assert not (tmp_path / "hacked").exists()
    assert not list(tmp_path.glob("*.part"))


class _Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)
