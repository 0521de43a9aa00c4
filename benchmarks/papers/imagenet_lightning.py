"""ResNet-50 on any folder of images by majority vote, with the first paper's schedule, in Lightning.

python -m benchmarks.papers.imagenet_lightning DIR --devices 4 [--resume]

DIR holds ``train/CLASS/*`` and ``val/CLASS/*``. Ninety epochs; the learning rate falls to a tenth after a third and
after two thirds of them. `--resume` goes on from the last checkpoint in --out, that of the last whole epoch. Under
`torchrun` on several machines it is the same command with --nodes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from signsgd_lightning import Signum, VoteMonitor

SUFFIXES = {".jpg", ".jpeg", ".png"}
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a 1×1 convolution beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.body = nn.Sequential()
        for a, b, size, step in shapes:
            norm = nn.BatchNorm2d(b)
            self.body.extend([nn.Conv2d(a, b, size, step, size // 2, bias=False), norm, nn.ReLU()])
        del self.body[-1]
        nn.init.zeros_(norm.weight)  # each block starts as its shortcut
        change = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*change) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int) -> nn.Module:
    """Return the network of He et al., arXiv 1512.03385, with the stride on the 3×3 convolution as is usual today."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(count):
            layers.append(Bottleneck(inputs, width, 2 if k == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Folder(Dataset[tuple[Tensor, int]]):
    """Images by class, cut out at random to train on, or from the middle."""

    def __init__(self, folder: Path, size: int, train: bool) -> None:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.classes, self.size, self.train = classes, size, train
        self.files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(f"{str(folder)!r} has no images: put them into {folder.name}/CLASS/*.jpg")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            pixels = self._cut(image.convert("RGB"))
        x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(SPREAD).view(3, 1, 1), label

    def _cut(self, image: Image.Image) -> Image.Image:
        side = min(image.size)
        if not self.train:
            left, top = (image.width - side) / 2, (image.height - side) / 2
            edge = side * 0.0625  # the middle seven eighths
            box = (left + edge, top + edge, left + side - edge, top + side - edge)
            return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        area, ratio, x, y, mirror = torch.rand(5).tolist()
        area, ratio = 0.08 + 0.92 * area, (4 / 3) ** (2 * ratio - 1)
        width = min(image.width, (area * image.width * image.height * ratio) ** 0.5)
        height = min(image.height, (area * image.width * image.height / ratio) ** 0.5)
        left, top = x * (image.width - width), y * (image.height - height)
        cut = image.resize((self.size, self.size), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else cut


class Classifier(LightningModule):
    """The network, the vote's optimizer, and the schedule."""

    def __init__(self, options: argparse.Namespace, classes: int) -> None:
        super().__init__()
        self.options, self.model = options, resnet50(classes)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss."""
        loss = functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy."""
        right = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val/accuracy", right, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return Signum with a learning rate that falls twice to a tenth."""
        o = self.options
        settings: dict[str, Any] = {"betas": (o.beta, o.beta), "weight_decay": o.weight_decay}
        optimizer = Signum(self.parameters(), lr=o.lr, verdict_momentum=o.verdict_momentum, **settings)
        thirds = [max(1, o.epochs // 3), max(2, 2 * o.epochs // 3)]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, thirds, 0.1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--devices", type=int, default=1, help="ranks of a machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=128, help="of each rank")
    parser.add_argument("--size", type=int, default=224, help="of an image's side")
    parser.add_argument("--loaders", type=int, default=4, help="processes of each rank that read images")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.9, help="the paper's momentum; 0 with --verdict-momentum")
    parser.add_argument("--verdict-momentum", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("imagenet"), help="for checkpoints and logs")
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    train, val = (Folder(options.folder / part, options.size, part == "train") for part in ("train", "val"))
    loader: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.loaders}
    trainer = Trainer(
        devices=options.devices,
        num_nodes=options.nodes,
        accelerator=options.accelerator,
        precision=options.precision,
        strategy="majority_vote" if options.devices * options.nodes > 1 else "auto",
        max_epochs=options.epochs,
        default_root_dir=options.out,
        callbacks=[
            ModelCheckpoint(options.out / "checkpoints", save_last=True),
            LearningRateMonitor("epoch"),
            *([VoteMonitor()] if options.devices * options.nodes > 1 else []),
        ],
    )
    trainer.fit(
        Classifier(options, len(train.classes)),
        DataLoader(train, shuffle=True, drop_last=True, persistent_workers=options.loaders > 0, **loader),
        DataLoader(val, **loader),
        ckpt_path="last" if options.resume else None,
    )
    if trainer.is_global_zero:
        accuracy = trainer.callback_metrics.get("val/accuracy", torch.tensor(float("nan")))
        print(f"after {trainer.current_epoch} epochs and {trainer.global_step} steps: accuracy {float(accuracy):.2%}")


if __name__ == "__main__":
    main()
