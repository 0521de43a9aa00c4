"""Local steps in one checkpoint: every rank's own optimizer state, whatever the optimizer, and what is the same on all.

States travel as the bytes that `torch.save` writes and are read as data alone, never as code.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import signsgd_core as core

from ..local_steps import LocalSteps
from ..vote.agreement import Purpose, meet
from ..vote.transport import Message

INNER = "inner_states_of_other_workers"
"""Where a gathered state has the state of worker 1, worker 2, …"""

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
    replaces: states of any optimizer have no mean. A state without others is for all.
    """
    everyone = [state["state"], *state.get(INNER, ())]
    ranks = local.vote.topology.everyone
    old = core.predecessors(ranks.rank, ranks.world_size, len(everyone))[0]
    optimizer.load_state_dict({"state": everyone[old], "param_groups": state["param_groups"]})
    if state.get(OUTER) is not None:
        local.load_state_dict(state[OUTER])


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


def _to_bytes(state: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
