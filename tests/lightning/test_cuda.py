"""What needs a GPU: the device kernel, Signum alone, votes over Gloo and NCCL, a Trainer. All with `==`."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import signsgd_core as core
from signsgd_lightning import Signum, enable_majority_vote, kernels
from tests.conformance.cases import TOLERANCE_CUDA, Case, Trajectory, assert_reference, cases
from tests.conformance.torch_runs import signum, train
from tests.votes import set_bucket_size
from tests.workers import Workers

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def _vote(table: list[Case], backend: str, overlap: bool) -> list[Trajectory]:
    rank = torch.distributed.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    trajectories = []
    for case in table:
        model = nn.ParameterList([torch.from_numpy(x) for x in case.parameters()]).to(device)
        group = torch.distributed.new_group(backend=backend)
        wrapped = DistributedDataParallel(model, device_ids=[device.index], process_group=group)
        parameters: list[Tensor] = list(wrapped.parameters())
        optimizer = signum(parameters, case)
        enable_majority_vote(wrapped, optimizer, overlap=overlap)
        if optimizer.vote is not None:
            set_bucket_size(optimizer, 256)  # several buckets, so that the first leave in the backward pass
        trajectories.append(train(parameters, optimizer, case, rank, overlap and not case.absent))
    return trajectories


@pytest.mark.parametrize("zeros", ["alternate", "abstain", "positive"])
@pytest.mark.parametrize("length", [1, 8, 9, 100_003])
def test_kernel(zeros: core.Zeros, length: int) -> None:
    values = np.random.default_rng(0).integers(-2, 3, length).astype(np.float32)
    expected = core.pack(values, zeros, step=3, worker=2)
    ballot = torch.empty(expected.shape, dtype=torch.uint8, device="cuda")
    kernels.DEVICE.pack(torch.from_numpy(values).cuda(), zeros, 3, 2, ballot)
    np.testing.assert_array_equal(ballot.cpu().numpy(), expected)
    np.testing.assert_array_equal(kernels.DEVICE.unpack(ballot, length).cpu().numpy(), core.unpack(expected, length))


@pytest.mark.parametrize("case", [case for case in cases() if case.workers == 1], ids=str)
def test_alone(case: Case) -> None:
    parameters = [torch.from_numpy(x).cuda().requires_grad_() for x in case.parameters()]
    trajectory = train(parameters, signum(parameters, case), case, rank=0)
    assert_reference(case, trajectory, tolerance=TOLERANCE_CUDA)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_vote(workers: Workers, backend: str, overlap: bool) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process a GPU: needs two GPUs")
    table = [case for case in cases() if case.workers == 2]
    for trajectories in workers.run(2, _vote, table, backend, overlap):
        for trajectory, case in zip(trajectories, table, strict=True):
            assert_reference(case, trajectory, tolerance=TOLERANCE_CUDA)


class _Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layer(batch).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Signum:
        return Signum(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_trainer(precision: Any) -> None:
    pl.seed_everything(0)
    model, batches = _Model(), [torch.randn(16, 8) for _ in range(40)]
    before = float(model.layer(batches[0]).square().mean())
    trainer = pl.Trainer(
        accelerator="gpu", devices=1, max_epochs=1, precision=precision, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert float(model.layer(batches[0]).square().mean()) < before
