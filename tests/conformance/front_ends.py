"""The list of front ends: each runs cases of one number of workers and returns the trajectory of every one."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote, exchange, kernels
from tests.workers import Workers

from .cases import LR, Array, Case

Trajectory = list[list[Array]]
FrontEnd = Callable[[Sequence[Case], Workers], list[Trajectory]]


def signum(parameters: Sequence[Tensor], case: Case) -> Signum:
    return Signum(
        parameters,
        lr=LR,
        betas=case.betas,
        weight_decay=case.weight_decay,
        verdict_momentum=case.verdict_momentum,
        zeros=case.zeros,
        warmup_steps=case.warmup_steps,
    )


def train(parameters: Sequence[Tensor], optimizer: Signum, case: Case, rank: int) -> Trajectory:
    trajectory = []
    for gradients in case.gradients():
        for p, g in zip(parameters, gradients[rank], strict=True):
            p.grad = None if g is None else torch.from_numpy(np.array(g)).to(p.device)
        optimizer.step()
        trajectory.append([p.detach().cpu().numpy().copy() for p in parameters])
    return trajectory


def torch_alone(cases: Sequence[Case], workers: Workers) -> list[Trajectory]:
    """`Signum` without a process group: one worker."""
    trajectories = []
    for case in cases:
        parameters = [torch.from_numpy(x).requires_grad_() for x in case.parameters()]
        trajectories.append(train(parameters, signum(parameters, case), case, rank=0))
    return trajectories


def torch_gloo(cases: Sequence[Case], workers: Workers) -> list[Trajectory]:
    """`Signum` over DDP and Gloo; small blocks, so that a vector takes several; all ranks must be bit-identical."""
    return _identical(workers.run(cases[0].workers, _vote, cases, 256, False))


def torch_gloo_one_block(cases: Sequence[Case], workers: Workers) -> list[Trajectory]:
    """The same in one block."""
    return _identical(workers.run(cases[0].workers, _vote, cases, exchange.BLOCK_SIZE, False))


def torch_gloo_device_kernel(cases: Sequence[Case], workers: Workers) -> list[Trajectory]:
    """The same with the kernel of accelerators, which runs on CPU tensors, too."""
    return _identical(workers.run(cases[0].workers, _vote, cases, 256, True))


FRONT_ENDS: dict[str, tuple[FrontEnd, tuple[int, ...]]] = {
    "torch-alone": (torch_alone, (1,)),
    "torch-gloo": (torch_gloo, (2, 3, 4)),
    "torch-gloo-one-block": (torch_gloo_one_block, (2, 3, 4)),
    "torch-gloo-device-kernel": (torch_gloo_device_kernel, (2, 3, 4)),
}
"""Name -> front end, and the numbers of workers it is for: alone is one worker, a vote takes two or more."""


class _Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.from_numpy(x) for x in case.parameters()])


def _vote(cases: Sequence[Case], block_size: int, device_kernel: bool) -> list[Trajectory]:
    rank = torch.distributed.get_rank()
    usual = kernels.for_device
    if device_kernel:
        kernels.for_device = lambda device: kernels.cuda
    try:
        trajectories = []
        for case in cases:
            model = DistributedDataParallel(_Model(case))
            parameters = list(model.parameters())
            optimizer = signum(parameters, case)
            enable_majority_vote(model, optimizer)
            assert optimizer.exchange is not None
            optimizer.exchange.block_size = block_size
            trajectories.append(train(parameters, optimizer, case, rank))
        return trajectories
    finally:
        kernels.for_device = usual


def _identical(ranks: list[list[Trajectory]]) -> list[Trajectory]:
    for rank, trajectories in enumerate(ranks[1:], start=1):
        for ours, first in zip(trajectories, ranks[0], strict=True):
            for t, (step, first_step) in enumerate(zip(ours, first, strict=True)):
                for x, y in zip(step, first_step, strict=True):
                    assert x.tobytes() == y.tobytes(), f"rank {rank} differs from rank 0 after step {t}"
    return ranks[0]
