"""The torch side: `Signum` alone, and voting over DDP and Gloo."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote, kernels

from .cases import LR, Case, Trajectory


def signum(parameters: Sequence[Tensor], case: Case, momentum_dtype: torch.dtype | None = None) -> Signum:
    return Signum(
        parameters,
        lr=LR,
        betas=case.betas,
        weight_decay=case.weight_decay,
        verdict_momentum=case.verdict_momentum,
        zeros=case.zeros,
        warmup_steps=case.warmup_steps,
        momentum_dtype=momentum_dtype,
    )


def train(parameters: Sequence[Tensor], optimizer: Signum, case: Case, rank: int) -> Trajectory:
    trajectory = []
    for gradients in case.gradients():
        for p, g in zip(parameters, gradients[rank], strict=True):
            p.grad = None if g is None else torch.from_numpy(np.array(g)).to(p.device)
        optimizer.step()
        trajectory.append([p.detach().cpu().numpy().copy() for p in parameters])
    return trajectory


def alone(cases: Sequence[Case]) -> list[Trajectory]:
    """`Signum` without a process group: one worker."""
    trajectories = []
    for case in cases:
        parameters = [torch.from_numpy(x).requires_grad_() for x in case.parameters()]
        trajectories.append(train(parameters, signum(parameters, case), case, rank=0))
    return trajectories


class _Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.from_numpy(x) for x in case.parameters()])


def vote(
    cases: Sequence[Case], block_size: int, kernel: str | None, momentum_dtype: torch.dtype | None
) -> list[Trajectory]:
    """`Signum` over DDP and Gloo, on one rank; with a kernel by name: that of accelerators takes CPU tensors, too."""
    rank = torch.distributed.get_rank()
    usual = kernels.for_device
    if kernel is not None:
        chosen = getattr(kernels, kernel)()
        kernels.for_device = lambda device: chosen
    try:
        trajectories = []
        for case in cases:
            model = DistributedDataParallel(_Model(case))
            parameters = list(model.parameters())
            optimizer = signum(parameters, case, momentum_dtype)
            enable_majority_vote(model, optimizer)
            if optimizer.exchange is not None:
                optimizer.exchange.block_size = block_size
            else:
                assert case.workers == 1, "without an exchange there is no vote"
            trajectories.append(train(parameters, optimizer, case, rank))
        return trajectories
    finally:
        kernels.for_device = usual
