"""Records of rounds of local steps, and the judge that replays them in `signsgd_core.LocalReference`."""

from typing import Any

import numpy as np
from torch.optim import Optimizer

from signsgd_core import LocalReference
from signsgd_lightning import LocalSteps

Ends = list[Any]
"""Parameters at one time, as arrays."""
Round = tuple[Ends, Ends]
"""This rank's before a round was closed, and the common ones after it."""


def ends_of(net: Any) -> Ends:
    return [p.detach().double().numpy().copy() for p in net.parameters()]


class Recorder:
    """Keeps this rank's parameters before each round was closed, and the common ones after it."""

    def __init__(self, net: Any, optimizers: list[Optimizer]) -> None:
        self.net, self.start, self.rounds, self.seen = net, Ends(), list[Round](), 0
        self.before = ends_of(net)
        handle = optimizers[-1].register_step_post_hook(self.note_own)
        hooks: Any = optimizers[-1]._optimizer_step_post_hooks
        hooks.move_to_end(handle.id, last=False)  # ahead of what closes a round

    def note_own(self, *_: Any) -> None:
        self.before = ends_of(self.net)

    def note_common(self, local: LocalSteps) -> None:
        if local.outer.rounds > self.seen:
            self.seen = local.outer.rounds
            self.rounds.append((self.before, ends_of(self.net)))


def judge(runs: list[tuple[Ends, list[Round], Any]], dtype: Any = np.float32, **settings: Any) -> LocalReference:
    """Replay the rounds of all ranks in the reference."""
    start = runs[0][0]
    for other, _, _ in runs:
        assert all((a == b).all() for a, b in zip(start, other, strict=True)), "parameters start from rank 0's"
    reference = LocalReference([x.astype(dtype) for x in start], len(runs), **settings)
    for k in range(len(runs[0][1])):
        reference.close([[x.astype(dtype) for x in rounds[k][0]] for _, rounds, _ in runs])
        for _, rounds, _ in runs:
            for ours, theirs in zip(rounds[k][1], reference.parameters, strict=True):
                np.testing.assert_array_equal(ours, theirs.astype(float))
    return reference
