"""What a vote or local steps cannot be enabled on, each refused with a sentence before anything is changed."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import _compat
from .optimizer import LOCAL_STEPS, Signum


def check_vote(model: nn.Module, optimizers: Sequence[Signum]) -> None:
    """Make sure that the optimizers can vote on the model's parameters.

    Raises:
        ValueError: if not.
    """
    if not optimizers:
        raise ValueError("enable_majority_vote needs the optimizers that are to vote, got none")
    check_optimizers(model, optimizers)
    if isinstance(model, DistributedDataParallel):
        _check_ddp(model)
    refuse_fsdp1(model, "take fully_shard(model, mesh=mesh['shard']) and mesh=mesh['replicate'] here")
    for k, optimizer in enumerate(optimizers):
        if hasattr(optimizer, LOCAL_STEPS):
            raise ValueError(f"optimizer {k} takes local steps: call LocalSteps.end, or make a new one that votes")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise ValueError(
                f"{name.removeprefix('module.')} ({type(module).__name__}) has sparse gradients, which cannot vote; "
                "use sparse=False"
            )


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Make sure that every optimizer is another one and holds parameters of the model, on one device that has memory.

    Raises:
        ValueError: if not.
    """
    model_parameters = {id(p) for p in model.parameters()}
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ValueError(f"got {len(optimizers)} optimizers of which two are the same: pass each once")
    for k, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not parameters:
            raise ValueError(f"optimizer {k} has no parameters to vote on: leave it out")
        devices = {str(p.device) for p in parameters}
        if len(devices) > 1:
            raise ValueError(
                f"optimizer {k} has parameters on {', '.join(sorted(devices))}; a vote needs them on one device"
            )
        if devices == {"meta"}:
            raise ValueError(
                f"optimizer {k} has parameters without values, on the meta device: materialize the model first, by "
                "to_empty and then its initial values or a checkpoint's, and make the optimizer of what that leaves"
            )
        foreign = [p for p in parameters if id(p) not in model_parameters]
        if foreign:
            raise ValueError(
                f"optimizer {k} holds parameters that are not the model's: {len(foreign)}, the first of shape "
                f"{tuple(foreign[0].shape)}. Let the model have them, as a parameter or submodule; or, if they are "
                "another model's, make one optimizer for each model and enable each with its own"
            )


def refuse_fsdp1(model: nn.Module, remedy: str) -> None:
    """Make sure that FSDP1 wraps no part of a model.

    Raises:
        ValueError: if it does.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):  # its import takes long
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel, which averages gradients in flat parameters of its own: "
            + remedy
        )


def refuse_mean(optimizers: Sequence[Optimizer], enable: str) -> None:
    """Make sure that no optimizer of several workers has the mean of their momenta in the place of one's own.

    Raises:
        ValueError: if one has.
    """
    for k, optimizer in enumerate(optimizers):
        if isinstance(optimizer, Signum) and optimizer.has_mean:
            raise ValueError(
                f"optimizer {k} got the mean of all workers' momenta, since scatter_state was called before {enable}: "
                f"make a new one, call {enable}, then scatter_state"
            )


def check_group(process_group: dist.ProcessGroup | None, who_needs: str) -> dist.ProcessGroup:
    """Return a process group that this rank is in, the default one for None.

    Raises:
        RuntimeError: if there is none.
        ValueError: if this rank is not in it, or it is none.
    """
    group = dist.group.WORLD if process_group is None else process_group
    if group is None:
        raise RuntimeError(f"{who_needs} a process group: call torch.distributed.init_process_group first")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{who_needs} a torch.distributed.ProcessGroup that this rank is in, got {group!r}: call it on the ranks "
            "of the group alone"
        )
    return group


def _check_ddp(model: DistributedDataParallel) -> None:
    """Make sure that DDP hands all gradients to the communication hook."""
    for name, there in _compat.past_the_hook(model).items():
        if there:
            raise ValueError(
                f"a majority vote takes the place of DDP's averaging, and {name} averages past it: leave out {name}"
            )
