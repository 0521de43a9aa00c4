"""The optimizers of sharded workers: a directory for each worker, in which its ranks write their shards."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

import signsgd_core as core

from ..optimizer import Signum, find_signum
from ..sharding import local
from ..state import find
from .index import Reader, read_index
from .sharded import together


def save_states(
    states: Sequence[Mapping[str, Any]], path: str, worker: tuple[int, int], inside: dist.ProcessGroup, failed: str
) -> None:
    """Write this rank's shards of its worker's optimizers; every rank must call it.

    Args:
        states: of the optimizers, as `get_optimizer_state_dict` returns them.
        path: of the checkpoint, a directory that all ranks see.
        worker: its number, and how many there are.
        inside: the ranks of this worker.
        failed: begins the error.

    Raises:
        RuntimeError: on all ranks, if one could not write.
    """
    named = {str(k): dict(state) for k, state in enumerate(states)}
    writer = FileSystemWriter(_directory(path, *worker))
    together(lambda: save(named, storage_writer=writer, process_group=inside), failed)


def check(path: str) -> None:
    """Make sure that a checkpoint has the states of workers, of all that saved it.

    Raises:
        ValueError: if not.
    """
    saved = _count(path)
    if not saved:
        raise ValueError(
            f"{path} has no momenta of sharded copies, since another strategy wrote it or weights_only=True left them "
            "out: load its weights in configure_model and call fit without ckpt_path, so that momenta start anew"
        )
    for worker in range(saved):
        folder = _directory(path, worker, saved)
        if not os.path.isdir(folder):
            raise ValueError(
                f"{path} has no folder {os.path.basename(folder)} with the momenta of copy {worker}: bring it from "
                "where the checkpoint was saved, or resume from another checkpoint"
            )


def load_states(
    path: str, model: nn.Module, optimizers: Sequence[Optimizer], worker: tuple[int, int], inside: dist.ProcessGroup
) -> None:
    """Load what this rank's worker inherits into its optimizers; every rank must call it.

    With more workers than saved it, new worker `i` goes on from old one ``i mod M``; with fewer each has the mean of
    those that it replaces (`signsgd_core.predecessors`).

    Args:
        path: of the checkpoint.
        model: whose parameters they have.
        optimizers: `Signum`, wrapped or not, as many as were saved.
        worker: its number, and how many there are now.
        inside: the ranks of this worker.

    Raises:
        RuntimeError: on all ranks, if one could not read.
    """
    saved = _count(path)
    old = core.predecessors(*worker, saved)
    for number, optimizer in enumerate(map(find_signum, optimizers)):
        together(
            partial(_load, [_directory(path, k, saved) for k in old], number, model, optimizer, inside),
            f"could not load {path}: ",
        )


def _load(folders: Sequence[str], number: int, model: nn.Module, optimizer: Signum, inside: dist.ProcessGroup) -> None:
    """Load an optimizer's state from the folders of workers, with the mean of what is a worker's own."""
    rows: list[dict[str, dict[str, Tensor]]] = []
    for folder in reversed(folders):  # so that what is the same on all is the first one's in the end
        state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
        index = read_index(folder)
        asked = {str(number): {**state, "state": _saved(state["state"], f"{number}.state", index)}}
        load(asked, storage_reader=Reader(folder, index), process_group=inside)
        rows.insert(0, {name: _private(entries) for name, entries in state["state"].items()})
    for name, own in rows[0].items():
        for key in own:
            entry = find(key)
            assert entry is not None
            local(state["state"][name][key]).copy_(entry.inherited(torch.stack([row[name][key] for row in rows])))
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


def _directory(path: str, worker: int, workers: int) -> str:
    """Return where a worker's states are; the name says how many there are, so that one that is missing is missed."""
    return os.path.join(path, f"worker{worker}of{workers}")


def _count(path: str) -> int:
    """Return how many workers saved a checkpoint, 0 if it has no states of any."""
    found = [re.fullmatch(r"worker\d+of(\d+)", folder.name) for folder in Path(path).glob("worker*")]
    return max((int(name[1]) for name in found if name), default=0)


def _saved(states: Mapping[str, Mapping[str, Tensor]], prefix: str, index: Metadata) -> dict[str, dict[str, Tensor]]:
    """Return what of the states was saved: not that of a parameter that no step had used, which is zeros here."""
    return {
        name: {key: value for key, value in entries.items() if f"{prefix}.{name}.{key}" in index.state_dict_metadata}
        for name, entries in states.items()
    }


def _private(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of this rank's shards of what is a worker's own."""
    found = {name: find(name) for name in entries}
    return {name: local(entries[name]).clone() for name, entry in found.items() if entry is not None and entry.private}
