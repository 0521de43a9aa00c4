"""The curvature that `GeometryMonitor` logs: of a known Hessian, of attention, and Hutchinson's estimate itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from signsgd_core.analysis.geometry import density
from signsgd_lightning import GeometryMonitor, Signum
from signsgd_lightning.monitor.geometry_monitor import hessian_diagonal

from .models import Net, alone


class Bowl(Net):
    """Whose Hessian is known: 2·(1, 4, 9, …) on its diagonal and nothing beside it."""

    def configure_optimizers(self) -> Any:
        return Signum(self.parameters(), lr=0.0)


def test_curvature_of_a_bowl() -> None:
    model = Bowl(lambda: nn.Linear(4, 1, bias=False))
    weights = torch.arange(1.0, 5.0) ** 2

    def bowl(module: Any) -> Tensor:
        loss: Tensor = (module.net.weight.square() * weights).sum()
        return loss

    monitor = GeometryMonitor(every_n_steps=2, samples=2, curvature_loss=bowl, directory=None)
    alone(model, monitor)
    record = monitor.report.records[0]
    assert record["geometry/curvature_density"] == pytest.approx(density(weights.numpy()))
    expected = density(weights.numpy()) ** 0.5 / record["geometry/gradient_density"]
    assert record["geometry/curvature_ratio"] == pytest.approx(expected)


def test_curvature_of_attention() -> None:
    """Torch's fused attention cannot be differentiated twice; the monitor takes the one that can."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = Bowl(lambda: nn.Sequential(layer, nn.Linear(4, 1)))
    monitor = GeometryMonitor(4, 2, curvature_loss=lambda m: m.net(torch.randn(2, 3, 4)).pow(2).sum(), directory=None)
    alone(model, monitor, max_epochs=1)
    assert 0 < monitor.report.records[0]["geometry/curvature_density"] < 1  # type: ignore[operator]


def test_hutchinson_of_a_dense_hessian() -> None:
    """Unbiased: near the truth by the spread of eight products."""
    torch.manual_seed(0)
    a = torch.randn(50, 50) / 50
    hessian = a @ a.T + torch.diag(torch.linspace(1, 5, 50))
    x, unused = torch.randn(50, requires_grad=True), torch.ones(3, requires_grad=True)
    found, zeros = hessian_diagonal(0.5 * x @ hessian @ x, [x, unused])
    off = hessian - torch.diag(hessian.diagonal())
    spread = off.square().sum(1).sqrt() / 8**0.5
    assert ((found - hessian.diagonal()).abs() < 5 * spread).all()
    assert (found - hessian.diagonal()).abs().max() > 0
    assert not zeros.any()
    assert not hessian_diagonal(x.sum(), [x])[0].any()
