"""`strategy="local_vote"` under real Trainers: rounds `==` the reference, checkpoints, validation."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from signsgd_core import predecessors
from signsgd_lightning import LocalVoteStrategy, Signum, VoteMonitor
from tests.tiers import nightly_where
from tests.workers import Workers

from .models import Net, trainer
from .rounds import Ends, Recorder, Round, ends_of, judge


class Model(Net):
    """`Net` with batch norm, any optimizer, and validation that notes the parameters it sees."""

    def __init__(self, inner: str = "AdamW") -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)), 96)
        self.inner, self.seen = inner, list[Ends]()
        self.automatic_optimization = not inner.startswith("Muon and AdamW")

    def configure_optimizers(self) -> Any:
        p = list(self.net.parameters())
        if not self.automatic_optimization:
            rest = [x for x in p if x.dim() != 2]
            return [torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.05), torch.optim.AdamW(rest, lr=0.05)]
        if self.inner == "Signum":
            return Signum(p, lr=0.01)
        if self.inner == "LBFGS":
            return torch.optim.LBFGS(p, lr=0.05, max_iter=2)
        optimizer = torch.optim.AdamW(p, lr=0.05) if self.inner == "AdamW" else torch.optim.SGD(p, 0.1, 0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        loss = super().training_step(batch, index)
        if self.automatic_optimization:
            return loss
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers(use_pl_optimizer="raw" not in self.inner):  # type: ignore[union-attr]
            optimizer.step()
        return None

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        if index == 0:
            self.seen.append([*ends_of(self), *(b.double().numpy().copy() for b in self.buffers())])

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


class Record(Callback):
    """Records the rounds of a fit."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.recorder = Recorder(pl_module, trainer.optimizers)
        self.start = ends_of(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.recorder.note_common(trainer.strategy.local_steps)


def _fit(inner: str, options: dict[str, Any], settings: dict[str, Any]) -> tuple[Ends, list[Round], list[Ends], Ends]:
    module, record = Model(inner), Record()
    trainer(strategy=LocalVoteStrategy(**options), callbacks=[record], **settings).fit(module)
    return record.start, record.recorder.rounds, module.seen, ends_of(module)


CASES: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (2, "AdamW", {"sync_every": 2}, {}),
    (3, "SGD", {"sync_every": 1, "outer_momentum": 0.5}, {"accumulate_grad_batches": 2}),
    (3, "Muon and AdamW", {"sync_every": 3, "outer_lr": 1.25}, {}),
    (2, "Muon and AdamW, raw", {"sync_every": 3}, {}),
    (2, "Signum", {"sync_every": 3, "verify_every_n_rounds": 1}, {"gradient_clip_val": 0.5, "precision": "bf16-mixed"}),
    (2, "AdamW", {"sync_every": 2}, {"precision": "16-mixed", "val_check_interval": 3}),
]


@pytest.mark.parametrize(("ranks", "inner", "options", "settings"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_rounds_are_those_of_the_reference(
    ranks: int, inner: str, options: dict[str, Any], settings: dict[str, Any], workers: Workers
) -> None:
    """Each round that a step closed; and all ranks validate the same model, and end with it."""
    runs = workers.run(ranks, _fit, inner, options, settings)
    steps = 96 // (4 * ranks) // settings.get("accumulate_grad_batches", 1)
    if "val_check_interval" not in settings:  # validation closes rounds that no step closed
        assert len(runs[0][1]) == steps // options["sync_every"]
        judge([run[:3] for run in runs], **{k: v for k, v in options.items() if k.startswith("outer")})
    for _, _, seen, end in runs:
        assert len(seen) == 1 + 4 if "val_check_interval" in settings else 2  # with the sanity check
        for ours, theirs in zip([*seen, end], [*runs[0][2], runs[0][3]], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


def _train(
    folder: str, kind: Any, epochs: int, resume: str | None = None, inner: str = "AdamW"
) -> tuple[list[bytes], list[bytes], int]:
    """Train, save at every epoch, and return the bytes of parameters and of this rank's state, and the rounds."""
    module = Model(inner)
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    strategy, rounds = LocalVoteStrategy(sync_every=3, outer_momentum=0.5, state_dict_type=kind), Rounds()
    run = trainer(max_epochs=epochs, strategy=strategy, enable_checkpointing=True, callbacks=[save, rounds])
    run.fit(module, ckpt_path=resume)
    states = [optimizer.state[p] for optimizer in run.optimizers for g in optimizer.param_groups for p in g["params"]]
    own = [_bytes(value) for state in states for value in state.values()]
    return [t.numpy().tobytes() for t in module.state_dict().values()], own, rounds.rounds


def _bytes(value: Any) -> Any:
    """Return the bits of an entry of a state, which is a tensor, a list of tensors, a number or nothing."""
    if isinstance(value, list):
        return list(map(_bytes, value))
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


class Rounds(Callback):
    """Notes how many rounds there were."""

    rounds = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.rounds = trainer.strategy.local_steps.outer.rounds


@pytest.mark.parametrize(
    ("inner", "kind"),
    nightly_where(
        lambda case: case not in {("AdamW", "full"), ("LBFGS", "sharded")},
        product(("AdamW", "SGD", "LBFGS"), ("full", "sharded")),
    ),
)
def test_resumed_is_uninterrupted(kind: str, inner: str, tmp_path: Path, workers: Workers) -> None:
    straight = workers.run(2, _train, str(tmp_path / "a"), kind, 3, None, inner)
    workers.run(2, _train, str(tmp_path / "b"), kind, 1, None, inner)
    resumed = workers.run(2, _train, str(tmp_path / "c"), kind, 3, str(tmp_path / "b" / "epoch=0.ckpt"), inner)
    assert resumed == straight
    assert straight[0][0] == straight[1][0]
    assert straight[0][1] != straight[1][1], "ranks that had the same data prove nothing"


@pytest.mark.parametrize("kind", ["full", "sharded"])
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3)])
def test_other_numbers_of_ranks(kind: str, old: int, new: int, tmp_path: Path, workers: Workers) -> None:
    """A rank takes the state of old rank `i mod M`, or of the first of those that it replaces."""
    before = workers.run(old, _train, str(tmp_path / "a"), kind, 1)
    after = workers.run(new, _train, str(tmp_path / "b"), kind, 1, str(tmp_path / "a" / "epoch=0.ckpt"))
    for rank, (parameters, own, _) in enumerate(after):
        assert parameters == before[0][0]
        assert own == before[predecessors(rank, new, old)[0]][1]


class Stops(Model):
    """Rank 1 raises in the fifth batch."""

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        if index == 4 and dist.get_rank() == 1:
            raise ValueError("out of memory")
        return super().training_step(batch, index)


def _stops() -> str:
    try:
        trainer(strategy=LocalVoteStrategy(sync_every=3)).fit(Stops())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_fails_is_named(workers: Workers) -> None:
    first, second = workers.run(2, _stops, group_timeout=5)
    assert first.startswith("PeerLostError: rank 1 stopped answering"), first
    assert second == "ValueError: out of memory"


def _by_name() -> str:
    module = Net()
    run = trainer(strategy="local_vote")
    run.fit(module)
    return f"{type(run.strategy).__name__} {type(run.strategy.model).__name__}"


def test_by_name(workers: Workers) -> None:
    """The model is not wrapped."""
    assert workers.run(2, _by_name) == ["LocalVoteStrategy Net"] * 2


class Watch(Callback):
    """Notes the parameters that callbacks see."""

    def __init__(self) -> None:
        self.seen = list[tuple[str, Ends]]()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(("validation", ends_of(pl_module)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(("end", ends_of(pl_module)))


def _watched(averages: bool, batches: float) -> list[tuple[str, Ends]]:
    module, watch = Model(), Watch()
    callbacks = [StochasticWeightAveraging(0.01, swa_epoch_start=1), watch] if averages else [watch]
    strategy = LocalVoteStrategy(sync_every=5)
    run = trainer(strategy=strategy, callbacks=callbacks, max_epochs=3, limit_val_batches=batches)
    run.fit(module)
    assert len(run.callbacks) == len(callbacks), "the strategy's own goes with it"  # type: ignore[attr-defined]
    return [*watch.seen, ("after", ends_of(module))]


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("batches", [0, 1.0])
def test_callbacks_see_what_is_the_same_on_all_ranks(averages: bool, batches: float, workers: Workers) -> None:
    """The last round of 12 or 36 steps is open; and what a callback makes of the model at the end is what stays."""
    first, second = workers.run(2, _watched, averages, batches)
    epochs = 3 + averages  # one for batch norm
    assert [when for when, _ in first].count("validation") == (1 + epochs if batches else 0)
    for (when, ours), (_, theirs) in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=when)
    for a, b in zip(first[-2][1], first[-1][1], strict=True):
        np.testing.assert_array_equal(a, b)


def _averages_of_steps(callback: type[WeightAveraging]) -> str:
    try:
        trainer(strategy=LocalVoteStrategy(), callbacks=[callback()]).fit(Model())
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("callback", [EMAWeightAveraging, WeightAveraging])
def test_averages_of_steps_are_refused(callback: type[WeightAveraging], workers: Workers) -> None:
    for said in workers.run(2, _averages_of_steps, callback):
        assert said.startswith(f"{callback.__name__} averages after every step"), said
        assert "take StochasticWeightAveraging" in said


def test_a_strategy_with_bad_settings_is_refused() -> None:
    with pytest.raises(TypeError, match="LocalVoteStrategy got an unexpected keyword argument 'sync_evry'"):
        LocalVoteStrategy(sync_evry=2)
    with pytest.raises(ValueError, match="sync_every must be a whole number of 1 or more, got 0"):
        LocalVoteStrategy(sync_every=0)
    with pytest.raises(ValueError, match="state_dict_type must be"):
        LocalVoteStrategy(state_dict_type="half")  # type: ignore[arg-type]


class Logged(Callback):
    """Keeps what VoteMonitor puts into the callbacks' metrics, and this rank's drift by its parameters."""

    def __init__(self) -> None:
        self.rows, self.squares = list[dict[str, float]](), list[float]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.recorder = Recorder(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.recorder.note_common(trainer.strategy.local_steps)
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("vote/")})


def _monitored() -> tuple[list[dict[str, float]], list[Round], int]:
    module, logged = Model("SGD"), Logged()
    strategy = LocalVoteStrategy(sync_every=2)
    run = trainer(strategy=strategy, callbacks=[VoteMonitor(), logged], log_every_n_steps=4)
    run.fit(module)
    return logged.rows, logged.recorder.rounds, sum(p.numel() for p in module.parameters())


def test_monitor(workers: Workers) -> None:
    """Two rounds between logs: shares as counted on plain signs, the drift as the parameters say."""
    runs = workers.run(3, _monitored)
    row = runs[0][0][3]
    assert all(rows == runs[0][0] for rows, _, _ in runs)
    squares = sum(
        ((own - common) ** 2).sum()
        for _, rounds, _ in runs
        for owns, commons in rounds[:2]
        for own, common in zip(owns, commons, strict=True)
    )
    assert row["vote/drift"] == pytest.approx(np.sqrt(squares / (3 * 2 * runs[0][2])), rel=1e-5)
    assert 0.5 < row["vote/agreement/rank0"] <= 1
    assert row["vote/ties"] == 0
    assert row["vote/nonfinite"] == 0
    assert row["vote/bytes_per_round"] > 2 * (32 + 2 * 8)
    assert row["vote/seconds_per_round"] > 0
