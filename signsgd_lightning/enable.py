"""The vote in plain torch: one line behind the optimizer."""

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from signsgd_core.adversaries import Adversary

from . import _compat
from .checks import check_group, check_vote, refuse_mean
from .memory import as_bytes, once, plain
from .optimizer import Signum, find_signum
from .sharding import is_sharded, local
from .vote import Vote, VoteOptions
from .vote.agreement import Purpose, agree, describe
from .vote.local_gradients import keep_local
from .vote.nodes import find_nodes
from .vote.options import VoteBetween
from .vote.schedule import AtStep, DuringBackward, Schedule
from .vote.sharded import Sharded, check_sharded, find_shards, group_of
from .vote.topology import Flat, Nodes, Topology
from .vote.transport import Message, PointToPoint


def enable_majority_vote(
    model: nn.Module,
    *optimizers: Signum,
    process_group: dist.ProcessGroup | None = None,
    mesh: DeviceMesh | None = None,
    verify_every_n_steps: int = 0,
    adversaries: Mapping[int, Adversary] | None = None,
    vote_between: VoteBetween = "ranks",
    overlap: bool = False,
) -> None:
    """Let every step of the optimizers be a majority vote of all ranks.

    A model that `DistributedDataParallel` has wrapped goes on as it does: parameters and buffers start from rank 0's,
    buffers are broadcast before each forward pass; but every rank keeps its own gradients. Of any other model
    parameters and buffers are broadcast from rank 0 once, here; its buffers are each rank's own afterwards.

    Args:
        model: whose parameters the optimizers hold, wrapped or not.
        *optimizers: of the model's parameters, in the same order on all ranks.
        process_group: of the ranks that vote. None is that of the wrapped model, else the default group.
        mesh: the dimension along which copies of a sharded model lie, which `fully_shard` was not shown:
            ``mesh["replicate"]``. A worker is then the ranks of one copy, and each votes on its local shards
            (`signsgd_lightning.vote.sharded.Sharded`). In the place of `process_group`.
        verify_every_n_steps: how often all ranks make sure that they hold the same parameters and verdict momenta, bit
            for bit (`RanksDifferError` if not); 0 for never.
        adversaries: worker (a rank, or a node) -> what it makes of its gradients before it votes
            (`signsgd_core.adversaries`), to try what a vote withstands; each rank of a node its own, before the mean.
        vote_between: "ranks", each of which is a worker; or "nodes", each of which is one worker whose gradient is the
            mean of its ranks'. torchrun says which ranks share a node.
        overlap: let ballots travel while the backward pass goes on. What changes gradients between ``backward()`` and
            ``step()``, as clipping does, is then refused at `step`.

    Raises:
        TypeError: if an optimizer is not a `Signum`.
        ValueError: without an optimizer, or if one holds a parameter that is not the model's, the model's
            embeddings have sparse gradients, or parameters lie on several devices; if there is no telling which
            ranks share a node, or nodes differ in how many; for what `overlap` excludes; for a mesh along which the
            model is sharded or averaged, or of some ranks where it is not sharded among the others.
        RuntimeError: if the ranks differ in parameters or settings; if the model has another communication hook.

    Example:
        >>> model = DistributedDataParallel(model, gradient_as_bucket_view=True)  # doctest: +SKIP
        >>> optimizer = Signum(model.parameters(), lr=1e-3)  # doctest: +SKIP
        >>> enable_majority_vote(model, optimizer)  # doctest: +SKIP
    """
    options = VoteOptions(verify_every_n_steps, adversaries, vote_between, overlap)
    group = group_of(mesh, process_group)
    if mesh is not None and not isinstance(_find_ddp(_compat.uncompiled(model)), DistributedDataParallel):
        check_sharded(model, mesh)
    let_vote(model, optimizers, options, group)


def let_vote(
    model: nn.Module,
    optimizers: Sequence[Signum],
    options: VoteOptions,
    process_group: dist.ProcessGroup | None = None,
    place: tuple[int, int] | None = None,
) -> None:
    """Let the optimizers vote; see `enable_majority_vote`.

    Args:
        model: whose parameters they hold.
        optimizers: that are to vote.
        options: of the votes.
        process_group: of the ranks.
        place: ranks per node and this rank's own in it, where torchrun does not tell.
    """
    model = _find_ddp(_compat.uncompiled(model))
    optimizers = [find_signum(optimizer, number) for number, optimizer in enumerate(optimizers)]
    check_vote(model, optimizers)
    if len(optimizers) > 1:
        options.exclude({f"{len(optimizers)} optimizers": True})
    group = _group(model, process_group)
    shards = find_shards(model, group)
    if shards is not None:
        options.exclude({"sharded parameters": True})
        options.exclude_nodes("sharded parameters")
    if dist.get_world_size(group) == 1:
        options.check_workers(1)
        keep_local(model, guard=False)
        for optimizer in optimizers:
            optimizer.vote, optimizer.lost_vote = None, False
        return
    everyone = group if shards is None else shards.everyone
    refuse_mean(optimizers, "enable_majority_vote")
    _agree(model, everyone, [f"vote_between={options.vote_between!r}", f"optimizers: {len(optimizers)}"])
    number_of_model = number_of(model, everyone)
    topologies = [Sharded(shards) if shards else _topology(model, options, group, place) for _ in optimizers]
    options.check_workers(topologies[0].workers.world_size)
    if not isinstance(model, DistributedDataParallel):
        agree_on_model(model, everyone)
    names = {id(p): name.removeprefix("module.") for name, p in model.named_parameters()}
    votes = list[Vote]()
    for number, (optimizer, topology) in enumerate(zip(optimizers, topologies, strict=True)):
        label = f"optimizer {number} of model {number_of_model}"
        vote = Vote(topology, names, label, options, _schedule(model, optimizer, options), model)
        vote.agree(optimizer.views(), optimizer.settings_in_words(vote=vote), Purpose.ENABLE)
        votes.append(vote)
    # Nothing was changed so far: whatever the ranks disagree about, they are as they were.
    if not isinstance(model, DistributedDataParallel):
        broadcast(model, everyone, group)
    keep_local(model, guard=True)
    for optimizer, vote in zip(optimizers, votes, strict=True):
        optimizer.vote = vote
        optimizer.warn_of_lost()


_enabled = 0
"""How many models this process has let vote, or another rank of theirs: two of one structure are told apart by it."""


def agree_on_model(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Make sure that all ranks have the same parameters, before these are wrapped or broadcast.

    Raises:
        RuntimeError: if they differ, on all ranks, naming the first difference.
    """
    parameters = dict(model.named_parameters())
    if parameters and not any(map(is_lazy, parameters.values())):  # DDP has its own words for these
        _agree(model, group, [describe(name, p) for name, p in parameters.items()])


def number_of(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Return the number of a model that is about to vote, the same on all ranks."""
    global _enabled
    everyone = PointToPoint(group)
    own = torch.tensor([_enabled], device=everyone.wire(next(model.parameters()).device))
    number = int(everyone.gather(own, Message.NUMBER).max())
    _enabled = number + 1
    return number


def _agree(model: nn.Module, group: dist.ProcessGroup, lines: list[str]) -> None:
    everyone = PointToPoint(group)
    device = everyone.wire(next(model.parameters()).device)
    agree(everyone, lines, torch.ones(0, dtype=torch.bool, device="cpu"), device, Purpose.ENABLE)


def _topology(
    model: nn.Module, options: VoteOptions, group: dist.ProcessGroup, place: tuple[int, int] | None
) -> Topology:
    if options.vote_between == "ranks":
        return Flat(PointToPoint(group))
    groups = find_nodes(group, next(model.parameters()).device, *(place or ()))
    return Nodes(groups) if dist.get_world_size(groups.inside) > 1 else Flat(PointToPoint(group))


def _schedule(model: nn.Module, optimizer: Signum, options: VoteOptions) -> Schedule:
    if not options.overlap:
        return AtStep()
    if not isinstance(model, DistributedDataParallel):
        return DuringBackward(optimizer, lambda: True)
    unused = {"find_unused_parameters=True": model.find_unused_parameters, "static_graph=True": model.static_graph}
    options.exclude(unused)
    return DuringBackward(optimizer, _synchronises(model))


def _group(model: nn.Module, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the process group of the ranks that vote."""
    if isinstance(model, DistributedDataParallel):
        if process_group not in (None, model.process_group):
            raise ValueError("process_group, or mesh, must be that of the DDP model: leave it out")
        group: dist.ProcessGroup = model.process_group
        return group
    return check_group(process_group, "a majority vote needs")


def _synchronises(model: DistributedDataParallel) -> Callable[[], bool]:
    """Return what tells whether a backward pass is outside of `no_sync`, without keeping the model alive."""
    ddp = weakref.ref(model)

    def is_last() -> bool:
        found = ddp()
        return found is not None and bool(found.require_backward_grad_sync)

    return is_last


def broadcast(model: nn.Module, everyone: dist.ProcessGroup, counterparts: dist.ProcessGroup | None = None) -> None:
    """Start all ranks from the first one's parameters and buffers.

    Args:
        model: that has them.
        everyone: all ranks.
        counterparts: those that hold the same shards of DTensors.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        group = counterparts if counterparts is not None and is_sharded(tensor) else everyone
        _take(once(local(tensor.detach())), group)


def _take(own: Tensor, group: dist.ProcessGroup) -> None:
    """Take a tensor's values from the first rank; backends move memory as it lies, whatever the strides."""
    values = as_bytes(plain(own))
    dist.broadcast(values, dist.get_global_rank(group, 0), group)
    if values.data_ptr() != own.data_ptr():  # a copy in row-major order
        own.copy_(values.view(own.dtype).view(own.shape))


def _find_ddp(model: nn.Module) -> nn.Module:
    """Return the model that DDP has wrapped, where it is inside of another wrapper; else the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"enable_majority_vote takes a model first, a torch.nn.Module, got {type(model).__name__}")
    wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if len(wrapped) > 1 or (wrapped and len(list(wrapped[0].parameters())) != len(list(model.parameters()))):
        raise ValueError(
            "the model has DistributedDataParallel around a part of it, which would average that part's gradients: "
            "wrap it once, as a whole"
        )
    return wrapped[0] if wrapped else model
