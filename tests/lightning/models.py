"""Small models that keep a record of every vote, and the judge that replays the records in `signsgd_core.Reference`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from signsgd_core import Reference
from signsgd_lightning import Signum
from signsgd_lightning.sharding import local

Array = npt.NDArray[Any]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@dataclass
class Record:
    """One parameter group on one rank: where it started, and each step's gradients, learning rate and result."""

    start: list[Array]
    dtypes: list[torch.dtype]
    first_step: int = 0
    gradients: list[list[Array | None]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    parameters: list[list[Array]] = field(default_factory=list)

    @property
    def end(self) -> list[Array]:
        return self.parameters[-1]


def array(x: Tensor) -> Array:
    """Copy what this rank has of a tensor; NumPy has no bfloat16, so halves become float32."""
    x = local(x.detach())
    return np.array(x.float().numpy() if x.dtype in (torch.bfloat16, torch.float16) else x.numpy())


def record(optimizer: Signum) -> list[Record]:
    """Record every step from now on, one `Record` a parameter group, added groups included."""
    records: list[Record] = []

    def open_records() -> None:
        for group in optimizer.param_groups[len(records) :]:
            parameters = group["params"]
            records.append(Record([array(p) for p in parameters], [p.dtype for p in parameters], optimizer.t))

    def note(*_: Any) -> None:
        for group, one in zip(optimizer.param_groups, records, strict=True):
            one.gradients.append([None if p.grad is None else array(p.grad) for p in group["params"]])
            one.lrs.append(float(group["lr"]))
            one.parameters.append([array(p) for p in group["params"]])

    open_records()
    optimizer.register_step_pre_hook(lambda *_: open_records())
    optimizer.register_step_post_hook(note)
    return records


def judge(ranks: Sequence[Record], **settings: Any) -> Reference:
    """Demand the same bits on all ranks, and `==` with `Reference` on the recorded gradients, at every step.

    Where the reference is undecided, the sign of a polar factor hanging on rounding, it goes on with what ranks have.
    """
    first = ranks[0]
    assert first.parameters, "no step was recorded"
    for rank, other in enumerate(ranks):
        for t, (ours, theirs) in enumerate(
            zip([first.start, *first.parameters], [other.start, *other.parameters], strict=True)
        ):
            for x, y in zip(ours, theirs, strict=True):
                assert x.tobytes() == y.tobytes(), f"rank {rank} differs from rank 0 before step {t}"
    reference = Reference(first.start, len(ranks), first.lrs[0], **settings)
    reference.t = first.first_step
    for t, (lr, expected) in enumerate(zip(first.lrs, first.parameters, strict=True)):
        reference.lr = lr
        reference.step([one.gradients[t] for one in ranks])
        for k, (x, dtype) in enumerate(zip(reference.parameters, first.dtypes, strict=True)):
            reference.parameters[k] = array(torch.from_numpy(np.array(x)).to(dtype))
            x = np.where(reference.undecided[k], expected[k], reference.parameters[k])
            np.testing.assert_array_equal(expected[k], x, f"tensor {k} at step {t}", strict=True)
            reference.parameters[k] = x
    return reference


def by_node(ranks: Sequence[Record], ranks_per_node: int) -> list[Record]:
    """Return one `Record` a node, of the mean of its ranks' gradients; the parameters must be the same on all ranks."""
    nodes = []
    for first in range(0, len(ranks), ranks_per_node):
        members = ranks[first : first + ranks_per_node]
        for one in members:
            assert [x.tobytes() for step in one.parameters for x in step] == [
                x.tobytes() for step in members[0].parameters for x in step
            ], "ranks of a node differ"
        steps = zip(*(one.gradients for one in members), strict=True)
        means = [[_mean(tensor) for tensor in zip(*step, strict=True)] for step in steps]
        nodes.append(replace(members[0], gradients=means))
    return nodes


def _mean(gradients: Sequence[Array | None]) -> Array | None:
    if all(g is None for g in gradients):
        return None
    shape = next(g.shape for g in gradients if g is not None)
    total = np.zeros(shape, np.float32)
    for g in gradients:
        if g is not None:
            total = total + np.where(np.isfinite(g), g, 0).astype(np.float32)
    return np.asarray(total / np.float32(len(gradients)))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


class Net(LightningModule):
    """A regression on made-up data; its initial weights differ between ranks until DDP evens them."""

    def __init__(
        self, net: Callable[[], nn.Module] = small_net, samples: int = 32, batch_size: int = 4, **signum: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        self.net: Any = net()
        self.signum: dict[str, Any] = {"lr": 0.03125, **signum}
        self.samples, self.batch_size = samples, batch_size
        self.records: list[Record] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x).float(), y.float())

    def configure_optimizers(self) -> Any:
        optimizer = Signum(self.net.parameters(), **self.signum)
        self.records = record(optimizer)
        return optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(self.samples, 4, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=self.batch_size)


class Given(LightningModule):
    """Parameters whose gradients are given: `gradients[step][rank][tensor]`, None where the tensor is not used."""

    def __init__(self, gradients: Sequence[Sequence[Sequence[Array | None]]], **signum: Any) -> None:
        super().__init__()
        shapes = [
            next(g.shape for step in gradients for worker in step if (g := worker[k]) is not None)
            for k in range(len(gradients[0][0]))
        ]
        self.x = nn.ParameterList([torch.ones(shape) for shape in shapes])
        self.given, self.signum = gradients, {"lr": 0.25, **signum}
        self.records: list[Record] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        mine = self.given[index][dist.get_rank()]
        return torch.stack(
            [(x * torch.from_numpy(g)).sum() for x, g in zip(self.x, mine, strict=True) if g is not None]
        ).sum()

    def configure_optimizers(self) -> Any:
        optimizer = Signum(self.parameters(), **self.signum)
        self.records = record(optimizer)
        return optimizer

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(len(self.given) * dist.get_world_size(), 1)))


class GivenByTwo(Given):
    """Two optimizers, one a tensor, both at every batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        self.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [Signum([x], betas=(0.0, 0.0)) for x in self.x]


def trainer(**settings: Any) -> Trainer:
    """A Trainer over all ranks of the process group, without files and bars."""
    usual = {"accelerator": "cpu", "devices": dist.get_world_size(), "strategy": "majority_vote", "max_epochs": 1}
    return Trainer(**{**QUIET, **usual, **settings})


def fit(model: Callable[[], Any], settings: dict[str, Any]) -> list[Record]:
    """Train a model on this rank; return its records."""
    module = model()
    trainer(**settings).fit(module)
    return list(module.records)


def alone(model: Any, callback: Callback, **settings: Any) -> Trainer:
    """Train in this process, two epochs."""
    run = Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 2, **settings}, callbacks=[callback])
    run.fit(model)
    return run
