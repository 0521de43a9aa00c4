"""Documented uses of Lightning's Trainer that went wrong under the strategy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.amp import GradScaler

from signsgd_lightning import MajorityVoteStrategy
from tests.workers import Workers

from .models import Net, Record, judge, small_net, trainer

DYADIC: dict[str, Any] = {"betas": (0.5, 0.5)}


class _Elsewhere(TorchCheckpointIO):
    """Puts every file into a folder of its own, as one for remote stores does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, Path(path).parent / "elsewhere" / Path(path).name, storage_options)


def _saves(folder: str, plugin: str) -> list[str]:
    io = AsyncCheckpointIO() if plugin == "async" else _Elsewhere()
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[save], plugins=[io])
    run.fit(Net(**DYADIC))
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.*"))


@pytest.mark.parametrize(("plugin", "folder"), [("async", ""), ("elsewhere", "elsewhere/")])
def test_checkpoint_plugins_write_as_they_do(plugin: str, folder: str, tmp_path: Path, workers: Workers) -> None:
    files, _ = workers.run(2, _saves, str(tmp_path), plugin)
    assert files == [f"{folder}step=4.ckpt", f"{folder}step=8.ckpt"]
    (state,) = torch.load(tmp_path / files[1], weights_only=True)["optimizer_states"]
    assert "state_of_other_workers" in state


def _passed_over(folder: str) -> str:
    try:
        strategy = MajorityVoteStrategy(state_dict_type="sharded")
        trainer(strategy=strategy, plugins=[_Elsewhere()]).fit(Net(**DYADIC))
    except ValueError as error:
        return str(error)
    return ""


def test_a_sharded_checkpoint_passes_over_no_plugin(tmp_path: Path, workers: Workers) -> None:
    for told in workers.run(2, _passed_over, str(tmp_path)):
        assert told.startswith("state_dict_type='sharded' would pass over _Elsewhere: leave that plugin out")


class _Surgery(Net):
    """Keeps the gradients of one loss over the backward pass of another."""

    def __init__(self) -> None:
        super().__init__(**DYADIC)
        self.automatic_optimization = False
        self.right: list[bool] = []

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        (x, y), parameters = batch, list(self.net.parameters())

        def losses() -> tuple[torch.Tensor, torch.Tensor]:
            return (self.net(x) - y).square().mean(), (self.net(x) + y).abs().mean()

        wanted = [torch.autograd.grad(loss, parameters) for loss in losses()]
        kept = []
        for loss in losses():
            optimizer.zero_grad()
            self.manual_backward(loss)
            kept.append([p.grad for p in parameters])
        for k, p in enumerate(parameters):
            p.grad = kept[0][k] - 0.5 * kept[1][k]
            self.right.append(torch.equal(p.grad, wanted[0][k] - 0.5 * wanted[1][k]))
        optimizer.step()


def _surgery() -> tuple[list[bool], list[Record]]:
    model = _Surgery()
    trainer(max_epochs=1).fit(model)
    return model.right, model.records


def test_gradients_that_are_kept_over_the_next_backward_pass(workers: Workers) -> None:
    runs = workers.run(2, _surgery)
    assert all(all(right) and right for right, _ in runs)
    judge([records[0] for _, records in runs], **DYADIC)


def _clipped(precision: str) -> tuple[str, list[float], list[Record]]:
    model = Net(small_net, **DYADIC)
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu"))]}
    try:
        trainer(max_epochs=1, gradient_clip_val=0.125, **settings).fit(model)
    except ValueError as error:
        return str(error), [], []
    steps = model.records[0].gradients
    norms = [float(sum((g**2).sum() for g in step if g is not None) ** 0.5) for step in steps]
    return "", norms, model.records


def test_clipping_in_bfloat16(workers: Workers) -> None:
    runs = workers.run(2, _clipped, "bf16-mixed")
    for told, norms, _ in runs:
        assert told == ""
        assert max(norms) == pytest.approx(0.125, rel=1e-3)
    judge([records[0] for _, _, records in runs], **DYADIC)


def test_clipping_under_a_scaler_is_refused(workers: Workers) -> None:
    for told, _, _ in workers.run(2, _clipped, "16-mixed"):
        assert told.startswith("gradient_clip_val=0.125 cannot clip under precision='16-mixed'")
