"""The demo: the same model trained with plain DDP and AdamW, and by majority vote; what it costs, what it gives."""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from signsgd_core import demo
from signsgd_core.adversaries import Adversary
from signsgd_core.network import traffic
from signsgd_core.wire import digest

from . import MajorityVoteStrategy, Signum, signmuon_groups

LEARNING_RATES = {"AdamW": 2e-3, "Signum": 4e-4, "verdict momentum": 2e-3, "SignMuon": 2e-2}
"""The best of a small grid on the digits."""

BATCH_SIZE = 32
EVALUATIONS = 8


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut; group norm, so that there are no buffers to keep in step."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.norms[1](self.second(y)) + self.shortcut(x))


def network(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a perceptron for the digits, and a small ResNet of over a million parameters for larger images."""
    channels, height, width = shape
    if height * width <= 256:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, 512),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )
    stem = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.GroupNorm(8, 32), nn.ReLU())
    blocks = [Residual(32, 64, 2), Residual(64, 128, 2), Residual(128, 256, 2)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


class Images(pl.LightningDataModule):
    """The training images shuffled and shared out, and each worker's own share of the test images."""

    def __init__(self, data: demo.Data, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.train = TensorDataset(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
        self.test = TensorDataset(torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this worker's batches, in the same order for every method."""
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train, self._workers, self._rank, seed=self.seed, drop_last=True
        )
        return DataLoader(self.train, BATCH_SIZE, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this worker's share of the test images, each image in one share."""
        return DataLoader(Subset(self.test, range(self._rank, len(self.test), self._workers)), 256)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _workers(self) -> int:
        return self.trainer.world_size if self.trainer else 1


class Classifier(pl.LightningModule):
    """A network, an optimizer, a cosine schedule."""

    def __init__(self, model: nn.Module, optimizer: Callable[[nn.Module], Optimizer], tested: int) -> None:
        super().__init__()
        self.model, self.optimizer, self.tested = model, optimizer, tested

    def forward(self, images: Tensor) -> Tensor:
        """Return the classes' logits."""
        return self.model(images.float() / 127.5 - 1)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Add up what is right, over all workers."""
        right = (self(batch[0]).argmax(1) == batch[1]).sum() / self.tested
        self.log("accuracy", right, reduce_fx="sum", sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = self.optimizer(self.model)
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Recorder(pl.Callback):
    """Counts bytes and seconds of the training steps, and accuracy on the way."""

    def __init__(self) -> None:
        self.curve: list[tuple[float, float]] = []
        self.seconds: list[float] = []
        self.sent = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the sockets' counters."""
        self.before, self.begin = traffic.socket_bytes(), time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.begin)
        self.sent = traffic.sent_since(self.before)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the accuracy and what it took."""
        self.curve.append((self.sent, float(trainer.callback_metrics["accuracy"])))

    def result(self, method: str, trainer: pl.Trainer, model: nn.Module) -> demo.Result:
        """Return what all workers saw."""
        own = self.sent, digest(parameter.detach().cpu().numpy() for parameter in model.parameters())
        everyone: list[Any] = [own]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, own)
        sent = sum(count for count, _ in everyone) / len(everyone) / len(self.seconds)
        identical = len({parameters for _, parameters in everyone}) == 1
        return demo.Result(method, self.curve[-1][1], sent or None, median(self.seconds), identical, self.curve)


class Liar(pl.Callback):
    """Lets ranks hand other gradients to DDP's mean than they computed; a silent one's are zeros there."""

    def __init__(self, adversaries: Mapping[int, Adversary]) -> None:
        self.adversaries = adversaries

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Come between the backward pass and DDP."""
        adversary = self.adversaries.get(trainer.global_rank)
        if adversary is None:
            return

        def lie(gradient: Tensor) -> Tensor:
            sent = adversary(gradient.cpu().numpy())
            return torch.zeros_like(gradient) if sent is None else torch.from_numpy(np.array(sent)).to(gradient)

        for parameter in pl_module.parameters():
            parameter.register_hook(lie)  # type: ignore[no-untyped-call]


def train(
    method: str,
    strategy: str | Strategy,
    optimizer: Callable[[nn.Module], Optimizer],
    data: demo.Data,
    options: Any,
    *callbacks: pl.Callback,
) -> demo.Result:
    """Train one method with a real Trainer and return what it came to."""
    pl.seed_everything(options.seed, verbose=False)
    images, recorder = Images(data, options.seed), Recorder()
    classes = int(data.train_labels.max()) + 1
    model = Classifier(network(data.train_images.shape[1:], classes), optimizer, len(data.test_labels))
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=options.workers,
        strategy=strategy,
        max_steps=options.steps,
        val_check_interval=max(options.steps // EVALUATIONS, 1),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[recorder, TQDMProgressBar(refresh_rate=5), *callbacks],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    if trainer.global_rank == 0:
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"\n{method}: {count:,} parameters, {options.workers} workers, {options.steps} steps", flush=True)
    trainer.fit(model, images)
    trainer.validate(model, images, verbose=False)
    return recorder.result(method, trainer, model)


def main(arguments: list[str] | None = None) -> None:
    """Run all methods, print the table, save the plot."""
    workers = "worker processes (default: 4 on the CPU, one per GPU where there are GPUs)"
    parser = demo.parser("python -m signsgd_lightning", __doc__.splitlines()[0], workers, LEARNING_RATES)
    options = parser.parse_args(arguments)
    demo.settle(parser, options, torch.cuda.device_count() or 4)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|epoch parameter).*")
    try:  # before the workers start: they find a folder decoded
        data = demo.load(options.data, options.out, tell=rank_zero_only.rank == 0)  # type: ignore[attr-defined]
    except ValueError as error:
        parser.error(str(error))
    adamw_lr, signum_lr, verdict_lr, signmuon_lr = options.lr
    gamma, zeros = options.verdict_momentum, options.zeros

    def adamw(model: nn.Module) -> AdamW:
        return AdamW(model.parameters(), adamw_lr)

    def signum(model: nn.Module) -> Signum:
        return Signum(model.parameters(), signum_lr, options.betas, zeros=zeros)

    def verdict_momentum(model: nn.Module) -> Signum:
        return Signum(model.parameters(), verdict_lr, (0, 0), zeros=zeros, verdict_momentum=gamma)

    def signmuon(model: nn.Module) -> Signum:
        return Signum(signmuon_groups(model, signmuon_lr, signum_lr), zeros=zeros)

    def vote() -> MajorityVoteStrategy:
        return MajorityVoteStrategy(adversaries=demo.adversaries(options))

    liar = Liar(demo.adversaries(options))
    results = [
        train("AdamW, plain DDP", "ddp", adamw, data, options, liar),
        train(f"Signum {options.betas}, vote", vote(), signum, data, options),
        train(f"verdict momentum {gamma}, vote", vote(), verdict_momentum, data, options),
        train("SignMuon, vote", vote(), signmuon, data, options),
    ]
    rank_zero_only(demo.report)(results, options)


if __name__ == "__main__":
    main()
