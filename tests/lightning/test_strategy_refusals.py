"""What a Trainer refuses before the first step, on every rank, and what it says."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from signsgd_lightning import MajorityVoteStrategy, Signum
from tests.workers import Workers

from .models import Net, array, judge, trainer


def _disagreement(first: str, second: str) -> str:
    return (
        f"RuntimeError: the ranks disagree and cannot vote: rank 0 has «{first}» where rank 1 has «{second}». Build "
        "the same model and the same optimizer, with the same settings, on every rank."
    )


class _Embedding(Net):
    def __init__(self) -> None:
        super().__init__(lambda: nn.ModuleDict({"words": nn.Embedding(5, 4, sparse=True), "out": nn.Linear(4, 1)}))


class _Optimized(Net):
    """With other optimizers than `Signum` alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        if self.kind == "foreign":
            self.elsewhere = [nn.Parameter(torch.ones(1))]
            return Signum([*self.parameters(), *self.elsewhere])
        return torch.optim.AdamW(self.parameters())


class _Different(Net):
    """Rank 1 is built otherwise."""

    def __init__(self, kind: str) -> None:
        odd = dist.get_rank() == 1
        hidden = 7 if odd and kind == "size" else 6
        dtype = torch.float64 if odd and kind == "dtype" else torch.float32
        layers = [
            nn.Linear(4, hidden),
            nn.Linear(hidden, 1, dtype=dtype),
            *[nn.Linear(1, 1)] * (odd and kind == "number"),
        ]
        super().__init__(lambda: nn.Sequential(*layers), betas=(0.5, 0.5) if odd and kind == "betas" else (0.9, 0.9))


MODELS: dict[str, tuple[Any, str]] = {
    "other class": (
        partial(_Optimized, "AdamW"),
        "TypeError: a majority vote needs signsgd_lightning.Signum, optimizer 0 is AdamW: replace it, or train with "
        "plain DDP (in Lightning: strategy='ddp')",
    ),
    "foreign parameter": (
        partial(_Optimized, "foreign"),
        "ValueError: optimizer 0 holds parameters that are not the model's: 1, the first of shape (1,). Let the model "
        "have them, as a parameter or submodule; or, if they are another model's, make one optimizer for each model "
        "and enable each with its own",
    ),
    "sparse embedding": (
        _Embedding,
        "ValueError: net.words (Embedding) has sparse gradients, which cannot vote; use sparse=False",
    ),
    "betas": (
        partial(_Different, "betas"),
        _disagreement("group 0: betas=(0.9, 0.9)", "group 0: betas=(0.5, 0.5)"),
    ),
    "size of a parameter": (
        partial(_Different, "size"),
        _disagreement("net.0.weight: shape (6, 4), torch.float32", "net.0.weight: shape (7, 4), torch.float32"),
    ),
    "number of parameters": (
        partial(_Different, "number"),
        _disagreement("nothing", "net.2.weight: shape (1, 1), torch.float32"),
    ),
    "dtype of a parameter": (
        partial(_Different, "dtype"),
        _disagreement("net.1.weight: shape (1, 6), torch.float32", "net.1.weight: shape (1, 6), torch.float64"),
    ),
}


def _refused(build: Any) -> tuple[str, int]:
    model: LightningModule = build()
    run = trainer()
    try:
        run.fit(model)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", run.global_step
    return "no error", run.global_step


@pytest.mark.parametrize("kind", MODELS)
def test_refused_before_the_first_step(kind: str, workers: Workers) -> None:
    build, message = MODELS[kind]
    assert workers.run(2, _refused, build) == [(message, 0)] * 2


@pytest.mark.parametrize("name", ["ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper"])
def test_communication_hooks_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^a majority vote takes the place of a communication hook; leave out {name}$"
    ):
        MajorityVoteStrategy(**dict[str, Any]({name: default_hooks.fp16_compress_hook}))
    assert MajorityVoteStrategy(**dict[str, Any]({name: None})).strategy_name == "majority_vote"


class _Wavering(Net):
    """Rank 1 changes its learning rate after the third step."""

    def on_train_batch_start(self, batch: list[Tensor], index: int) -> None:
        if index == 3:
            optimizer: Any = self.optimizers()
            optimizer.param_groups[0]["lr"] *= 1 + dist.get_rank()
            self.before = [array(p) for p in self.parameters()]


def _wavers() -> tuple[str, list[bytes], list[bytes], list[Any]]:
    model = _Wavering()
    message, _ = _refused(lambda: model)
    after = [array(p).tobytes() for p in model.parameters()]
    return message, [x.tobytes() for x in model.before], after, model.records


def test_a_rank_that_changes_its_learning_rate_midway(workers: Workers) -> None:
    ranks = workers.run(2, _wavers)
    for message, before, after, _ in ranks:
        assert message == _disagreement("group 0: lr=0.03125", "group 0: lr=0.0625")
        assert before == after
    judge([records[0] for *_, records in ranks])
    assert len(ranks[0][3][0].parameters) == 3


class _None(Net):
    def configure_optimizers(self) -> Any:
        return None


class _Branch(Net):
    """Leaves its first layer out."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.net[2](torch.ones(1, 6)).sum()
        return loss


def test_no_optimizer(workers: Workers) -> None:
    message = "ValueError: enable_majority_vote needs the optimizers that are to vote, got none"
    assert workers.run(2, _refused, _None) == [(message, 0)] * 2


def test_unused_parameters_name_the_strategy_that_allows_them(workers: Workers) -> None:
    for message, _ in workers.run(2, _refused, _Branch):
        assert "majority_vote_find_unused_parameters_true" in message
        assert "'ddp_find" not in message
        assert "=DDPStrategy" not in message


class _Lazy(Net):
    def __init__(self) -> None:
        super().__init__(lambda: nn.LazyLinear(1))


class _Empty(Net):
    """Nothing to train."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)

    def configure_optimizers(self) -> Any:
        return None


def test_models_that_ddp_refuses_are_refused_with_ddps_own_words(workers: Workers) -> None:
    assert all("DistributedDataParallel is not needed" in message for message, _ in workers.run(2, _refused, _Empty))
    assert all("uninitialized parameters can't be used" in message for message, _ in workers.run(2, _refused, _Lazy))
