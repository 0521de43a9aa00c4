"""The momentum of every worker in one checkpoint: gathered before saving, handed out after loading."""

from typing import Any

import torch
from torch import Tensor

import signsgd_core as core

from .agreement import Purpose, meet
from .loading import OTHERS, SHARDS, check, unsign
from .optimizer import Signum, find_signum
from .peers import Message


def gather_state(optimizer: Signum) -> dict[str, Any]:
    """Return `optimizer.state_dict()` of rank 0 with the momenta of all ranks; every rank must call it.

    Where nodes vote, they are those of all nodes, each put together from its ranks' shards. Momenta travel one
    parameter after the other and are kept in the host's memory. Where no rank has a momentum of its own
    (``betas=(0, 0)``, or one rank) the state is the ordinary one and nothing is sent.

    Args:
        optimizer: that votes.

    Returns:
        On rank 0 what to save. On other ranks their ordinary state, which is not to be saved.

    Raises:
        PeerLostError: if a rank does not answer within the process group's timeout.

    Example:
        >>> state = gather_state(optimizer)  # doctest: +SKIP
        >>> if dist.get_rank() == 0:  # doctest: +SKIP
        ...     torch.save({"model": model.state_dict(), "optimizer": state}, "checkpoint.pt")
    """
    optimizer = find_signum(optimizer)
    state = optimizer.state_dict()
    if optimizer.exchange is None or not any(group["betas"][0] > 0 for group in optimizer.param_groups):
        return state
    peers, everyone = optimizer.exchange.peers, optimizer.exchange.everyone
    segments = optimizer.segments()
    here = torch.tensor(["momentum" in optimizer.state.get(s.parameter, {}) for s in segments])
    wire = everyone.wire(segments[0].parameter.device)
    meet(everyone, Purpose.STATE, wire)
    wanted = everyone.gather(here.to(wire), Message.HELD).any(0).nonzero().flatten().tolist()
    entries = {key: dict(values) for key, values in state["state"].items()}  # they are the optimizer's own
    others: dict[int, Tensor] = {}
    for key, momentum in zip(wanted, optimizer.exchange.momenta(segments, wanted), strict=True):
        rows = None if momentum is None else peers.collect(momentum.to(wire), Message.MOMENTA)
        if rows is not None:
            entries.setdefault(key, {})["momentum"] = momentum
            others[key] = rows[1:].cpu()
    if everyone.rank > 0:
        return state
    state, _ = unsign(state)  # it has everybody's
    return {**state, "state": entries, **({OTHERS: others} if others and peers.world_size > 1 else {})}


def scatter_state(optimizer: Signum, state: dict[str, Any]) -> None:
    """Load a state so that every rank goes on with its own momentum, also with another number of ranks than saved it.

    With more ranks, new rank `i` takes the momentum of old rank ``i mod M``; with fewer each takes the mean of those it
    replaces (`signsgd_core.inherited`). Nodes, where they vote or did, count as ranks do. An ordinary state counts as
    that of one rank.

    Args:
        optimizer: that votes, or is alone.
        state: what `gather_state` or `Signum.state_dict` returned, loaded on every rank.

    Raises:
        ValueError: if the state is another optimizer's or of a sharded checkpoint, or a momentum does not fit its
            parameter; then nothing was loaded.
        TypeError: if the optimizer is no `Signum`.

    Example:
        >>> scatter_state(optimizer, torch.load("checkpoint.pt", weights_only=True)["optimizer"])  # doctest: +SKIP
    """
    optimizer = find_signum(optimizer)
    others: dict[int, Tensor] = state.get(OTHERS, {})
    _check(optimizer, state, others)
    peers = None if optimizer.exchange is None else optimizer.exchange.peers
    rank, world_size = (0, 1) if peers is None else (peers.rank, peers.world_size)
    own = {key: dict(entries) for key, entries in state["state"].items()}
    for key, rows in others.items():
        first = own[key]["momentum"].to(rows.device)
        mean = core.inherited(torch.cat([first[None], rows]).float(), rank, world_size)
        own[key]["momentum"] = mean.to(first.dtype)  # one that is narrower rounds once
    optimizer.load_state_dict({**{name: value for name, value in state.items() if name != OTHERS}, "state": own})
    if optimizer.exchange is not None:
        optimizer.exchange.keep_own(optimizer.segments())


def _check(optimizer: Signum, state: dict[str, Any], others: dict[int, Tensor]) -> None:
    check(state)
    if SHARDS in state:
        raise ValueError("the momenta of this state lie beside its file: resume from the directory, not from the file")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [key for group in state["param_groups"] for key in group["params"]]
    shapes = dict(zip(saved, (p.shape for p in parameters), strict=False))
    for key, entries in state["state"].items():
        for name in ("momentum", "verdict_momentum"):
            value = entries.get(name)
            if value is not None and key in shapes and value.shape != shapes[key]:
                raise ValueError(
                    f"the {name} of parameter {key} must have its shape {tuple(shapes[key])}, the saved one has "
                    f"{tuple(value.shape)}: build the model that was saved"
                )
    ranks = {len(rows) for rows in others.values()}
    if len(ranks) > 1:
        raise ValueError(f"{OTHERS} must all be of one number of ranks, got {sorted(1 + count for count in ranks)}")
    for key, rows in others.items():
        if key not in shapes or rows.shape[1:] != shapes[key] or "momentum" not in state["state"].get(key, {}):
            raise ValueError(
                f"{OTHERS} of parameter {key} must be rows of a parameter with a momentum, of its shape "
                f"{tuple(shapes.get(key, ()))}, got {tuple(rows.shape)}"
            )
