"""Lightning Trainers that come and go, each a worker."""

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from .elastic import TIMEOUT


@dataclass
class Fit:
    """What a Trainer does.

    Attributes:
        settings: of the Trainer.
        strategy: settings of the strategy.
        signum: settings of the optimizer; None for AdamW.
        signmuon: whether the optimizer is SignMuon, in the place of these.
        manual: whether the module calls the optimizer itself.
        pause: seconds a batch takes.
        resume: a checkpoint to go on from.
    """

    settings: dict[str, Any]
    strategy: dict[str, Any] = field(default_factory=dict)
    signum: dict[str, Any] | None = field(default_factory=lambda: {"betas": (0, 0), "verdict_momentum": 0.5})
    signmuon: bool = False
    manual: bool = False
    pause: float = 0.02
    resume: Path | None = None


def fit(path: Path, lighthouse: str, task: Fit) -> None:
    """Train; write a line for every step, and one "log" in a folder of each worker's for what Lightning logged."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from signsgd_lightning import (
        ElasticBatches,
        ElasticVoteStrategy,
        GeometryMonitor,
        Signum,
        VoteMonitor,
        signmuon_groups,
    )

    torch.manual_seed(os.getpid())  # each starts elsewhere
    per_step, drawn = task.settings.get("accumulate_grad_batches", 1), list[list[int]]()

    class Batches(ElasticBatches):
        """Takes down which batches were drawn."""

        def __next__(self) -> list[int]:
            drawn.append(super().__next__())
            return drawn[-1]

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not task.manual
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            time.sleep(task.pause)
            loss = nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])
            self.log("loss", loss)
            if task.manual:
                self.optimizers().zero_grad()  # type: ignore[union-attr]
                self.manual_backward(loss)
                self.optimizers().step()  # type: ignore[union-attr]
                self.lr_schedulers().step()  # type: ignore[union-attr]
            return loss

        def configure_optimizers(self) -> Any:
            p = self.net.parameters()
            if task.signmuon:
                inner: Any = Signum(signmuon_groups(self.net, 0.02))
            else:
                inner = torch.optim.AdamW(p, lr=0.01) if task.signum is None else Signum(p, lr=0.01, **task.signum)
            schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda k: 0.5 ** (k % 3))
            return [inner], [{"scheduler": schedule, "interval": "step"}]

        def train_dataloader(self) -> Any:
            x = torch.randn(64, 4, generator=torch.Generator().manual_seed(7))
            place = self.trainer.strategy.vote  # type: ignore[attr-defined]
            data = TensorDataset(x, x.sum(1, keepdim=True).sin())
            return DataLoader(data, batch_sampler=Batches(64, 4, place, per_step=per_step))

    class Lines(Callback):
        step = 0

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == self.step or not trainer.strategy.vote.workers:
                return  # gradients accumulate, a newcomer's first ones, too
            self.step = trainer.global_step
            bits = hashlib.md5(b"".join(x.detach().numpy().tobytes() for x in module.parameters())).hexdigest()
            lr = [group["lr"] for group in trainer.optimizers[0].param_groups]
            vote = trainer.strategy.vote
            line = {"step": self.step, "bits": bits, "number": vote.number, "workers": vote.workers, "lr": lr}
            line |= {"drawn": drawn[-per_step:], "first": trainer.is_global_zero}
            line["monitor"] = float(trainer.callback_metrics.get("vote/workers", 0))
            line["geometry"] = [[record[name] for name in ("step", "samples")] for record in geometry.report.records]
            with path.open("a") as log:
                log.write(json.dumps(line) + "\n")

    folder, geometry = path.with_suffix(""), GeometryMonitor(every_n_steps=4, samples=2, directory=None)
    strategy = ElasticVoteStrategy(
        lighthouse=lighthouse, timeout=timedelta(seconds=TIMEOUT), hostname="127.0.0.1", **task.strategy
    )
    save = ModelCheckpoint(folder / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[VoteMonitor(), geometry, Lines(), save],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **task.settings,
    )
    trainer.fit(Module(), ckpt_path=task.resume)
