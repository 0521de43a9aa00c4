"""Sharded checkpoints: a directory in which every rank writes its own momenta, and no rank holds another's.

Momenta of a vote are shards of torch's checkpoint, since a worker may go on with the mean of several. Under local steps
a rank's states are whole, whatever they consist of, and have a file of the rank's.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # no Exception, only a BaseException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import signsgd_core as core

from ..state import any_private, find
from ..vote.agreement import Purpose, meet
from ..vote.transport import PointToPoint
from .atomic import META, PART, check_target, remove, replace
from .index import Reader, read_index
from .inner import OUTER
from .loading import SHARDS, reason_of, unsign

_STATES = "rank{}.pt"
"""Has a rank's states under local steps: number of the optimizer -> state."""

_IN_FILES = "states_in_files_of_ranks"
"""Is true in a state that those files have; before there were any, tensors were shards, and all else was rank 0's."""

T = TypeVar("T")


def save_shards(checkpoint: dict[str, Any], path: str) -> None:
    """Write a checkpoint as a directory that has its name only when it is whole; every rank must call it.

    Args:
        checkpoint: as Lightning makes it, each rank with its own optimizer states.
        path: of a directory that all ranks see, the same on all.

    Raises:
        RuntimeError: on all ranks, if one could not write, if something else than a checkpoint has that name, or if
            the ranks do different things.

    Example:
        >>> save_shards({"optimizer_states": [optimizer.state_dict()]}, "epoch=3.ckpt")  # doctest: +SKIP
    """
    rank = dist.get_rank()
    rest, momenta, whole = _part(checkpoint, rank, dist.get_world_size())
    with whole_directory(path) as (part, failed):
        if any(SHARDS in state and _IN_FILES not in state for state in rest.get("optimizer_states", ())):
            together(lambda: save(momenta, storage_writer=FileSystemWriter(part)), failed)

        def write_rest() -> None:
            if whole:
                torch.save(whole, os.path.join(part, _STATES.format(rank)))
            if rank == 0:
                torch.save(rest, os.path.join(part, META))

        together(write_rest, failed)


@contextmanager
def whole_directory(path: str) -> Iterator[tuple[str, str]]:
    """Give all ranks a directory to write to, which gets its name when all are through; every rank must enter it.

    Args:
        path: of a directory that all ranks see, the same on all.

    Yields:
        The path to write to, and how an error is to begin.

    Raises:
        RuntimeError: on all ranks, if something else than a checkpoint has that name, or if the ranks do different
            things.
    """
    _meet(Purpose.SAVE)
    path = path.rstrip(os.sep)  # else the part would be inside of what it is to replace
    rank, part, failed = dist.get_rank(), f"{path}{PART}", f"could not save {path}: "

    def begin() -> None:
        if rank == 0:
            check_target(path)
            remove(part)
            os.makedirs(part)

    def finish() -> None:
        if rank == 0:
            replace(part, path)

    together(begin, failed)
    yield part, failed
    together(finish, failed)


def load_shards(
    path: str, read: Callable[[str], dict[str, Any]], worker: int, workers: int, momenta: bool
) -> dict[str, Any]:
    """Read a directory; every rank must call it and gets the momenta that its worker inherits in its optimizer states.

    With more workers than saved it, new worker `i` takes the momentum of old one ``i mod M``; with fewer each takes the
    mean of those it replaces (`signsgd_core.predecessors`), and reads no others. States under local steps have no mean:
    a worker takes that of the first that it replaces.

    Args:
        path: of the directory.
        read: reads a checkpoint that is one file.
        worker: `i`, a rank, or its node where nodes vote.
        workers: how many there are now.
        momenta: whether they are wanted.

    Returns:
        The checkpoint, as if it had been one file that this worker wrote.

    Raises:
        RuntimeError: on all ranks, if one could not read what it needs.

    Example:
        >>> load_shards("epoch=3.ckpt", torch.load, 0, 4, momenta=True)  # doctest: +SKIP
    """

    def work() -> dict[str, Any]:
        checkpoint = read(os.path.join(path, META))
        states: dict[Any, Any] = dict(enumerate(checkpoint.get("optimizer_states", ())))
        saved = {k: state.pop(SHARDS, 0) for k, state in states.items()}
        in_files = [saved.pop(k) for k, state in states.items() if state.pop(_IN_FILES, False)]
        if momenta and in_files:
            old = core.predecessors(worker, workers, in_files[0])[0]
            whole_states: dict[Any, Any] = read(os.path.join(path, _STATES.format(old)))
            for k, state in whole_states.items():
                states[k]["state"] = state
        if momenta and any(saved.values()):
            whole = {k for k in saved if OUTER in states[k]}
            for (k, key, name), value in _inherited(path, saved, whole, worker, workers).items():
                states[k]["state"].setdefault(key, {})[name] = value
        return checkpoint

    _meet(Purpose.LOAD)
    return together(work)


def _part(
    checkpoint: dict[str, Any], rank: int, world_size: int
) -> tuple[dict[str, Any], dict[str, Tensor], dict[int, Any]]:
    """Part a checkpoint into what ranks have in common, and this rank's: momenta by name, and whole states.

    States under local steps stay whole, since optimizers keep lists of tensors and counts in them, too.
    """
    states, own, whole = list(checkpoint.get("optimizer_states", ())), dict[str, Tensor](), dict[int, Any]()
    for k, state in enumerate([unsign(state)[0] for state in states]):
        if OUTER in state:
            whole[k] = state["state"]
            states[k] = {**state, "state": {}, SHARDS: world_size, _IN_FILES: True}
        elif any_private(state["param_groups"]):
            entries = {key: dict(values) for key, values in state["state"].items()}  # they are the optimizer's own
            for key, values in entries.items():
                for name in [name for name in values if _is_private(name)]:
                    own[f"{k}.{key}.{name}.{rank}"] = values.pop(name)
            states[k] = {**state, "state": entries, SHARDS: world_size}
    return {**checkpoint, "optimizer_states": states} if states else checkpoint, own, whole


def _is_private(name: str) -> bool:
    entry = find(name)
    return entry is not None and entry.private


def _inherited(
    path: str, saved: dict[int, int], whole: set[int], worker: int, workers: int
) -> dict[tuple[int, int, str], Tensor]:
    """Return a worker's own state by optimizer, parameter and entry.

    Args:
        path: of the directory.
        saved: optimizer -> how many ranks wrote it.
        whole: the optimizers whose states are whole: files of earlier versions have the tensors of local steps here.
        worker: `i`.
        workers: how many there are now.
    """
    index = read_index(path)
    rows, wanted = dict[tuple[int, int, str], Tensor](), dict[str, Any]()
    for label, found in index.state_dict_metadata.items():
        place, old_rank = _parse(label)
        old = core.predecessors(worker, workers, saved[place[0]])
        old = old[:1] if place[0] in whole else old
        if place not in rows:
            size, dtype = found.size, found.properties.dtype  # type: ignore[union-attr]
            rows[place] = torch.zeros(
                len(old), *size, dtype=dtype, device="cpu"
            )  # a rank that never used the parameter has none
        if old_rank in old:
            wanted[label] = rows[place][old.index(old_rank)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads on its own
        load(wanted, storage_reader=Reader(path, index), no_dist=True)
    return {place: rows[0] if place[0] in whole else _inherit(place[2], rows) for place, rows in rows.items()}


def _parse(label: str) -> tuple[tuple[int, int, str], int]:
    """Return optimizer, parameter and entry, and the rank; in version 0.1.0 all were momenta and labels did not say."""
    optimizer, key, *name, rank = label.split(".")
    return (int(optimizer), int(key), *(name or ["momentum"])), int(rank)  # type: ignore[return-value]


def _inherit(name: str, values: Tensor) -> Tensor:
    """Return what one worker goes on with, from the values of those it replaces."""
    entry = find(name)
    if entry is None:
        raise ValueError(f"this checkpoint holds {name!r}, which this version does not know: update it")
    return entry.inherited(values)


def _meet(purpose: Purpose) -> None:
    world = dist.group.WORLD
    assert world is not None
    everyone = PointToPoint(world)
    meet(everyone, purpose, everyone.wire(torch.device("cuda")))


def together(work: Callable[[], T], failed: str = "") -> T:
    """Do something on every rank, and fail on all if one fails."""
    result, reason = None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:
        reason = _reason(error)
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    for rank, said in enumerate(reasons):
        if said is not None:
            raise RuntimeError(f"{failed}rank {rank}: {said}")
    return result  # type: ignore[return-value]


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason_of(error)
