"""The torch side: `Signum` alone, and voting over DDP and Gloo."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote, kernels
from tests.votes import set_bucket_size

from .cases import LR, MATRICES, Case, Trajectory


def signum(parameters: Sequence[Tensor], case: Case, momentum_dtype: torch.dtype | None = None) -> Signum:
    """Parameters stay in their order, in as many groups as that takes."""
    orthogonalize = [case.orthogonalize and k in MATRICES for k in range(len(parameters))]
    alike = groupby(zip(parameters, orthogonalize, strict=True), key=itemgetter(1))
    groups = [{"params": [p for p, _ in members], "orthogonalize": which} for which, members in alike]
    return Signum(
        groups,
        lr=LR,
        betas=case.betas,
        weight_decay=case.weight_decay,
        verdict_momentum=case.verdict_momentum,
        zeros=case.zeros,
        warmup_steps=case.warmup_steps,
        momentum_dtype=momentum_dtype,
    )


def train(parameters: Sequence[Tensor], optimizer: Signum, case: Case, rank: int, backward: bool = False) -> Trajectory:
    """Step by step; the gradients are put there, or come of a backward pass."""
    trajectory = []
    for gradients in case.gradients():
        given = [None if g is None else torch.from_numpy(np.array(g)) for g in gradients[rank]]
        for p, g in zip(parameters, given, strict=True):
            p.grad = None if g is None or backward else g.to(p.device)
        if backward:
            torch.autograd.backward(
                parameters, [g.to(p.device) for p, g in zip(parameters, given, strict=True) if g is not None]
            )
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
    cases: Sequence[Case], bucket_size: int, kernel: str | None, momentum_dtype: torch.dtype | None, overlap: bool
) -> list[Trajectory]:
    """`Signum` over DDP and Gloo, on one rank; with a kernel by name: that of accelerators takes CPU tensors, too.

    With `overlap` gradients come of a backward pass, but where some are absent, which it knows of only without one.
    """
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
            enable_majority_vote(model, optimizer, overlap=overlap)
            if optimizer.vote is not None:
                set_bucket_size(optimizer, bucket_size)
            else:
                assert case.workers == 1, "without an exchange there is no vote"
            trajectories.append(train(parameters, optimizer, case, rank, overlap and not case.absent))
        return trajectories
    finally:
        kernels.for_device = usual
