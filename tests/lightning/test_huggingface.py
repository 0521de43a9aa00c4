"""Hugging Face's Accelerate and Trainer, as users call them: votes, accumulation, clipping, and going on."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from signsgd_lightning import Signum, WorkerStates, enable_majority_vote
from tests.workers import Workers

from .models import Record, judge, record, small_net

pytest.importorskip("transformers", reason="needs the extra huggingface")

SIGNUM: dict[str, Any] = {"betas": (0.5, 0.5), "verdict_momentum": 0.25}


def _bits(optimizer: Any) -> list[bytes]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [v for entries in optimizer.state.values() for v in entries.values()]
    return [x.detach().numpy().tobytes() for x in (*parameters, *entries)]


def _momentum_warnings(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if "moment" in str(w.message)]


def _accelerate(folder: str, resume: bool) -> tuple[list[Record], list[bytes], list[bytes], list[str]]:
    """Two votes of two batches each, then the state is saved; with `resume` loaded; then two votes more."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the task before, in this process
    torch.manual_seed(int(resume))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = small_net()
    signum = Signum(model.parameters(), lr=0.0625, **SIGNUM)
    model, optimizer = accelerator.prepare(model, signum)
    enable_majority_vote(model, optimizer)
    accelerator.register_for_checkpointing(WorkerStates(optimizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if resume:
            accelerator.load_state(folder)
    saved = _bits(signum)
    records = record(signum)
    for k in range(4 if resume else 0, 8):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * k + dist.get_rank()))
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if k == 3:
            accelerator.save_state(folder)
            saved = _bits(signum)
    return records, saved, _bits(signum), _momentum_warnings(caught)


def test_accelerate(tmp_path: Path, workers: Workers) -> None:
    first = workers.run(2, _accelerate, str(tmp_path / "state"), False)
    judge([records[0] for records, *_ in first], **SIGNUM)
    assert first[0][1] != first[1][1], "momenta are each worker's own"
    for (_, saved, end, _), (_, loaded, resumed, words) in zip(
        first, workers.run(2, _accelerate, str(tmp_path / "state"), True), strict=True
    ):
        assert saved == loaded
        assert end == resumed
        assert not words


class _Line(nn.Module):
    """What Trainer takes for a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        y = self.head(self.layer(x).tanh())
        return {"loss": (y[:, 0] - labels).square().mean(), "logits": y}


def _trainer(folder: str, steps: int, optimizer: Any = Signum) -> Any:
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(7))
    data = [{"x": row, "labels": row.sum()} for row in x]
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    accumulate: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=2, use_cpu=True, lr_scheduler_type="constant", **accumulate, **quiet
    )
    settings = {"lr": 0.0625, **SIGNUM} if optimizer is Signum else {"lr": 0.1}
    return Trainer(_Line(), arguments, train_dataset=data, optimizer_cls_and_kwargs=(optimizer, settings))


def _fit(
    folder: str, steps: int, resume: str | None, votes: bool = True
) -> tuple[list[Record], list[bytes], list[str]]:
    from transformers import TrainerCallback

    from signsgd_lightning import MajorityVoteCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            records.append(record(optimizer.optimizer))

    class Killed(TrainerCallback):
        """Keeps what a run leaves that is killed before it has gathered the momenta."""

        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if args.should_save:
                shutil.copytree(f"{folder}/checkpoint-{state.global_step}", f"{folder}/killed-{state.global_step}")

    records: list[Any] = []
    torch.manual_seed(0 if resume is None else 1)
    trainer = _trainer(folder, steps)
    if votes:
        trainer.add_callback(Killed())
        trainer.add_callback(MajorityVoteCallback(trainer))
    trainer.add_callback(Recorder())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    return records[0], _bits(trainer.optimizer), _momentum_warnings(caught)


def test_trainer(tmp_path: Path, workers: Workers) -> None:
    first = workers.run(2, _fit, str(tmp_path / "a"), 4, None)
    for group in range(len(first[0][0])):
        judge([records[group] for records, *_ in first], **SIGNUM)
    assert first[0][1] != first[1][1], "momenta are each worker's own"
    again = workers.run(2, _fit, str(tmp_path / "b"), 4, str(tmp_path / "a" / "checkpoint-2"))
    assert [end for _, end, _ in again] == [end for _, end, _ in first]
    assert not again[0][2] + again[1][2]
    killed = workers.run(2, _fit, str(tmp_path / "k"), 3, str(tmp_path / "a" / "killed-2"))
    assert not killed[0][2]
    (said,) = killed[1][2]
    assert said.startswith("worker 1 of 2 goes on with the momentum of worker 0 of 2, since its own was not saved")
    more = workers.run(3, _fit, str(tmp_path / "c"), 4, str(tmp_path / "a" / "checkpoint-2"))
    for group in range(len(more[0][0])):
        starts = [records[group].start for records, *_ in more]
        assert all((x == y).all() for x, y in zip(starts[0], starts[2], strict=True))
    alone = workers.run(1, _fit, str(tmp_path / "e"), 3, str(tmp_path / "a" / "checkpoint-2"))
    again = workers.run(2, _fit, str(tmp_path / "f"), 4, str(tmp_path / "e" / "checkpoint-3"))
    assert not any(words for _, _, words in (*more, *alone, *again))
    for _, _, words in workers.run(2, _fit, str(tmp_path / "d"), 4, str(tmp_path / "a" / "checkpoint-2"), False):
        (one,) = words
        assert one.startswith("this state holds the momenta of several ranks, of which rank 0's was loaded")
        assert "MajorityVoteCallback(trainer)" in one


def _mistakes(folder: str) -> list[str]:
    from signsgd_lightning import MajorityVoteCallback

    def adam() -> None:
        trainer = _trainer(folder, 1, torch.optim.AdamW)
        trainer.add_callback(MajorityVoteCallback(trainer))
        trainer.train()

    def no_trainer() -> None:
        MajorityVoteCallback(small_net())  # type: ignore[arg-type]

    def no_signum() -> None:
        WorkerStates(torch.optim.AdamW(small_net().parameters()))

    said = []
    for mistake in (adam, no_trainer, no_signum):
        try:
            mistake()
        except TypeError as error:
            said.append(str(error))
    return said


def test_mistakes(tmp_path: Path, workers: Workers) -> None:
    for adam, no_trainer, no_signum in workers.run(2, _mistakes, str(tmp_path)):
        assert adam.startswith("a majority vote needs signsgd_lightning.Signum, optimizer 0 is AdamW: replace it")
        assert no_trainer.startswith("MajorityVoteCallback needs the Trainer that it is added to, got Sequential")
        assert no_signum == (
            "WorkerStates takes a Signum or what takes local steps, got AdamW: call enable_local_steps(model, "
            "optimizer) before WorkerStates(optimizer), or train with Signum"
        )


def test_without_torchrun(tmp_path: Path) -> None:
    from signsgd_lightning import MajorityVoteCallback

    trainer = _trainer(str(tmp_path), 1)
    trainer.add_callback(MajorityVoteCallback(trainer))
    with pytest.raises(RuntimeError, match="this process is alone: start it by torchrun, or leave the callback out"):
        trainer.train()
