"""The experiments' vote in one process is the specification's."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.papers.simulated_vote import SimulatedVote
from signsgd_lightning import Signum
from tests.conformance.cases import LR, MATRICES, Case, assert_reference, cases, covering

WITH_ALL_GRADIENTS = tuple(case for case in cases() if not case.absent)


def _optimizer(case: Case) -> tuple[Signum, list[int]]:
    """Return the optimizer of a case, and which tensors its parameters are."""
    tensors = [torch.nn.Parameter(torch.from_numpy(x)) for x in case.parameters()]
    polar = [k for k in range(len(tensors)) if case.orthogonalize and k in MATRICES]
    order = polar + [k for k in range(len(tensors)) if k not in polar]
    groups: list[dict[str, Any]] = [{"params": [tensors[k]], "orthogonalize": k in polar} for k in order]
    settings: dict[str, Any] = {"zeros": case.zeros, "warmup_steps": case.warmup_steps}
    return Signum(groups, LR, case.betas, case.weight_decay, verdict_momentum=case.verdict_momentum, **settings), order


@pytest.mark.parametrize("case", covering(WITH_ALL_GRADIENTS), ids=str)
def test_it_equals_the_reference(case: Case) -> None:
    optimizer, order = _optimizer(case)
    vote, trajectory = SimulatedVote(optimizer, case.workers), []
    for gradients in case.gradients():
        vote.step([[torch.from_numpy(np.asarray(worker[k])) for k in order] for worker in gradients])
        moved = {
            k: group["params"][0].detach().numpy().copy()
            for k, group in zip(order, optimizer.param_groups, strict=True)
        }
        trajectory.append([moved[k] for k in sorted(moved)])
    assert_reference(case, trajectory)
