"""Sharded checkpoints: every rank writes its own momenta into a directory, and resumes as from a single file."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

import signsgd_core as core
from signsgd_lightning import MajorityVoteStrategy, Signum, scatter_state
from signsgd_lightning.checkpoint.loading import SHARDS
from tests.workers import Workers

from .models import Net, trainer
from .test_checkpoint import FEWER, SETTINGS, Scheduled, _momenta, _same


def _train(
    folder: str, kind: Any, signum: Any, settings: Any, epochs: int, resume: str | None = None, **save: Any
) -> tuple[list[Any], Any]:
    """Train, save at every epoch, and return this rank's parameters and momenta."""
    model = Scheduled(**signum)
    checkpoints = ModelCheckpoint(folder, **{"filename": "{epoch}", "save_top_k": -1, **save})
    strategy = MajorityVoteStrategy(state_dict_type=kind)
    run = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[checkpoints], strategy=strategy, **settings)
    run.fit(model, ckpt_path=resume)
    return [p.detach().float().numpy().copy() for p in model.parameters()], _momenta(run.optimizers[0])


@pytest.mark.parametrize("name", FEWER)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path, workers: Workers) -> None:
    signum, settings = SETTINGS[name]
    straight = workers.run(2, _train, str(tmp_path / "a"), "full", signum, settings, 4)
    workers.run(2, _train, str(tmp_path / "b"), "sharded", signum, settings, 2)
    path = str(tmp_path / "b" / "epoch=1.ckpt")
    assert Path(path).is_dir()
    for kind in ("sharded", "full"):
        resumed = workers.run(2, _train, str(tmp_path / kind), kind, signum, settings, 4, path)
        for ours, theirs in zip(straight, resumed, strict=True):
            assert _same(ours, theirs)
    from_file = str(tmp_path / "a" / "epoch=1.ckpt")
    resumed = workers.run(2, _train, str(tmp_path / "c"), "sharded", signum, settings, 4, from_file)
    for ours, theirs in zip(straight, resumed, strict=True):
        assert _same(ours, theirs)


def _resume_only(path: str) -> list[Any]:
    """Open a checkpoint that has all its epochs behind it."""
    return list(_train(str(Path(path).parent / "unused"), "full", {}, {}, 1, path)[1])


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 3), (3, 1), (1, 4), (3, 2)])
def test_other_numbers_of_ranks(old: int, new: int, tmp_path: Path, workers: Workers) -> None:
    before = workers.run(old, _train, str(tmp_path / "shards"), "sharded", {}, {}, 1)
    workers.run(old, _train, str(tmp_path / "file"), "full", {}, {}, 1)
    after, after_file = (
        workers.run(new, _resume_only, str(tmp_path / kind / "epoch=0.ckpt")) for kind in ("shards", "file")
    )
    assert _same(after, after_file)
    for key in range(len(before[0][1])):
        expected = core.redistribute(np.stack([rank[1][key] for rank in before]), new)
        np.testing.assert_array_equal(np.stack([rank[key] for rank in after]), expected)


def test_narrow_momenta_on_other_numbers_of_ranks(tmp_path: Path, workers: Workers) -> None:
    signum, settings = SETTINGS["bf16-momentum"]
    for kind, folder in (("sharded", "shards"), ("full", "file")):
        workers.run(3, _train, str(tmp_path / folder), kind, signum, settings, 1)
    index = FileSystemReader(tmp_path / "shards" / "epoch=0.ckpt").read_metadata()
    entries: Any = index.state_dict_metadata.values()
    assert {entry.properties.dtype for entry in entries} == {torch.bfloat16}
    after, after_file = (
        workers.run(2, _resume_only, str(tmp_path / folder / "epoch=0.ckpt")) for folder in ("shards", "file")
    )
    assert _same(after, after_file)


def test_each_rank_wrote_its_own_momenta_and_rank_0_the_rest(tmp_path: Path, workers: Workers) -> None:
    ranks = workers.run(3, _train, str(tmp_path), "sharded", {"verdict_momentum": 0.5}, {}, 1)
    folder = tmp_path / "epoch=0.ckpt"
    assert {path.name for path in folder.iterdir()} == {
        "meta.pt", ".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"
    }  # fmt: skip
    index = FileSystemReader(folder).read_metadata()
    written = {place.fqn: where.relative_path for place, where in index.storage_data.items()}
    assert written == {f"0.{key}.momentum.{rank}": f"__{rank}_0.distcp" for key in range(4) for rank in range(3)}
    entries: dict[str, Any] = index.state_dict_metadata
    momenta: dict[str, Any] = {name: torch.empty(entry.size) for name, entry in entries.items()}
    with pytest.warns(UserWarning, match="in a single process"):
        load(momenta, checkpoint_id=folder, no_dist=True)
    for name, momentum in momenta.items():
        _, key, _, rank = name.split(".")
        np.testing.assert_array_equal(momentum, ranks[int(rank)][1][int(key)])
    meta = torch.load(folder / "meta.pt", weights_only=True)
    (state,) = meta["optimizer_states"]
    assert state[SHARDS] == 3
    assert {name for entries in state["state"].values() for name in entries} == {"verdict_momentum"}
    model = Net.load_from_checkpoint(folder / "meta.pt", map_location="cpu")
    np.testing.assert_array_equal(next(model.parameters()).detach(), ranks[0][0][0])


def test_nothing_private_needs_no_shards(tmp_path: Path, workers: Workers) -> None:
    workers.run(2, _train, str(tmp_path), "sharded", *SETTINGS["verdict-momentum"], 1)
    assert os.listdir(tmp_path / "epoch=0.ckpt") == ["meta.pt"]


def test_meta_alone_does_not_lose_the_momenta_in_silence(tmp_path: Path, workers: Workers) -> None:
    workers.run(2, _train, str(tmp_path), "sharded", {}, {}, 1)
    (state,) = torch.load(tmp_path / "epoch=0.ckpt" / "meta.pt", weights_only=True)["optimizer_states"]
    optimizer = Signum(Net().parameters())
    with pytest.warns(UserWarning, match="resume from the directory"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="resume from the directory, not from the file"):
        scatter_state(optimizer, state)


def _keep(folder: str, kind: str, epochs: int, resume: str | None) -> tuple[list[Any], Any]:
    best = {"save_top_k": 2, "monitor": "step", "mode": "max"}
    return _train(folder, kind, {}, {}, epochs, resume, save_last=True, **best)


def _resume_at_end(path: str) -> list[Any]:
    return list(_train(str(Path(path).parents[1] / "unused"), "full", {}, {}, 6, path)[1])


@pytest.mark.parametrize("kinds", [("sharded", "sharded"), ("full", "sharded"), ("sharded", "full")])
def test_saved_over_and_removed(kinds: tuple[str, str], tmp_path: Path, workers: Workers) -> None:
    """The last and the best two of six epochs, in two runs of which the second writes over the first one's."""
    straight = workers.run(2, _keep, str(tmp_path / "straight"), "full", 6, None)
    folder = tmp_path / "kept"
    workers.run(2, _keep, str(folder), kinds[0], 3, None)
    resumed = workers.run(2, _keep, str(folder), kinds[1], 6, "last")
    for ours, theirs in zip(straight, resumed, strict=True):
        assert _same(ours, theirs)
    assert sorted(os.listdir(folder)) == ["epoch=4.ckpt", "epoch=5.ckpt", "last.ckpt"]
    assert all(path.is_dir() == (kinds[1] == "sharded") for path in folder.iterdir())
    last, best = (workers.run(2, _resume_at_end, str(folder / name)) for name in ("last.ckpt", "epoch=5.ckpt"))
    assert _same(last, best)


class _Two(Net):
    """Two optimizers by hand; the second has nothing private."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        self.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        shared = Signum(self.net[2].parameters(), lr=0.03, betas=(0.0, 0.0), verdict_momentum=0.5)
        return [Signum(self.net[0].parameters(), lr=0.03), shared]


def _train_two(folder: str, epochs: int, resume: str | None) -> list[Any]:
    model = _Two()
    run = trainer(max_epochs=epochs, strategy=MajorityVoteStrategy(state_dict_type="sharded"))
    run.fit(model, ckpt_path=resume)
    run.save_checkpoint(f"{folder}/{epochs}.ckpt")
    return [*(p.detach().numpy().copy() for p in model.parameters()), *map(_momenta, run.optimizers)]


def test_two_optimizers(tmp_path: Path, workers: Workers) -> None:
    first = workers.run(2, _train_two, str(tmp_path), 1, None)
    resumed = workers.run(2, _train_two, str(tmp_path), 2, str(tmp_path / "1.ckpt"))
    straight = workers.run(2, _train_two, str(tmp_path), 2, None)
    for ours, theirs in zip(straight, resumed, strict=True):
        assert _same([ours[:-2], *ours[-2:]], [theirs[:-2], *theirs[-2:]])
    assert first[0][-1] == [None, None]
    assert not np.array_equal(first[0][-2][0], first[1][-2][0])


class _Tested(Net):
    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.training_step(batch, index), sync_dist=True)

    test_dataloader = Net.train_dataloader


def _test(path: str) -> float:
    (metrics,) = trainer(strategy=MajorityVoteStrategy()).test(_Tested(), ckpt_path=path, verbose=False)
    return metrics["loss"]


def test_evaluation_needs_no_momenta(tmp_path: Path, workers: Workers) -> None:
    workers.run(2, _train, str(tmp_path), "sharded", {}, {}, 1)
    path = tmp_path / "epoch=0.ckpt"
    before = workers.run(3, _test, str(path))
    (path / "__0_0.distcp").unlink()
    assert workers.run(3, _test, str(path)) == before
