"""`M` workers of one `Signum` in one process: what `enable_majority_vote` does, without the wire."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from signsgd_core import Zeros, default_zeros, planes
from signsgd_core.wire import shard_bytes
from signsgd_lightning import Signum, kernels
from signsgd_lightning.polar import orthogonalize
from signsgd_lightning.views import FlatView, lay_out

State = defaultdict[Tensor, dict[str, Tensor]]


class SimulatedVote:
    """A vote among workers of one model, with the library's own momentum, polar factors, ballots, tally and update.

    Args:
        optimizer: the settings, the parameters and what is the same on all workers; it never steps by itself. Its
            learning rates may be changed between steps.
        workers: M, at least 1.
    """

    def __init__(self, optimizer: Signum, workers: int) -> None:
        self.optimizer = optimizer
        self.zeros: Zeros = optimizer.param_groups[0]["zeros"] or default_zeros(workers)
        self.private: list[State] = [defaultdict(dict) for _ in range(workers)]

    @torch.no_grad()
    def step(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Take one step.

        Args:
            gradients: ``gradients[i][k]``, worker `i`'s own gradient of parameter `k`, in the optimizer's order.
        """
        t, shared = self.optimizer.t, self._views(self.optimizer.state, gradients[0])
        length, device = lay_out(shared), shared[0].parameter.device
        kernel = kernels.for_device(device)
        shape = len(self.private), planes(self.zeros), shard_bytes(length, 1)
        ballots = torch.zeros(shape, dtype=torch.uint8, device=device)
        for worker, (state, local_gradients) in enumerate(zip(self.private, gradients, strict=True)):
            views = self._views(state, local_gradients)
            lay_out(views)
            orthogonalize(views, range(len(views)))
            kernel.cast(views, 0, length, self.zeros, t, worker, ballots[worker])
        verdict = kernel.verdict(ballots, self.zeros, t, None)
        kernel.apply(shared, 0, length, verdict)
        for view in shared:
            view.finish()
        for group in self.optimizer.param_groups:
            group["step"] += 1

    def replace(self, worker: int) -> None:
        """Put a newcomer in a worker's place: without momenta of its own, as after a join."""
        self.private[worker] = defaultdict(dict)

    def _views(self, state: State, gradients: Sequence[Tensor]) -> list[FlatView]:
        groups = self.optimizer.param_groups
        pairs = [(p, group) for group in groups for p in group["params"]]
        return [FlatView(p, group, state, True, sent=g) for (p, group), g in zip(pairs, gradients, strict=True)]
