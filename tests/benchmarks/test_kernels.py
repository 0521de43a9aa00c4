"""What benchmarks/kernels.py measures can be run."""

import torch

from benchmarks.kernels import BYTES, parts, steps
from signsgd_lightning.kernels import NumpyKernel

CPU = torch.device("cpu")


def test_every_part_and_step_runs() -> None:
    found = parts(NumpyKernel(), 1000, CPU)
    assert ["copy", *found] == list(BYTES)
    for job in (*found.values(), *steps(5000, CPU).values()):
        job()
