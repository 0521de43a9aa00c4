"""What the experiments train: a byte-level GPT on a text and a ResNet on images."""

import argparse
import itertools
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from signsgd_core.demo import load
from signsgd_core.demo.images import LAYOUT

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """A model and its data.

    Attributes:
        key: which it is, sizes included.
        name: for tables.
        measured: what the score is.
        better: "lower" or "higher" scores.
        global_batch: examples a step, of all workers together.
        device: where the data is.
    """

    key: str
    name: str
    measured: str
    better: str
    global_batch: int
    device = "cpu"

    @abstractmethod
    def to(self, device: str) -> None:
        """Move the data."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return an untrained model, drawn from torch's generator."""

    @abstractmethod
    def batch(self, examples: int, source: np.random.Generator) -> Batch:
        """Draw a batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""

    @abstractmethod
    def score(self, model: nn.Module) -> float:
        """Return what is compared, of data that was not trained on."""


class GPT(nn.Module):
    """A decoder of transformer blocks over bytes."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for p in self.parameters():  # the encoder copies one layer; small weights, as in GPT-2
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the next byte, shape (batch, length, 256)."""
        length = x.shape[1]
        y = self.bytes(x) + self.places.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device)
        y = self.blocks(y, mask=mask, is_causal=True)
        logits: Tensor = y @ self.bytes.weight.T
        return logits


class Text(Task):
    """Bytes of a text, the first nine tenths to train on; the score is the loss on the rest, nats per byte."""

    name, measured, better = "GPT on bytes", "validation loss, nats a byte", "lower"

    def __init__(
        self, path: Path, width: int = 128, layers: int = 3, context: int = 64, global_batch: int = 16
    ) -> None:
        text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        split = len(text) * 9 // 10
        self.train, self.rest = text[:split], text[split:]
        if len(self.rest) < 8 * context:
            raise ValueError(f"{str(path)!r} is too short: at least {80 * context} bytes are needed")
        self.shape, self.context, self.global_batch = (width, layers, context), context, global_batch
        self.key = f"gpt-{layers}x{width}-{global_batch}x{context}"

    def to(self, device: str) -> None:
        self.train, self.rest, self.device = self.train.to(device), self.rest.to(device), device

    def model(self) -> nn.Module:
        return GPT(*self.shape)

    def batch(self, examples: int, source: np.random.Generator) -> Batch:
        starts = source.integers(0, len(self.train) - self.context - 1, examples)
        rows = torch.stack([self.train[start : start + self.context + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def rows(self) -> Tensor:
        """Return what is scored, shape (rows, context + 1)."""
        starts = np.linspace(0, len(self.rest) - self.context - 1, min(256, len(self.rest) // self.context)).astype(int)
        return torch.stack([self.rest[start : start + self.context + 1] for start in starts])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        rows = self.rows()
        losses = [self.loss(model, (part[:, :-1], part[:, 1:])) * len(part) for part in torch.split(rows, 64)]
        return float(sum(losses) / len(rows))


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm beside a shortcut without parameters, as in the paper for CIFAR-10."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.body(x)
        short = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(short, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


class Residual(nn.Sequential):
    """Layers beside a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and what the layers make of it."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + y


def resnet9(width: int, channels: int, classes: int) -> nn.Module:
    """Return the ResNet of nine layers that learns CIFAR-10 in a few epochs; its author's has `width` 64.

    Source: Page, "How to train your ResNet", 2018.
    """

    def conv(inputs: int, outputs: int, *after: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), *after]

    def residual(wide: int) -> nn.Module:
        return Residual(*conv(wide, wide), *conv(wide, wide))

    first = [*conv(channels, width), *conv(width, 2 * width, nn.MaxPool2d(2)), residual(2 * width)]
    second = [*conv(2 * width, 4 * width, nn.MaxPool2d(2)), *conv(4 * width, 8 * width, nn.MaxPool2d(2))]
    head = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)]
    return nn.Sequential(*first, *second, residual(8 * width), *head)


def resnet(width: int, depth: int, channels: int, classes: int) -> nn.Module:
    """Return a ResNet for small images of `depth` layers; the paper's ResNet-20 has `width` 16.

    Source: He et al., arXiv 1512.03385, section 4.2; with nine layers `resnet9`.
    """
    if depth == 9:
        return resnet9(width, channels, classes)
    if depth % 6 != 2:
        raise ValueError(f"depth must be 9 or 6n + 2, got {depth}")
    widths = [width] + [width << k for k in range(3) for _ in range(depth // 6)]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class Images(Task):
    """Images by class, shifted and mirrored to train on; the score is the accuracy on the test images."""

    name, measured, better = "ResNet on images", "test accuracy", "higher"

    def __init__(self, folder: Path | None, width: int = 8, depth: int = 8, global_batch: int = 128) -> None:
        data = load(folder, Path(tempfile.gettempdir()) / "signsgd_images")
        mean, std = data.train_images.mean((0, 2, 3)), data.train_images.std((0, 2, 3)) + 1e-3
        self.center, self.spread = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))
        self.train = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
        self.test = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels)
        self.shape, self.global_batch = (width, depth), global_batch
        self.key = f"resnet-{depth}x{width}-{global_batch}"
        self.mirrored = folder is not None  # a digit is another one in the mirror

    def to(self, device: str) -> None:
        self.center, self.spread = self.center.to(device), self.spread.to(device)
        self.train, self.test = ((x.to(device), y.to(device)) for x, y in (self.train, self.test))
        self.device = device

    def model(self) -> nn.Module:
        return resnet(*self.shape, self.train[0].shape[1], int(self.train[1].max()) + 1)

    def batch(self, examples: int, source: np.random.Generator) -> Batch:
        at = torch.from_numpy(source.integers(0, len(self.train[0]), examples)).to(self.train[0].device)
        x, pad = self.train[0][at], self.train[0].shape[-1] // 8
        if self.mirrored:
            flip = torch.from_numpy(source.random(examples) < 0.5).view(-1, 1, 1, 1).to(x.device)
            x = torch.where(flip, x.flip(3), x)
        high, wide = (int(v) for v in source.integers(0, 2 * pad + 1, 2))
        x = functional.pad(x, (pad, pad, pad, pad))[:, :, high : high + x.shape[2], wide : wide + x.shape[3]]
        return self._whitened(x), self.train[1][at]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        model.eval()
        parts = zip(*(torch.split(part, 500) for part in self.test), strict=True)
        right = sum(int((model(self._whitened(x)).argmax(1) == y).sum()) for x, y in parts)
        model.train()
        return right / len(self.test[1])

    def _whitened(self, x: Tensor) -> Tensor:
        return (x.float() - self.center) / self.spread


STEPS = {"gpt": 500, "resnet": 390}
"""Of the two trainings that experiments share; 390 are an epoch of CIFAR-10."""


def shared_task(kind: str, options: argparse.Namespace, batches: int = 1) -> tuple[Task, int]:
    """Return one of them, with so many times the batch, and its number of steps, as many times fewer."""
    steps = 2 if options.short else STEPS[kind] // batches
    if kind == "gpt":
        width, layers, context, batch = (16, 1, 16, 16) if options.short else (128, 3, 64, 16)
        return Text(text_of(options), width, layers, context, batch * batches), steps
    width, batch = (2, 16) if options.short else (16, 128)
    return Images(options.images, width, 8, batch * batches), steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the data is."""
    parser.add_argument("--text", type=Path, help="a text file; without it a source file of Python's own")
    parser.add_argument("--images", type=Path, help=f"folder with {LAYOUT}; or the digits")


def text_of(options: argparse.Namespace) -> Path:
    """Return the text to train on."""
    return options.text or Path(argparse.__file__)
