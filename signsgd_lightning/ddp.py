"""The vote in a plain `DistributedDataParallel` script."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from signsgd_core.adversaries import Adversary, check_adversaries

from .agreement import Purpose, agree, describe
from .exchange import Exchange
from .local_gradients import keep_local
from .node_exchange import NodeExchange
from .nodes import Nodes, VoteBetween, agree_on_voters, check_voters, find_nodes
from .optimizer import Signum, find_signum
from .overlap import OverlapExchange, check_overlap
from .peers import Peers


def enable_majority_vote(
    ddp_model: DistributedDataParallel,
    *optimizers: Signum,
    verify_every_n_steps: int = 0,
    adversaries: Mapping[int, Adversary] | None = None,
    vote_between: VoteBetween = "ranks",
    overlap: bool = False,
) -> None:
    """Let every `Signum` step be a majority vote of all ranks; two lines in a plain DDP script.

    DDP goes on to broadcast parameters and buffers, and hands every rank its own gradients back instead of averages.

    Args:
        ddp_model: the wrapped model; its process group votes.
        *optimizers: of the model's parameters, in the same order on all ranks.
        verify_every_n_steps: how often all ranks make sure that they hold the same parameters and verdict momenta, bit
            for bit (`RanksDifferError` if not); 0 for never.
        adversaries: worker (a rank, or a node) -> what it makes of its gradients before it votes
            (`signsgd_core.adversaries`), to try what a vote withstands; each rank of a node its own, before the mean.
        vote_between: "ranks", each of which is a worker; or "nodes", each of which is one worker whose gradient is the
            mean of its ranks' (`signsgd_lightning.node_exchange.NodeExchange`). torchrun says which ranks share a node.
        overlap: let ballots travel while the backward pass goes on (`signsgd_lightning.overlap.OverlapExchange`). What
            changes gradients between ``backward()`` and ``step()``, as clipping does, is then refused at `step`.

    Raises:
        TypeError: if the model is not wrapped, or an optimizer is not a `Signum`.
        ValueError: without an optimizer, or if one holds a parameter that is not the model's, the model's
            embeddings have sparse gradients, or parameters lie on several devices; if there is no telling which
            ranks share a node, or nodes differ in how many; for what `overlap` excludes.
        RuntimeError: if the ranks differ in parameters or settings; if the model already has a communication hook.

    Example:
        >>> model = DistributedDataParallel(model, gradient_as_bucket_view=True)  # doctest: +SKIP
        >>> optimizer = Signum(model.parameters(), lr=1e-3)  # doctest: +SKIP
        >>> enable_majority_vote(model, optimizer)  # doctest: +SKIP
    """
    let_vote(ddp_model, optimizers, verify_every_n_steps, adversaries, vote_between, overlap)


def let_vote(
    ddp_model: DistributedDataParallel,
    optimizers: Sequence[Signum],
    verify_every_n_steps: int,
    adversaries: Mapping[int, Adversary] | None,
    vote_between: VoteBetween,
    overlap: bool,
    place: tuple[int, int] | None = None,
) -> None:
    """As `enable_majority_vote`; `place`: ranks per node and this rank's own in it, for whom torchrun does not tell."""
    ddp_model = getattr(ddp_model, "_orig_mod", ddp_model)  # of a model that torch.compile took
    optimizers = [find_signum(optimizer, number) for number, optimizer in enumerate(optimizers)]
    _check(ddp_model, optimizers)
    check_voters(vote_between)
    if overlap:
        check_overlap(vote_between, adversaries, len(optimizers), ddp_model)
    group = ddp_model.process_group
    alone = dist.get_world_size(group) == 1
    nodes = None if alone else _find_voters(ddp_model, vote_between, len(optimizers), place)
    workers = dist.get_world_size(group if nodes is None else nodes.counterparts)
    check_trials(workers, verify_every_n_steps, adversaries, "rank" if vote_between == "ranks" else "node")
    keep_local(ddp_model, guard=not alone)
    names = {id(p): name for name, p in ddp_model.module.named_parameters()}
    for k, optimizer in enumerate(optimizers):
        if alone:
            optimizer.exchange = None
            continue
        name = f"optimizer {k}"
        exchange: Exchange
        if overlap:
            exchange = OverlapExchange(ddp_model, optimizer, names, name)
        else:
            exchange = Exchange(group, names, name) if nodes is None else NodeExchange(nodes, names, name)
        exchange.verify_every_n_steps = verify_every_n_steps
        exchange.adversary = (adversaries or {}).get(exchange.peers.rank)
        optimizer.exchange = exchange
        exchange.agree(optimizer.segments(), optimizer.statement(), Purpose.ENABLE)
        optimizer.warn_of_lost()


def agree_on_model(model: nn.Module) -> None:
    """Make sure that all ranks have the same parameters, before `DistributedDataParallel` takes them.

    Raises:
        RuntimeError: if they differ, on all ranks, naming the first difference.
    """
    world = dist.group.WORLD
    assert world is not None
    parameters = dict(model.named_parameters())
    if not parameters or any(map(is_lazy, parameters.values())):
        return  # DDP has its own words for these
    peers = Peers(world)
    device = peers.wire(next(model.parameters()).device)
    lines = [describe(name, p) for name, p in parameters.items()]
    agree(peers, lines, torch.ones(0, dtype=torch.bool), device, Purpose.ENABLE)


def check_trials(
    workers: int, verify_every_n_steps: int, adversaries: Mapping[int, Adversary] | None, kind: str
) -> None:
    """Make sure that what is to be verified and tried makes sense.

    Raises:
        ValueError: if not.
    """
    if not isinstance(verify_every_n_steps, int) or verify_every_n_steps < 0:
        raise ValueError(f"verify_every_n_steps must be a whole number of 0 or more, got {verify_every_n_steps!r}")
    check_adversaries(adversaries, workers, kind)


def _find_voters(
    ddp_model: DistributedDataParallel, vote_between: VoteBetween, optimizers: int, place: tuple[int, int] | None
) -> Nodes | None:
    """Return the nodes, None where every rank is a worker, once all ranks want the same."""
    device = next(ddp_model.parameters()).device
    agree_on_voters(ddp_model.process_group, device, vote_between, optimizers)
    if vote_between == "ranks":
        return None
    nodes = find_nodes(ddp_model.process_group, device, *(place or ()))
    return nodes if dist.get_world_size(nodes.inside) > 1 else None


def _check(ddp_model: DistributedDataParallel, optimizers: Sequence[Signum]) -> None:
    if not isinstance(ddp_model, DistributedDataParallel):
        kind = type(ddp_model).__name__
        raise TypeError(f"enable_majority_vote takes a DistributedDataParallel model, got {kind}; wrap the model first")
    if not optimizers:
        raise ValueError("enable_majority_vote needs the optimizers that are to vote, got none")
    for name, module in ddp_model.module.named_modules():
        if getattr(module, "sparse", False) is True:
            raise ValueError(
                f"{name} ({type(module).__name__}) has sparse gradients, which cannot vote; use sparse=False"
            )
    model_parameters = {id(p) for p in ddp_model.module.parameters()}
    for k, optimizer in enumerate(optimizers):
        devices = {str(p.device) for group in optimizer.param_groups for p in group["params"]}
        if len(devices) > 1:
            raise ValueError(
                f"optimizer {k} has parameters on {', '.join(sorted(devices))}; a vote needs them on one device"
            )
        foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in model_parameters]
        if foreign:
            raise ValueError(
                f"optimizer {k} holds parameters that are not the model's: {len(foreign)}, the first of shape "
                f"{tuple(foreign[0].shape)}. Let the model have them, as a parameter or submodule; or, if they are "
                "another model's, make one optimizer for each model and enable each with its own"
            )
