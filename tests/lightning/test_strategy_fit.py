"""What users do with a Trainer goes on to work under the vote, with the meaning it has on one machine."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from signsgd_lightning import Signum, VoteMonitor
from tests.workers import Workers

from .models import Array, Given, Net, Record, array, fit, judge, record, trainer

DYADIC: dict[str, Any] = {"betas": (0.5, 0.5)}


def _eighths(*shape: int) -> Array:
    return (np.random.default_rng(5).integers(-3, 4, shape) / 8).astype(np.float32)


@pytest.mark.parametrize("scheduled", [False, True])
def test_accumulation(scheduled: bool, workers: Workers) -> None:
    """Each rank votes with the mean of its own two batches."""
    batches = _eighths(6, 2, 1, 90)
    settings: dict[str, Any] = {"callbacks": [GradientAccumulationScheduler({0: 2})]}
    settings = settings if scheduled else {"accumulate_grad_batches": 2}
    runs = workers.run(
        2, fit, partial(Given, [[list(worker) for worker in batch] for batch in batches], **DYADIC), settings
    )
    for rank, (one,) in enumerate(runs):
        np.testing.assert_array_equal([g[0] for g in one.gradients], (batches[::2] + batches[1::2])[:, rank, 0] / 2)
    judge([run[0] for run in runs], **DYADIC)


class _Watched(Net):
    """Keeps each step's gradients as they were before they were clipped."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.raw = [*getattr(self, "raw", []), [array(p.grad) for p in self.net.parameters()]]


def _clip(algorithm: str, value: float) -> tuple[list[list[Array]], list[Record]]:
    model = _Watched()
    trainer(gradient_clip_val=value, gradient_clip_algorithm=algorithm).fit(model)
    return model.raw, model.records


@pytest.mark.parametrize(("algorithm", "value"), [("norm", 0.25), ("value", 0.0625)])
def test_each_rank_clips_its_own_gradient(algorithm: str, value: float, workers: Workers) -> None:
    ranks = workers.run(2, _clip, algorithm, value)
    for raw, (one,) in ranks:
        clipped = 0
        for before, voted in zip(raw, one.gradients, strict=True):
            gradients = [torch.from_numpy(g) for g in before]
            if algorithm == "norm":
                norm = torch.nn.utils.get_total_norm(gradients)
                expected = [g * torch.clamp(value / (norm + 1e-6), max=1.0) for g in gradients]
            else:
                expected = [g.clamp(-value, value) for g in gradients]
            for g, e, b in zip(voted, expected, gradients, strict=True):
                np.testing.assert_array_equal(g, e.numpy())
                clipped += not torch.equal(e, b)
        assert clipped
    judge([records[0] for _, records in ranks])


class _Groups(Net):
    """Two parameter groups with settings of their own."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.125, "betas": (0.5, 0.25), "weight_decay": 0.25},
            {"params": self.net[2].parameters(), "betas": (0.0, 0.0), "verdict_momentum": 0.5},
        ]
        optimizer = Signum(groups, lr=0.0625)
        self.records = record(optimizer)
        return optimizer


def test_groups_with_their_own_settings(workers: Workers) -> None:
    runs = workers.run(2, fit, _Groups, {})
    judge([run[0] for run in runs], betas=(0.5, 0.25), weight_decay=0.25)
    judge([run[1] for run in runs], betas=(0.0, 0.0), verdict_momentum=0.5)
    assert [one.lrs[0] for one in runs[0]] == [0.125, 0.0625]


class _Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_learning_rate_scheduler(workers: Workers) -> None:
    runs = workers.run(2, fit, _Scheduled, {})
    judge([run[0] for run in runs])
    assert runs[0][0].lrs == [0.03125, 0.03125, 0.015625, 0.015625]


class _Uneven(Net):
    """Rank 0 ends with a batch of 2 samples, rank 1 with one of a single sample."""

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.linspace(-1, 1, 40 - 4 * self.global_rank).view(-1, 4)
        return DataLoader(TensorDataset(x, x[:, :1].sin()), batch_size=4)

    def on_train_batch_start(self, batch: list[Tensor], index: int) -> None:
        self.sizes = [*getattr(self, "sizes", []), len(batch[0])]


def _uneven() -> tuple[list[int], list[Record]]:
    model = _Uneven()
    trainer(use_distributed_sampler=False).fit(model)
    return model.sizes, model.records


def test_uneven_last_batches(workers: Workers) -> None:
    ranks = workers.run(2, _uneven)
    assert [sizes for sizes, _ in ranks] == [[4, 4, 2], [4, 4, 1]]
    judge([records[0] for _, records in ranks])


class _Normalized(Net):
    def __init__(self, signum: bool) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), lr=0.0)
        self.plain = not signum
        self.after_forward: list[list[Array]] = []

    def on_before_backward(self, loss: Tensor) -> None:
        self.after_forward.append([array(b) for b in self.net.buffers()])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.0) if self.plain else super().configure_optimizers()


def _buffers(strategy: str) -> list[list[Array]]:
    model = _Normalized(strategy == "majority_vote")
    trainer(strategy=strategy).fit(model)
    return [*model.after_forward, [array(b) for b in model.net.buffers()]]


def test_batch_norm_buffers_are_as_plain_ddp_leaves_them(workers: Workers) -> None:
    """With a learning rate of 0, so that only the buffers move."""
    voted, plain = workers.run(2, _buffers, "majority_vote"), workers.run(2, _buffers, "ddp")
    assert len(voted[0]) == 5
    for ours, theirs in zip(voted, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert [x.tobytes() for x in a] == [x.tobytes() for x in b]
    assert not np.array_equal(plain[0][0][0], plain[0][-1][0])


class _Evaluated(Net):
    """Validates, tests and predicts; its validation loss stops improving after the second epoch."""

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", 1.0 / min(self.current_epoch + 1, 2), sync_dist=True)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test_loss", self.training_step(batch, index), sync_dist=True)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return torch.as_tensor(self.net(batch[0]))

    val_dataloader = test_dataloader = predict_dataloader = Net.train_dataloader


def _early() -> tuple[int, int, list[Record]]:
    model = _Evaluated()
    run = trainer(callbacks=[EarlyStopping("val_loss", patience=2)], max_epochs=9)
    run.fit(model)
    return run.current_epoch, run.global_step, model.records


def test_early_stopping(workers: Workers) -> None:
    ranks = workers.run(2, _early)
    assert [(epoch, step) for epoch, step, _ in ranks] == [(4, 16), (4, 16)]
    judge([records[0] for _, _, records in ranks])


def _evaluate() -> list[Any]:
    model, run = _Evaluated(), trainer(callbacks=[VoteMonitor()])  # it is in nobody's way where nothing is trained
    seen: list[Any] = []
    for fitted in (False, True):
        if fitted:
            run.fit(model)
        run.validate(model, verbose=False)
        (tested,) = run.test(model, verbose=False)
        predicted = run.predict(model)
        assert predicted is not None
        seen.append((tested["test_loss"], torch.cat(predicted).numpy()))  # type: ignore[arg-type]
    return [*seen, model.records]


def test_validate_test_and_predict_before_and_after_fit(workers: Workers) -> None:
    ranks = workers.run(2, _evaluate)
    judge([records[0] for *_, records in ranks])
    for k in range(2):
        assert ranks[0][k][0] == ranks[1][k][0]  # the metric is that of all ranks
        assert [rank[k][1].shape for rank in ranks] == [(16, 1), (16, 1)]
        assert not np.array_equal(ranks[0][k][1], ranks[1][k][1])  # each rank predicts its own samples
    assert ranks[0][1][0] < ranks[0][0][0]


def _twice(same_trainer: bool) -> list[list[Record]]:
    model, run = Net(), trainer()
    run.fit(model)
    first = model.records
    if same_trainer:
        run.fit_loop.max_epochs = 2
    else:
        run, model = trainer(), Net(betas=(0.0, 0.0))
    run.fit(model)
    return [first, model.records]


@pytest.mark.parametrize("same_trainer", [True, False])
def test_fit_twice_in_one_process(same_trainer: bool, workers: Workers) -> None:
    ranks = workers.run(2, _twice, same_trainer)
    judge([first[0] for first, _ in ranks])
    reference = judge([second[0] for _, second in ranks], **({} if same_trainer else {"betas": (0.0, 0.0)}))
    assert reference.t == 4


def _compiled(whole: bool) -> tuple[int, list[Record]]:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Net()
    if not whole:
        model.net = torch.compile(model.net, backend=backend)
    compiled: Any = torch.compile(model, backend=backend) if whole else model
    trainer().fit(compiled)
    torch.compiler.reset()
    return len(graphs), model.records


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_model(whole: bool, workers: Workers) -> None:
    ranks = workers.run(2, _compiled, whole)
    judge([records[0] for _, records in ranks])
    assert all(graphs for graphs, _ in ranks)
