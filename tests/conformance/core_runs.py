"""The core's packed path by hand, all workers in one process: pack, verdict, unpack."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import signsgd_core as core

from .cases import LR, MATRICES, Array, Case, Trajectory


def packed(cases: Sequence[Case]) -> list[Trajectory]:
    return [_train(case) for case in cases]


def _train(case: Case) -> Trajectory:
    xs: list[Any] = [*case.parameters()]
    averages: list[Any] = [np.zeros_like(x) for x in xs]
    momenta: list[list[Any]] = [[np.zeros_like(x) for x in xs] for _ in range(case.workers)]
    trajectory = []
    for t, gradients in enumerate(case.gradients()):
        for k, x in enumerate(xs):
            given = [gradients[i][k] for i in range(case.workers)]
            orthogonal = case.orthogonalize and k in MATRICES
            verdict = _vote(case, t, given, [momentum[k] for momentum in momenta], orthogonal)
            if verdict is not None:
                u = core.update_verdict_momentum(averages[k], verdict, case.verdict_momentum)
                averages[k][...] = u
                u = core.matrices(x.shape).scale * u if orthogonal else u
                xs[k] = core.update_parameters(x, u, LR, case.weight_decay)
        trajectory.append([np.asarray(x).copy() for x in xs])
    return trajectory


def _vote(
    case: Case, t: int, gradients: Sequence[Array | None], momenta: Sequence[Array], orthogonal: bool
) -> Array | None:
    """The verdict on one tensor; the worker without a gradient casts a ballot that its mask leaves out."""
    ballots: list[Any] = []
    masks = []
    for i, (gradient, m) in enumerate(zip(gradients, momenta, strict=True)):
        g = np.zeros_like(m) if gradient is None else core.finite(gradient)
        c = core.direction(m, g, case.betas[0]) if t >= case.warmup_steps else g
        if gradient is not None:
            m[...] = core.update_momentum(m, g, case.betas[1])
        c = core.polar(c) if orthogonal else c
        ballots.append(core.pack(c, case.zeros, t, i))
        masks.append(np.full(ballots[-1].shape[1], 0 if gradient is None else 255, np.uint8))
    if all(gradient is None for gradient in gradients):
        return None
    lacking = any(gradient is None for gradient in gradients)
    planes = core.verdict(ballots, case.zeros, t, masks if lacking else None)
    return core.unpack(np.stack(planes), momenta[0].size).reshape(momenta[0].shape)
