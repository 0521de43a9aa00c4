"""A sharded checkpoint that is written over again and again is whole whenever all ranks are killed."""

import ctypes
import os
import random
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from signsgd_lightning.checkpoint.atomic import replace
from signsgd_lightning.checkpoint.sharded import load_shards, save_shards
from tests.workers import Workers, fresh_workers

from .conftest import Fault

pytestmark = pytest.mark.multiprocess


def _momentum(number: int, rank: int) -> torch.Tensor:
    return torch.full((20_000,), number + rank / 4)


def _save_on_and_on(path: str) -> None:
    rank = dist.get_rank()
    for number in count():
        state = {"state": {0: {"momentum": _momentum(number, rank)}}, "param_groups": [{"betas": (0.9, 0.9)}]}
        save_shards({"number": number, "optimizer_states": [state]}, path)


def _load(path: str) -> int:
    checkpoint = load_shards(path, torch.load, dist.get_rank(), dist.get_world_size(), momenta=True)
    (state,) = checkpoint["optimizer_states"]
    assert torch.equal(state["state"][0]["momentum"], _momentum(checkpoint["number"], dist.get_rank()))
    return int(checkpoint["number"])


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_while_writing_over(kills: int, tmp_path: Path, workers: Workers, fault: Fault) -> None:
    path, draw, numbers = tmp_path / "last.ckpt", random.Random(kills), list[int]()
    for _ in range(kills):
        with fresh_workers(2) as doomed:
            before = path.stat().st_ino if path.exists() else 0
            doomed.run(2, _save_on_and_on, str(path), lost=(0, 1))
            deadline = time.monotonic() + 60
            while (not path.exists() or path.stat().st_ino == before) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
        with fault("all ranks are killed while they write a sharded checkpoint, and a whole one loads"):
            (number, other) = workers.run(2, _load, str(path))
            assert number == other
        numbers.append(number)
    assert max(numbers) > 0, "it was never written over"


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("kinds", [("file", "directory"), ("directory", "file"), ("directory", "directory"),
                                   ("directory", "link"), ("nothing", "directory")])  # fmt: skip
def test_replace(kinds: tuple[str, str], in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system cannot exchange two names, as over NFS."""
    if not in_one_step:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    new, old = tmp_path / "a.ckpt.part", tmp_path / "a.ckpt"
    for path, kind, content in ((new, kinds[0], "new"), (old, kinds[1], "old")):
        _make(path, kind, content)
    if kinds[0] == "nothing":
        with pytest.raises(FileNotFoundError):
            replace(str(new), str(old))
        assert (old / "meta.pt").read_text() == "old"
        return
    replace(str(new), str(old))
    assert (old if kinds[0] == "file" else old / "meta.pt").read_text() == "new"
    assert {"a.ckpt"} <= set(os.listdir(tmp_path)) <= {"a.ckpt", "target"}
    if kinds[1] == "link":
        assert (tmp_path / "target" / "meta.pt").read_text() == "old"


def _make(path: Path, kind: str, content: str) -> Any:
    if kind == "file":
        path.write_text(content)
    elif kind == "directory":
        path.mkdir()
        (path / "meta.pt").write_text(content)
    elif kind == "link":
        _make(path.parent / "target", "directory", content)
        path.symlink_to("target")
