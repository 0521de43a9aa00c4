"""What is broken among shards, and what cannot be sharded, is named on all ranks, and nothing is loaded or lost."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from signsgd_lightning import MajorityVoteStrategy
from tests.workers import Workers

from .models import Net, trainer
from .test_shards import _train


def _fit(path: str) -> str:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    run = trainer()
    try:
        run.fit(model, ckpt_path=path)
    except (RuntimeError, ValueError) as error:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert run.current_epoch == 0
        return str(error)
    return "it was loaded"


_MADE = "made by code"


class _Hostile:
    """Makes a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAK: dict[str, Any] = {
    "no meta.pt": lambda folder: (folder / "meta.pt").unlink(),
    "half a meta.pt": lambda folder: _halve(folder / "meta.pt"),
    "no index": lambda folder: (folder / ".metadata").unlink(),
    "half an index": lambda folder: _halve(folder / ".metadata"),
    "code as index": lambda folder: (folder / ".metadata").write_bytes(
        pickle.dumps(_Hostile(folder.parent / "hacked"))
    ),
    "another index": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})),
    "no shard": lambda folder: (folder / "__1_0.distcp").unlink(),
    "half a shard": lambda folder: _halve(folder / "__1_0.distcp"),
    "an empty shard": lambda folder: (folder / "__1_0.distcp").write_bytes(b""),
    "zeros": lambda folder: (folder / "__1_0.distcp").write_bytes(bytes((folder / "__1_0.distcp").stat().st_size)),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def test_broken_directories_are_named(tmp_path: Path, workers: Workers) -> None:
    """On all ranks, also where only one needs what is missing."""
    workers.run(2, _train, str(tmp_path), "sharded", {}, {}, 1)
    for name, damage in BREAK.items():
        path = tmp_path / f"{name}.ckpt"
        shutil.copytree(tmp_path / "epoch=0.ckpt", path)
        damage(path)
        for message in workers.run(2, _fit, str(path)):
            assert message.startswith(f"{path} is not a whole checkpoint"), f"{name}: {message}"
            assert "nothing was loaded (rank " in message
    assert not (tmp_path / _MADE).exists()


def _save_where(path: str) -> str:
    try:
        run = trainer(strategy=MajorityVoteStrategy(state_dict_type="sharded"))
        run.fit(Net())
        run.save_checkpoint(path)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "it was saved"


def test_what_cannot_be_saved_is_refused_on_all_ranks(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("")
    for path, message in {
        str(tmp_path / "notes"): "rank 0: .*notes is a directory with something else than a checkpoint in it",
        str(tmp_path / "file" / "below.ckpt"): "could not save .*below.ckpt: rank 0: .*Not a directory",
        "memory://a.ckpt": "a sharded checkpoint must be a directory on a file system, .* got memory://a.ckpt",
    }.items():
        for said in workers.run(2, _save_where, path):
            assert re.search(message, said), said
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 'full' \(one file\) or 'sharded' \(one directory\), got 'sharp'"):
        MajorityVoteStrategy(state_dict_type="sharp")  # type: ignore[arg-type]
