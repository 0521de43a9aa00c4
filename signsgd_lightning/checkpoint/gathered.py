"""The momentum of every worker in one checkpoint: gathered before saving, handed out after loading."""

from typing import Any

import torch
from torch.optim import Optimizer

import signsgd_core as core

from ..local_steps.rounds import find_local_steps
from ..optimizer import Signum, find_signum, see_through
from ..sharding import refuse_sharded
from ..state import ENTRIES, any_private, find, private
from ..vote.agreement import Purpose, meet
from ..vote.transport import Message
from .inner import OUTER, gather_inner, of_a_vote, scatter_inner
from .loading import OTHERS, SHARDS, Others, check, check_kind, part, unsign


def gather_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return `optimizer.state_dict()` of rank 0 with the momenta of all ranks; every rank must call it.

    Of an optimizer that takes local steps it is the whole state of every rank, with the outer momenta.

    Where nodes vote, they are those of all nodes, each put together from its ranks' shards. Momenta travel one
    parameter after the other and are kept in the host's memory. Where no rank has a momentum of its own
    (``betas=(0, 0)``, or one rank) the state is the ordinary one and nothing is sent.

    Args:
        optimizer: that votes, or any that takes local steps.

    Returns:
        On rank 0 what to save. On other ranks their ordinary state, which is not to be saved.

    Raises:
        PeerLostError: if a rank does not answer within the process group's timeout.
        RuntimeError: on all ranks, if one has taken local steps since the last round.

    Example:
        >>> state = gather_state(optimizer)  # doctest: +SKIP
        >>> if dist.get_rank() == 0:  # doctest: +SKIP
        ...     torch.save({"model": model.state_dict(), "optimizer": state}, "checkpoint.pt")
    """
    local = find_local_steps(optimizer)
    if local is not None:
        return gather_inner(local, see_through(optimizer))
    optimizer = find_signum(optimizer)
    refuse_sharded(optimizer, "gather_state", _BY_TORCH)
    state, vote = optimizer.state_dict(), optimizer.vote
    if vote is None or not any_private(optimizer.param_groups):
        return state
    workers, everyone, views = vote.topology.workers, vote.topology.everyone, optimizer.views()
    wire = everyone.wire(views[0].parameter.device)
    slots = [(k, entry) for k, view in enumerate(views) for entry in private(view.group)]
    held = [entry.name in optimizer.state.get(views[k].parameter, {}) for k, entry in slots]
    meet(everyone, Purpose.STATE, wire)
    by_someone = everyone.gather(torch.tensor(held, device=wire), Message.HELD).any(0).tolist()
    wanted = [slot for slot, there in zip(slots, by_someone, strict=True) if there]
    entries = {key: dict(values) for key, values in state["state"].items()}  # they are the optimizer's own
    others: Others = {}
    for (key, entry), value in zip(wanted, vote.topology.whole(views, wanted), strict=True):
        rows = None if value is None else workers.collect(value.to(wire), Message.STATE)
        if rows is not None:
            entries.setdefault(key, {})[entry.name] = value
            others.setdefault(entry.name, {})[key] = rows[1:].cpu()
    if everyone.rank > 0:
        return state
    state, _ = unsign(state)  # it has everybody's
    return {**state, "state": entries, **({OTHERS: others} if others and workers.world_size > 1 else {})}


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state so that every rank goes on with its own momentum, also with another number of ranks than saved it.

    With more ranks, new rank `i` takes the momentum of old rank ``i mod M``; with fewer each takes the mean of those it
    replaces (`signsgd_core.inherited`). Nodes, where they vote or did, count as ranks do. An ordinary state counts as
    that of one rank. Of an optimizer that takes local steps a rank takes one old rank's whole state, with fewer ranks
    that of the first of those that it replaces, and a round that is open ends without a vote. A `Signum` may go on from
    a vote under local steps, and the other way round.

    Args:
        optimizer: a `Signum` that votes or is alone, or any that takes local steps: enable it before.
        state: what `gather_state` or `Signum.state_dict` returned, loaded on every rank.

    Raises:
        ValueError: if the state is another optimizer's or of a sharded checkpoint, or a momentum of a vote or of the
            outer step does not fit its parameter; then nothing was loaded.
        TypeError: if the optimizer is no `Signum`, and takes no local steps.

    Example:
        >>> scatter_state(optimizer, torch.load("checkpoint.pt", weights_only=True)["optimizer"])  # doctest: +SKIP
    """
    check_state(optimizer, state)
    local = find_local_steps(optimizer)
    if local is not None:
        scatter_inner(local, see_through(optimizer), state)
        return
    optimizer = find_signum(optimizer)
    own_state, others = part(of_a_vote(state))
    workers = None if optimizer.vote is None else optimizer.vote.topology.workers
    worker, count = (0, 1) if workers is None else (workers.rank, workers.world_size)
    own = {key: dict(entries) for key, entries in own_state["state"].items()}
    for name, rows_by_key in others.items():
        entry = find(name)
        assert entry is not None
        for key, rows in rows_by_key.items():
            first = own[key][name].to(rows.device)
            everyone = torch.cat([first[None], rows])
            old = core.predecessors(worker, count, len(everyone))
            own[key][name] = entry.inherited(everyone[old.start : old.stop : old.step])
    optimizer.load_state_dict({**own_state, "state": own})
    optimizer.has_mean = workers is None and bool(others)
    if optimizer.vote is not None:
        optimizer.vote.topology.keep_share(optimizer.views())


def check_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Make sure that `scatter_state` will load a state; raises what that does."""
    inner = see_through(optimizer)
    if SHARDS in state:
        raise ValueError("the momenta of this state lie beside its file: resume from the directory, not from the file")
    if find_local_steps(optimizer) is None:
        if OUTER in state and not isinstance(inner, Signum):
            raise TypeError(
                f"{type(inner).__name__} takes no local steps, of which this state is: call "
                "enable_local_steps(model, optimizer) before scatter_state"
            )
        refuse_sharded(find_signum(optimizer), "scatter_state", _BY_TORCH)
        check(state)
        _check(find_signum(optimizer), *part(of_a_vote(state)))
    else:
        check_kind(inner, state)
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], inner.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state is of groups of {sizes[0]} parameters, and the optimizer has {sizes[1]}: build the model and "
            "the groups that were saved"
        )


_BY_TORCH = (
    "save and load with torch.distributed.checkpoint, a directory for each worker and its shard group as process_group"
)


def _check(optimizer: Signum, state: dict[str, Any], others: Others) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [key for group in state["param_groups"] for key in group["params"]]
    shapes = dict(zip(saved, (p.shape for p in parameters), strict=False))
    for key, entries in state["state"].items():
        for name in [entry.name for entry in ENTRIES if entry.name in entries]:
            shape = entries[name].shape
            if key in shapes and shape != shapes[key]:
                raise ValueError(
                    f"the {name} of parameter {key} must have its shape {tuple(shapes[key])}, the saved one has "
                    f"{tuple(shape)}: build the model that was saved"
                )
    counts = {1 + len(rows) for by_key in others.values() for rows in by_key.values()}
    if len(counts) > 1:
        raise ValueError(f"the state of other workers must all be of one number of workers, got {sorted(counts)}")
    for name, by_key in others.items():
        for key, rows in by_key.items():
            if key not in shapes or rows.shape[1:] != shapes[key] or name not in state["state"].get(key, {}):
                raise ValueError(
                    f"the {name} of other workers for parameter {key} must be rows of a parameter that has it, of its "
                    f"shape {tuple(shapes.get(key, ()))}, got {tuple(rows.shape)}"
                )
