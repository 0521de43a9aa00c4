"""`M` workers that take steps of their own, in one process: L1-L4 by the reference, or the mean of displacements."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import signsgd_core as core

if TYPE_CHECKING:
    from .methods import Job, Update


class SimulatedLocalSteps:
    """Workers' models, each trained by its own inner optimizer, that meet after every `sync_every`-th step.

    With ``exchange="mean"`` the outer update takes the mean of the displacements instead of ``s·V``: DiLoCo with
    Nesterov's momentum, local SGD with ``outer_lr=1, outer_momentum=0``.

    Args:
        model: has the common parameters after a round; it is the first worker's.
        job: of the workers.
        make_update: returns what moves a worker's model by its own gradients.

    Attributes:
        models: of the workers.
    """

    def __init__(self, model: nn.Module, job: "Job", make_update: "Callable[[nn.Module], Update]") -> None:
        self.models = [model, *(copy.deepcopy(model) for _ in range(job.workers - 1))]
        self.updates = [make_update(one) for one in self.models]
        self.job, self.step = job, 0
        start = [p.detach().cpu().numpy() for p in model.parameters()]
        self.reference = core.LocalReference(start, job.workers, job.outer_lr or 1.0, job.outer_momentum or 0.0)

    def __call__(self, gradients: Sequence[list[Tensor]], share: float) -> None:
        """Take a step of every worker, and close the round if it is its last or the training's."""
        for update, own in zip(self.updates, gradients, strict=True):
            update([own], share)
        self.step += 1
        if self.step % (self.job.sync_every or 1) == 0 or self.step == self.job.steps:
            self._close()

    @torch.no_grad()
    def _close(self) -> None:
        moved = [[p.detach().cpu().numpy() for p in model.parameters()] for model in self.models]
        if self.job.exchange == "vote":
            self.reference.close(moved)
        else:
            self._average(moved)
        buffers = zip(*(list(model.buffers()) for model in self.models), strict=True)
        means = [torch.stack(same).mean(0) if same[0].is_floating_point() else same[0] for same in buffers]
        for model in self.models:
            for p, x in zip(model.parameters(), self.reference.parameters, strict=True):
                p.copy_(torch.from_numpy(x))
            for buffer, mean in zip(model.buffers(), means, strict=True):
                buffer.copy_(mean)

    def _average(self, moved: Sequence[Sequence[npt.NDArray[Any]]]) -> None:
        """Take the outer step by the mean displacement."""
        rounds = self.reference
        for k, x in enumerate(rounds.parameters):
            mean = np.mean([x - worker[k] for worker in moved], axis=0, dtype=np.float32)
            x, u = core.outer_update(x, rounds.momenta[k], mean, rounds.outer_lr, rounds.outer_momentum)
            rounds.parameters[k], rounds.momenta[k] = x.astype(np.float32), u
