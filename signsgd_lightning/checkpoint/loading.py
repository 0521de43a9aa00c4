"""Loading an optimizer's state bit for bit, and what it may hold beside this rank's own."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._compat import called_by_torch
from ..state import ENTRIES, find

OTHERS = "state_of_other_workers"
"""Where a gathered state has it: entry -> parameter -> of shape (workers − 1, *parameter.shape), worker 1 first."""

INNER = "inner_states_of_other_workers"
"""Where a gathered state of local steps has the state of worker 1, worker 2, …"""

_MOMENTA = "momenta_of_other_ranks"
"""Where states of version 0.1.0 have it: parameter -> momentum."""

SHARDS = "ranks_with_momentum_shards"
"""Where the state of a sharded checkpoint has how many ranks wrote their momenta beside it."""

SAVED_BY = "momentum_of_worker"
"""Where each parameter group of a state says whose momentum it has, where workers differ in it."""

Others = dict[str, dict[int, Tensor]]

_UNTRUSTED = re.compile(r"GLOBAL (\S+) was not an allowed global")
"""What torch says of a file that holds more than tensors and plain values, where it is not told to trust it."""

_ONLY_FIRST = (
    "this state holds the momenta of several ranks, of which rank 0's was loaded: to give every rank its own, load it "
    "with signsgd_lightning.scatter_state; in Lightning under strategy='majority_vote'; in Hugging Face's Trainer "
    "after trainer.add_callback(MajorityVoteCallback(trainer))"
)
_NO_MOMENTA = (
    "this state is of a sharded checkpoint and its momenta start from zero: to give every rank its own, resume from "
    "the directory under strategy='majority_vote'"
)


_BY_GATHERING = (
    "saved: save what signsgd_lightning.gather_state(optimizer) returns, and load it on every rank by "
    "scatter_state(optimizer, state); in Lightning trainer.save_checkpoint and fit(ckpt_path=…) do that, in Accelerate "
    "accelerator.register_for_checkpointing(WorkerStates(optimizer)), in Hugging Face's Trainer "
    "MajorityVoteCallback(trainer); of a run that was killed within a save take an older checkpoint"
)
_BY_DIRECTORY = (
    "loaded: save a directory for each worker, by torch.distributed.checkpoint with its shard group as process_group, "
    "and load each worker's own"
)


def reason_of(error: BaseException) -> str:
    """Return in a line why a file could not be read or written, with the words by which `untrusted` finds its class."""
    text = str(error) or type(error).__name__
    found = _UNTRUSTED.search(text)
    return found[0] if found else text.splitlines()[0]


def untrusted(error: BaseException) -> str | None:
    """Return the class or function for which torch refused a file that may be whole, None after another error."""
    found = _UNTRUSTED.search(str(error))
    return found[1] if found else None


def check(state_dict: dict[str, Any]) -> None:
    """Make sure that a state is one of `Signum`.

    Raises:
        ValueError: if it is another optimizer's, naming what it looks like, or something else altogether.
    """
    _check_form("Signum", state_dict)
    for group in state_dict["param_groups"]:
        if "zeros" not in group or "verdict_momentum" not in group:
            raise ValueError(
                f"this is the state of {_likely_optimizer(group)}, not of Signum: load the weights alone and let the "
                "momentum start anew. Leave out optimizer.load_state_dict; in Lightning load the model by "
                "load_from_checkpoint(path) and call fit without ckpt_path"
            )


def check_kind(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Make sure that a state is not another optimizer's of torch, which would load, and fail in a step.

    Raises:
        ValueError: if a setting of the optimizer is missing and the others are all that another one has; for something
            else altogether.
    """
    _check_form(type(optimizer).__name__, state_dict)
    for group in state_dict["param_groups"]:
        missing = sorted(optimizer.defaults.keys() - group.keys())
        if missing and (names := _optimizers_of(_settings(group))):
            raise ValueError(
                f"this is the state of {' or '.join(names)}, not of {type(optimizer).__name__}, which needs "
                f"{', '.join(missing)}: take the optimizer that saved it, or load the weights alone"
            )


def _check_form(kind: str, state_dict: dict[str, Any]) -> None:
    for name in ("state", "param_groups"):
        if name not in state_dict:
            has = ", ".join(map(repr, state_dict))
            raise ValueError(f"this is no state of {kind}: it has no {name!r}, only {has}")


def _likely_optimizer(group: dict[str, Any]) -> str:
    """Return which optimizer a saved parameter group is likely of."""
    settings = _settings(group)
    if names := _optimizers_of(settings):
        return " or ".join(names)
    return f"an optimizer with the settings {', '.join(sorted(settings))}" if settings else "another optimizer"


def _settings(group: dict[str, Any]) -> set[str]:
    return set(group) - {"params", "initial_lr", "param_names"}


def _optimizers_of(settings: set[str]) -> list[str]:
    """Return which of torch's optimizers have just these settings."""
    names = []
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer:
            with suppress(Exception):  # of one that takes other arguments
                if set(kind([torch.zeros(1, 1)]).defaults) == settings:  # type: ignore[call-arg]
                    names.append(name)
    return names


def sign(state_dict: dict[str, Any], worker: tuple[int, int]) -> dict[str, Any]:
    """Return a state that says whose momentum it has: the worker's number, of how many."""
    groups = [{**group, SAVED_BY: worker} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def unsign(state_dict: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Return a state without what `sign` put into it, and that."""
    workers = {tuple(group[SAVED_BY]) for group in state_dict["param_groups"] if SAVED_BY in group}
    groups = [{k: v for k, v in group.items() if k != SAVED_BY} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}, next(iter(workers), None)


def warn_of_lost(saved_by: tuple[int, int] | None, worker: tuple[int, int], *, sharded: bool = False) -> None:
    """Say so where a state has one worker's momentum, of several, and another worker has loaded it.

    Args:
        saved_by: whose momentum was loaded, None if that is not known.
        worker: whose it is now; each its number, of how many.
        sharded: whether a worker has a directory of its own, which says whose it is.
    """
    # Else torch keeps one rank's value of every tensor, here of any rank.
    by_torch = called_by_torch("_load_optim_state_dict") and not sharded
    if not by_torch and (saved_by is None or saved_by[1] == 1 or saved_by == worker):
        return
    whose = "some worker" if by_torch or saved_by is None else f"worker {saved_by[0]} of {saved_by[1]}"
    warnings.warn(
        f"worker {worker[0]} of {worker[1]} goes on with the momentum of {whose}, since its own was not "
        + (_BY_DIRECTORY if sharded else _BY_GATHERING),
        stacklevel=4,
    )


def warn_of_others(state_dict: dict[str, Any]) -> None:
    """Say so where the caller of the caller loads a state of several ranks as if it were of one."""
    for key, warning in (*((key, _ONLY_FIRST) for key in (OTHERS, INNER, _MOMENTA)), (SHARDS, _NO_MOMENTA)):
        if key in state_dict:
            warnings.warn(warning, stacklevel=3)


def drop_others(group: dict[str, Any]) -> None:
    """Remove what a Trainer's checkpoint has of other workers in its first group, and say so: no callback took it."""
    if group.pop(OTHERS, None) is not None:
        warnings.warn(_ONLY_FIRST, stacklevel=4)


def part(state_dict: dict[str, Any]) -> tuple[dict[str, Any], Others]:
    """Return a gathered state as that of its first worker, and what the others have.

    Raises:
        ValueError: if another's state has an entry that no table has.
    """
    own = {key: value for key, value in state_dict.items() if key not in (OTHERS, _MOMENTA)}
    others: Others = state_dict.get(OTHERS, {})
    if _MOMENTA in state_dict:
        others = {"momentum": state_dict[_MOMENTA]}
    unknown = [name for name in others if find(name) is None]
    if unknown:
        known = ", ".join(repr(entry.name) for entry in ENTRIES)
        raise ValueError(f"this state holds {unknown[0]!r} of other workers, and this version knows {known}: update it")
    return own, others


@contextmanager
def uncast(optimizer: Optimizer) -> Iterator[None]:
    """While torch loads a state, which it casts to the parameters' dtypes, put back what was cast.

    Args:
        optimizer: whose state has the dtypes of the table.
    """
    loaded: dict[str, Any] = {}

    def keep(_: Optimizer, final: dict[str, Any]) -> None:
        loaded.update(final)

    def undo_cast(_: Optimizer) -> None:
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        for key, (p, group) in zip(keys, parameters, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    entry = find(name)
                    dtype = value.dtype if entry is None else entry.dtype(group)
                    optimizer.state[p][name] = value.detach().to(p.device, dtype, copy=True).contiguous()

    handles = [  # after the user's own hooks have changed what is loaded, before they see what was
        optimizer.register_load_state_dict_pre_hook(keep),
        optimizer.register_load_state_dict_post_hook(undo_cast, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
