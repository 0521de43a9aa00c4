"""Sharded models are saved by torch.distributed.checkpoint, one directory for each worker."""

import warnings
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from signsgd_lightning.sharding import local
from tests.workers import Workers

from .sharded import backward, enabled, mesh_of


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    names = ("model", "optimizer")
    return dict(zip(names, get_state_dict(model, optimizer), strict=True))


def _bits(model: Any, optimizer: Any) -> list[bytes]:
    values = [local(p.detach()) for p in model.parameters()]
    values += [local(v) for entries in optimizer.state.values() for v in entries.values()]
    return [v.numpy().tobytes() for v in values]


def _save(directory: str, replicas: int) -> tuple[list[bytes], list[bytes]]:
    """Train, save, train on; return what was there when it was saved, and in the end."""
    model, optimizer = enabled(replicas, {})
    for t in range(2):
        backward(model, t)
        optimizer.step()
    mesh = mesh_of(replicas)
    saved = _bits(model, optimizer)
    path = f"{directory}/worker{mesh.get_local_rank('replicate')}"
    state_dict_saver.save(_state(model, optimizer), checkpoint_id=path, process_group=mesh.get_group("shard"))
    backward(model, 2)
    optimizer.step()
    return saved, _bits(model, optimizer)


def _load(directory: str, replicas: int, of: int | None = None) -> tuple[list[bytes], list[bytes], list[str], Any]:
    model, optimizer = enabled(replicas, {}, seed=5)
    mesh = mesh_of(replicas)
    worker = mesh.get_local_rank("replicate") if of is None else of
    state = _state(model, optimizer)
    before = optimizer.t
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state_dict_loader.load(
            state, checkpoint_id=f"{directory}/worker{worker}", process_group=mesh.get_group("shard")
        )
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = _bits(model, optimizer)
    momentum: Any = optimizer.state[model[0].weight]["momentum"].full_tensor()
    backward(model, 2)
    optimizer.step()
    words = [str(w.message) for w in caught if "momentum" in str(w.message)]
    return loaded, _bits(model, optimizer), words, (before, optimizer.t, momentum.numpy().tobytes())


def test_a_directory_for_each_worker(tmp_path: Path, workers: Workers) -> None:
    saved = workers.run(4, _save, str(tmp_path), 2)
    assert saved[0][0] != saved[2][0], "momenta are each worker's own"
    for (then, later), (loaded, on, words, (before, t, _)) in zip(
        saved, workers.run(4, _load, str(tmp_path), 2), strict=True
    ):
        assert loaded == then
        assert on == later
        assert (words, before, t) == ([], 0, 3)


def test_another_number_of_shards(tmp_path: Path, workers: Workers) -> None:
    workers.run(4, _save, str(tmp_path), 2)
    two, three = (workers.run(ranks, _load, str(tmp_path), 2) for ranks in (4, 6))
    assert [run[3][2] for run in two[::2]] == [run[3][2] for run in three[::3]], "whole momenta of the workers"


def test_another_workers_directory(tmp_path: Path, workers: Workers) -> None:
    workers.run(4, _save, str(tmp_path), 2)
    runs = workers.run(4, _load, str(tmp_path), 2, 0)
    assert [len(words) for _, _, words, _ in runs] == [0, 0, 1, 1]
    assert runs[2][2][0].startswith("worker 1 of 2 goes on with the momentum of worker 0 of 2, since its own was not l")
