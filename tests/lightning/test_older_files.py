"""Files of an earlier version load, and training goes on bit for bit; `tests/fixtures/torch/write.py` made them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote, scatter_state
from tests.fixtures.torch.write import LATER, RANKS, SAVED, SIGNUM, fit, give, net, numbers
from tests.workers import Workers

from .test_local_vote import _train

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "torch" / "ranks.tar.gz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.unpack_archive(ARCHIVE, tmp_path)
    return tmp_path


def _plain(folder: Path) -> list[Tensor]:
    saved = torch.load(folder / "state.pt", weights_only=True)
    assert "momenta_of_other_ranks" in saved["optimizer"], "not a file of an earlier version"
    model = DistributedDataParallel(net())
    model.module.load_state_dict(saved["model"])
    optimizer = Signum(model.parameters(), **SIGNUM)
    enable_majority_vote(model, optimizer)
    scatter_state(optimizer, saved["optimizer"])
    for t in range(SAVED, SAVED + LATER):
        give(model, t, dist.get_rank())
        optimizer.step()
    return numbers(model)


def test_a_gathered_state(folder: Path, workers: Workers) -> None:
    _judge(workers.run(RANKS, _plain, folder), folder)


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize("new_kind", ["full", "sharded"])
def test_a_checkpoint(kind: str, new_kind: str, folder: Path, tmp_path: Path, workers: Workers) -> None:
    arguments = (tmp_path / "new", new_kind, SAVED + LATER, str(folder / f"{kind}.ckpt"))
    _judge(workers.run(RANKS, fit, *arguments), folder)


def _judge(ends: list[list[Tensor]], folder: Path) -> None:
    right = torch.load(folder / "later.pt", weights_only=True)
    for values in ends:
        for x, y in zip(values, right, strict=True):
            assert x.equal(y)


def _write_shards(file: str, folder: str) -> None:
    """Write what a file has of local steps as directories had it, every tensor of every rank by a name of its own."""
    checkpoint, rank = torch.load(file, weights_only=True), dist.get_rank()
    (state,) = checkpoint["optimizer_states"]
    own = [state["state"], *state.pop("inner_states_of_other_workers")][rank]
    tensors = {f"0.{key}.{name}.{rank}": value for key, entries in own.items() for name, value in entries.items()}
    save(tensors, checkpoint_id=folder)
    if rank == 0:
        rest: Any = {**state, "state": {key: {} for key in own}, "ranks_with_momentum_shards": dist.get_world_size()}
        torch.save({**checkpoint, "optimizer_states": [rest]}, Path(folder, "meta.pt"))


def test_shards_of_local_steps(tmp_path: Path, workers: Workers) -> None:
    straight = workers.run(2, _train, str(tmp_path / "a"), "full", 2)
    folder = str(tmp_path / "shards.ckpt")
    workers.run(2, _write_shards, str(tmp_path / "a" / "epoch=0.ckpt"), folder)
    assert workers.run(2, _train, str(tmp_path / "b"), "sharded", 2, folder) == straight
