"""Precision settings of the Trainer, and parameters of several dtypes: momenta in float32, ranks bit-identical."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.workers import Workers

from .models import Net, Record, fit, judge, trainer

SIGNUM: dict[str, Any] = {"lr": 0.03, "betas": (0.9, 0.99), "weight_decay": 0.1}
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,  # on a CPU Lightning takes bf16 for it
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
}


def _fit(precision: str) -> tuple[set[torch.dtype], set[torch.dtype], list[Record]]:
    model = Net(**SIGNUM)
    run = trainer(precision=precision)
    outputs: set[torch.dtype] = set()
    model.net.register_forward_hook(lambda module, inputs, output: outputs.add(output.dtype))
    run.fit(model)
    state = run.optimizers[0].state
    return outputs, {tensor.dtype for p in model.parameters() for tensor in state[p].values()}, model.records


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS.items(), ids=PRECISIONS)
def test_precision(precision: str, dtype: torch.dtype, workers: Workers) -> None:
    ranks = workers.run(2, _fit, precision)
    judge([records[0] for _, _, records in ranks], betas=(0.9, 0.99), weight_decay=0.1)
    for outputs, states, (one,) in ranks:
        assert set(one.dtypes) == {dtype}
        assert states == {torch.float32}
        assert outputs == {torch.bfloat16 if "16" in precision else dtype}


class _To(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _mixed() -> nn.Module:
    layers: list[nn.Module] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
        layers += [_To(dtype), nn.Linear(4, 4, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, 1))


@pytest.mark.parametrize("settings", [{}, {"zeros": "abstain", "verdict_momentum": 0.5}], ids=["default", "abstain"])
def test_parameters_of_mixed_dtypes(settings: dict[str, Any], workers: Workers) -> None:
    runs = workers.run(2, fit, partial(Net, _mixed, lr=0.03, **settings), {})
    judge([run[0] for run in runs], **settings)
    assert set(runs[0][0].dtypes) == {torch.float32, torch.bfloat16, torch.float64, torch.float16}
    for before, after in zip(runs[0][0].start, runs[0][0].end, strict=True):
        assert not np.array_equal(before, after)
