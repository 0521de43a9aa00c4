"""M workers in one process that train a small perceptron on handwritten digits: what two scripts of this folder share.

Pixels are 0 to 1, and those that are dark stay exactly 0, so weights of pixels that no image of a batch lights have a
gradient of exactly zero, as have those of hidden units that no image wakes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.papers.common import Array
from signsgd_core import Reference, demo

BATCH_SIZE, WIDTH = 32, 32


class Split(NamedTuple):
    """Images, float32 of shape (count, 64), and their labels."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Images to train with, to choose by, and to report."""

    train: Split
    validation: Split
    test: Split


def load() -> Data:
    """Return 1,000 digits to train with, 347 to choose learning rates by, 450 to report."""
    found = demo.load(None, Path())

    def split(images: Array, labels: Array) -> Split:
        return Split(torch.from_numpy(images.reshape(len(images), -1) / np.float32(255)), torch.from_numpy(labels))

    train = split(found.train_images, found.train_labels)
    return Data(
        Split(train.images[:1_000], train.labels[:1_000]),
        Split(train.images[1_000:], train.labels[1_000:]),
        split(found.test_images, found.test_labels),
    )


def perceptron(seed: int) -> nn.Sequential:
    """Return a network of 2,410 parameters, which depends on the seed alone."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def parameters(model: nn.Module) -> list[Array]:
    """Return the parameters as float32 arrays."""
    return [p.detach().numpy() for p in model.parameters()]


def training(
    model: nn.Module, reference: Reference, data: Split, seed: int, steps: int, rate: Callable[[int], float]
) -> Iterator[list[list[Array]]]:
    """Take steps; after each, the model has the reference's parameters, and the workers' gradients are returned.

    Args:
        model: a perceptron.
        reference: made of its parameters; each of its workers gets images of its own.
        data: images to train with.
        seed: of their order.
        steps: how many.
        rate: step -> learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    together = reference.workers * BATCH_SIZE
    an_epoch = len(data.images) // together
    for step in range(steps):
        if step % an_epoch == 0:
            order = torch.randperm(len(data.images), generator=generator)
        batches = order[step % an_epoch * together :][:together].view(reference.workers, BATCH_SIZE)
        gradients = [_gradient(model, Split(data.images[mine], data.labels[mine])) for mine in batches]
        reference.lr = rate(step)
        reference.step(gradients)
        for p, x in zip(model.parameters(), reference.parameters, strict=True):
            p.data = torch.from_numpy(x)
        yield gradients


def _gradient(model: nn.Module, batch: Split) -> list[Array]:
    loss = functional.cross_entropy(model(batch.images), batch.labels)
    return [gradient.numpy() for gradient in torch.autograd.grad(loss, list(model.parameters()))]


def asleep(model: nn.Sequential, data: Split) -> int:
    """Return how many hidden units no image wakes."""
    with torch.no_grad():
        return int((model[0](data.images) <= 0).all(0).sum())


def measure(model: nn.Module, data: Split) -> tuple[float, float]:
    """Return loss and accuracy, 0 to 1."""
    with torch.no_grad():
        guesses = model(data.images)
        loss = functional.cross_entropy(guesses, data.labels)
        return float(loss), float((guesses.argmax(1) == data.labels).float().mean())
