"""Local steps in one checkpoint: every rank's own optimizer state, whatever the optimizer, and what is the same on all.

States travel as the bytes that `torch.save` writes and are read as data alone, never as code.
"""

import io
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import signsgd_core as core

from ..local_steps import LocalSteps
from ..state import ENTRIES
from ..vote.agreement import Purpose, meet
from ..vote.transport import Message
from .loading import INNER, OTHERS, Others, part

OUTER = "local_steps"
"""Where a state has outer momenta and the number of rounds, if it is the first optimizer's; else None."""


def gather_inner(local: LocalSteps, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with those of all ranks, on rank 0; see `gather_state`.

    Raises:
        RuntimeError: on all ranks, if one has taken steps since the last round.
        PeerLostError: if a rank does not answer.
    """
    everyone, state = local.vote.topology.everyone, own_state(local, optimizer)
    wire = everyone.wire(next(p.device for group in optimizer.param_groups for p in group["params"]))
    check_closed(local, Purpose.STATE, wire)
    data = _to_bytes(state["state"]).to(wire)
    sizes = everyone.gather(torch.tensor([len(data)], device=wire), Message.INNER_SIZE).flatten().tolist()
    row = torch.zeros(max(sizes), dtype=torch.uint8, device=wire)
    row[: len(data)] = data
    rows = everyone.collect(row, Message.INNER_STATE)
    if rows is None or len(rows) == 1:
        return state
    return {**state, INNER: [_from_bytes(row[:size]) for row, size in zip(rows[1:].cpu(), sizes[1:], strict=True)]}


def own_state(local: LocalSteps, optimizer: Optimizer) -> dict[str, Any]:
    """Return this rank's state of an optimizer, with what is the same on all ranks if it is the first."""
    first = optimizer is local.optimizers[0]
    return {**optimizer.state_dict(), OUTER: local.state_dict() if first else None}


def scatter_inner(local: LocalSteps, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Give every rank the state of the worker that it goes on from; see `scatter_state`.

    With more ranks, new rank `i` takes the state of old rank ``i mod M``; with fewer that of the first of those that it
    replaces: states of any optimizer have no mean. A state without others is for all. The round ends without a vote.
    """
    first, others = part(dict(state))
    everyone = [first["state"], *state.get(INNER, ()), *_by_worker(first["state"], others)]
    ranks = local.vote.topology.everyone
    old = core.predecessors(ranks.rank, ranks.world_size, len(everyone))[0]
    if state.get(OUTER) is not None:
        local.load_state_dict(state[OUTER])  # first: it is what refuses
    optimizer.load_state_dict({"state": everyone[old], "param_groups": state["param_groups"]})
    local.forget_steps()


def of_a_vote(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a `Signum` as voters gather it, also where it took local steps; see `gather_state`.

    Momenta are zeros for a worker that has none, as in a vote.
    """
    if INNER not in state:
        return dict(state)
    everyone = [state["state"], *state[INNER]]
    entries, others = {key: dict(values) for key, values in everyone[0].items()}, Others()
    keys = sorted({key for held in everyone for key in held})
    for entry, key in product([entry for entry in ENTRIES if entry.private], keys):
        rows = [held.get(key, {}).get(entry.name) for held in everyone]
        like = next((row for row in rows if row is not None), None)
        if like is not None:
            first, *rest = (torch.zeros_like(like) if row is None else row for row in rows)
            entries.setdefault(key, {})[entry.name] = first
            others.setdefault(entry.name, {})[key] = torch.stack([row.cpu() for row in rest])
    return {**{name: value for name, value in state.items() if name != INNER}, "state": entries, OTHERS: others}


def check_closed(local: LocalSteps, purpose: Purpose, wire: torch.device) -> None:
    """Make sure that no rank has taken steps since the last round.

    Raises:
        RuntimeError: on all ranks, if one has.
        PeerLostError: if a rank does not answer.
    """
    flags = meet(local.vote.topology.everyone, purpose, wire, flag=local.is_open)[:, -1].tolist()
    if any(flags):
        raise RuntimeError(
            f"rank {flags.index(1)} has taken steps since the last round, so parameters differ from rank to rank: call "
            "close_round() of what enable_local_steps returned, on every rank, before anything is saved"
        )


def _by_worker(first: Mapping[int, Mapping[str, Any]], others: Others) -> list[dict[int, dict[str, Any]]]:
    """Return the whole states of a vote's other workers: what is the same on all, with what is each one's own."""
    count = max((len(rows) for by_key in others.values() for rows in by_key.values()), default=0)
    states = [{key: dict(entries) for key, entries in first.items()} for _ in range(count)]
    for name, by_key in others.items():
        for key, rows in by_key.items():
            for state, row in zip(states, rows, strict=True):
                state[key][name] = row
    return states


def _to_bytes(state: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
