"""The experiments' vote in one process is the specification's."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.papers.methods import Job, update_by
from benchmarks.papers.simulated_vote import SimulatedVote
from signsgd_core import Reference
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


def test_whoever_is_replaced_starts_without_momenta() -> None:
    """Workers 1 and 2 in turn, of three; against the reference whose momenta are set to zero by hand."""
    tensor = torch.nn.Parameter(torch.zeros(40))
    model = torch.nn.ParameterList([tensor])
    update = update_by(model, Job("", "Signum", 0.5, workers=3, replaced_every=3))
    reference, source = Reference([np.zeros(40, np.float32)], 3, 0.5), np.random.default_rng(0)
    for step in range(8):
        gradients = source.normal(size=(3, 40)).astype(np.float32)
        if step in (3, 6):
            reference.momenta[step // 3][0][:] = 0
        update([[torch.from_numpy(g)] for g in gradients], 1.0)
        reference.step([[g] for g in gradients])
        np.testing.assert_array_equal(tensor.detach().numpy(), reference.parameters[0])
