"""Local steps in plain torch: one line behind the optimizers."""

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signsgd_core.adversaries import Adversary, check_adversaries

from .. import _compat
from ..checks import check_group, check_optimizers, refuse_fsdp1, refuse_mean
from ..enable import agree_on_model, broadcast, number_of
from ..memory import find_shared
from ..optimizer import see_through
from ..sharding import refuse_sharded
from ..vote.topology import Flat
from ..vote.transport import PointToPoint
from .options import LocalStepOptions
from .rounds import LocalSteps, find_local_steps


def enable_local_steps(
    model: nn.Module,
    *optimizers: Optimizer,
    sync_every: int = 16,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    verify_every_n_rounds: int = 0,
    adversaries: Mapping[int, Adversary] | None = None,
) -> LocalSteps:
    r"""Let every rank take steps of its own, and all vote on where they went after every `sync_every`-th.

    .. math::
        Δ_i = x_0 - x_i, \quad s = \mathrm{median}_i \, \mathrm{mean} |Δ_i|, \quad
        V = \mathrm{majority}_i(\mathrm{sign}\, Δ_i), \\
        u ← μ u + s V, \quad x ← x_0 - η (s V + μ u)

    A rank sends ``2·(M−1)/M·d/H`` bits a step, and a float a tensor and peer each round. Parameters and buffers start
    from rank 0's, here. Floating-point buffers are averaged when a round closes. Steps of the last optimizer are
    counted; close a round early, by `LocalSteps.close_round` on every rank, before parameters are looked at or saved.

    Args:
        model: not wrapped in `DistributedDataParallel`.
        *optimizers: any, of the model's parameters, in the same order on all ranks.
        sync_every: `H`.
        outer_lr: η.
        outer_momentum: μ, Nesterov's.
        process_group: of the ranks that vote. None is the default group.
        verify_every_n_rounds: how often all ranks make sure that they hold the same parameters and outer momenta, bit
            for bit (`RanksDifferError` if not); 0 for never.
        adversaries: rank -> what it makes of its displacements before it votes (`signsgd_core.adversaries`).

    Returns:
        What closes a round, and is to be kept for that alone.

    Raises:
        TypeError: if something is no optimizer, or one that exchanges parameters itself; or the model no module.
        ValueError: for settings outside their range; for a model wrapped in DDP or FSDP, or parameters that are not its
            own, on several devices, or no floating-point numbers; for a `Signum` that votes.
        RuntimeError: without a process group; if the ranks differ in model or settings.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # doctest: +SKIP
        >>> local = enable_local_steps(model, optimizer, sync_every=16)  # doctest: +SKIP
    """
    options = LocalStepOptions(sync_every, outer_lr, outer_momentum, verify_every_n_rounds, adversaries)
    return let_step(model, optimizers, options, process_group)


def let_step(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    options: LocalStepOptions,
    process_group: dist.ProcessGroup | None = None,
) -> LocalSteps:
    """Let the optimizers take steps of their own; see `enable_local_steps`.

    Args:
        model: whose parameters they hold.
        optimizers: of the ranks.
        options: of the rounds.
        process_group: of the ranks.
    """
    model, optimizers = _compat.uncompiled(model), [see_through(optimizer) for optimizer in optimizers]
    check(model, optimizers)
    group = check_group(process_group, "local steps need")
    if dist.get_world_size(group) > 1:
        refuse_mean(optimizers, "enable_local_steps")
    check_adversaries(options.adversaries, dist.get_world_size(group), "rank")
    agree_on_model(model, group)
    label = f"local steps of model {number_of(model, group)}"
    local = LocalSteps(model, optimizers, options, Flat(PointToPoint(group)), label=label)
    local.start_from(lambda: broadcast(model, group))  # once the ranks agree on all: a refusal changes nothing
    return local


_EXCHANGING = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer")
"""By name: their imports take a while."""


def check(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Make sure that the optimizers can take local steps on the model's parameters.

    Raises:
        TypeError: if something is no optimizer, or the model no module.
        ValueError: if they cannot.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"enable_local_steps takes a model first, a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "local steps are each rank's own, and DistributedDataParallel would average every gradient: pass the model "
            "as it is, unwrapped"
        )
    refuse_fsdp1(model, "local steps are for models that are whole on every rank")
    for k, optimizer in enumerate(optimizers):
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer {k} must be a torch.optim.Optimizer, got {kind}")
        if kind in _EXCHANGING:
            raise TypeError(f"optimizer {k} is a {kind}, which exchanges parameters itself: pass an ordinary optimizer")
        if getattr(optimizer, "vote", None) is not None:
            raise ValueError(
                f"optimizer {k} votes at every step, by enable_majority_vote: make a new one for local steps"
            )
        if find_local_steps(optimizer) is not None:
            raise ValueError(f"optimizer {k} takes local steps already: enable it once")
    if not optimizers:
        raise ValueError("enable_local_steps needs the optimizers that are to take steps, got none")
    check_optimizers(model, optimizers)
    for k, optimizer in enumerate(optimizers):
        refuse_sharded(optimizer, f"the vote on local steps of optimizer {k}", "leave the model unsharded")
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            raise ValueError(f"parameters must be real floating point, {name} is {p.dtype}")
    shared = find_shared(dict(model.named_parameters()))
    if shared is not None:  # displacements are computed in the memory of parameters
        raise ValueError(
            f"parameters {shared[0]} and {shared[1]} share memory, and local steps would move it twice: let both "
            "modules have one nn.Parameter"
        )
