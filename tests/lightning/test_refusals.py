"""What cannot vote is refused with a sentence: wrong uses, and ranks that do not agree, at the start and midway."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.wire import WIRE_VERSION
from signsgd_lightning import Signum, enable, enable_majority_vote
from signsgd_lightning.vote import vote
from tests.workers import Workers

from .models import judge, record, small_net

FIRST = "0.weight: shape (6, 4), torch.float32"
AT_START: dict[str, tuple[str, str]] = {
    "lr": ("group 0: lr=0.125", "group 0: lr=0.25"),
    "betas": ("group 0: betas=(0.5, 0.5)", "group 0: betas=(0.5, 0.25)"),
    "weight_decay": ("group 0: weight_decay=0.0", "group 0: weight_decay=0.5"),
    "verdict_momentum": ("group 0: verdict_momentum=0.0", "group 0: verdict_momentum=0.5"),
    "warmup_steps": ("group 0: warmup_steps=0", "group 0: warmup_steps=3"),
    "maximize": ("group 0: maximize=False", "group 0: maximize=True"),
    "zeros": ("zeros='alternate'", "zeros='abstain'"),
    "step": ("group 0: step=0", "group 0: step=7"),
    "order": (FIRST, "2.bias: shape (1,), torch.float32"),
    "fewer parameters": ("2.bias: shape (1,), torch.float32", "nothing"),
    "more groups": (FIRST, "group 1: lr=0.125"),
    "names": (FIRST, "a.weight: shape (6, 4), torch.float32"),
    "wire version": (f"wire version {WIRE_VERSION}", f"wire version {WIRE_VERSION + 1}"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.25},
    "betas": {"betas": (0.5, 0.25)},
    "weight_decay": {"weight_decay": 0.5},
    "verdict_momentum": {"verdict_momentum": 0.5},
    "warmup_steps": {"warmup_steps": 3},
    "maximize": {"maximize": True},
    "zeros": {"zeros": "abstain"},
}


def _disagreement(first: str, rank: int, second: str) -> str:
    return (
        f"the ranks disagree and cannot vote: rank 0 has «{first}» where rank {rank} has «{second}». Build the same "
        "model and the same optimizer, with the same settings, on every rank."
    )


def _optimizer(model: nn.Module, differs: str) -> Signum:
    parameters: list[Any] = list(model.parameters())
    if differs == "order":
        parameters.reverse()
    if differs == "fewer parameters":
        parameters.pop()
    if differs == "more groups":
        parameters = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    return Signum(parameters, **{"lr": 0.125, "betas": (0.5, 0.5), **SETTINGS.get(differs, {})})


def _enable(kind: str, odd: int) -> tuple[str, bool]:
    """Build everything the same, but on rank `odd`; return the error and whether anything was changed by it."""
    differs = kind if dist.get_rank() == odd else ""
    net = small_net()
    if differs == "names":
        net = nn.Sequential(OrderedDict(zip("abc", net.children(), strict=True)))
    model = DistributedDataParallel(net)
    optimizer = _optimizer(model, differs)
    if differs == "step":
        optimizer.param_groups[0]["step"] = 7
    vote.WIRE_VERSION = WIRE_VERSION + (differs == "wire version")  # type: ignore[attr-defined]
    before = _snapshot(optimizer)
    try:
        enable_majority_vote(model, optimizer)
    except RuntimeError as error:
        return str(error), before != _snapshot(optimizer)
    finally:
        vote.WIRE_VERSION = WIRE_VERSION  # type: ignore[attr-defined]
    return "no error", False


def _snapshot(optimizer: Signum) -> list[Any]:
    """Parameters, momenta and settings, bit for bit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        k: [(name, m.numpy().tobytes()) for name, m in optimizer.state[p].items()]
        for k, p in enumerate(parameters)
        if p in optimizer.state
    }
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return [[p.detach().numpy().tobytes() for p in parameters], state, groups]


@pytest.mark.parametrize("kind", AT_START)
def test_ranks_that_differ_at_the_start(kind: str, workers: Workers) -> None:
    assert workers.run(2, _enable, kind, 1) == [(_disagreement(AT_START[kind][0], 1, AT_START[kind][1]), False)] * 2


def test_the_rank_that_differs_is_named(workers: Workers) -> None:
    first, second = AT_START["betas"]
    assert workers.run(3, _enable, "betas", 2) == [(_disagreement(first, 2, second), False)] * 3
    assert workers.run(3, _enable, "betas", 0) == [(_disagreement(second, 1, first), False)] * 3


def _backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * seed + dist.get_rank()))
    model(x).square().sum().backward()


def _midway(name: str, value: Any) -> tuple[str, bool, list[Any]]:
    """Three good steps; a fourth at which rank 1 differs; then it mends its ways and all go on."""
    enable._enabled = 0
    model = DistributedDataParallel(small_net())
    optimizer = _optimizer(model, "")
    enable_majority_vote(model, optimizer)
    records = record(optimizer)
    assert optimizer.vote is not None
    settings: Any = optimizer.param_groups[0]
    if name == "bucket_size":
        settings = optimizer.vote.options.__dict__
    for t in range(3):
        _backward(model, t)
        optimizer.step()
    good = settings[name]
    if dist.get_rank() == 1:
        settings[name] = value
    _backward(model, 3)
    before = _snapshot(optimizer)
    try:
        optimizer.step()
    except RuntimeError as error:
        message, changed = str(error), before != _snapshot(optimizer)
    settings[name] = good
    optimizer.step()
    return message, changed, list(records)


@pytest.mark.parametrize(
    ("name", "value", "first", "second"),
    [
        ("lr", 0.25, "group 0: lr=0.125", "group 0: lr=0.25"),
        ("lr", torch.tensor(0.5), "group 0: lr=0.125", "group 0: lr=0.5"),
        ("betas", (0.5, 0.25), "group 0: betas=(0.5, 0.5)", "group 0: betas=(0.5, 0.25)"),
        ("zeros", "positive", "zeros='alternate'", "zeros='positive'"),
        ("step", 2, "group 0: step=3", "group 0: step=2"),
        (
            "bucket_size",
            640,
            "optimizer 0 of model 0: bucket_size=4194304, overlap=False",
            "optimizer 0 of model 0: bucket_size=640, overlap=False",
        ),
    ],
)
def test_ranks_that_differ_midway(name: str, value: Any, first: str, second: str, workers: Workers) -> None:
    ranks = workers.run(2, _midway, name, value)
    for message, changed, _ in ranks:
        assert message == _disagreement(first, 1, second)
        assert not changed
    judge([records[0] for *_, records in ranks], betas=(0.5, 0.5))
    assert len(ranks[0][2][0].parameters) == 4


def _one_optimizer_less() -> str:
    model = DistributedDataParallel(small_net())
    optimizers = [Signum(layer.parameters()) for layer in (model.module[0], model.module[2])]
    try:
        enable_majority_vote(model, *optimizers[: 2 - dist.get_rank()])
        _backward(model, 0)
        optimizers[0].step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_numbers_of_optimizers(workers: Workers) -> None:
    message = _disagreement("optimizers: 2", 1, "optimizers: 1")
    assert workers.run(2, _one_optimizer_less, group_timeout=10) == [message] * 2


def _misuse(kind: str) -> tuple[str, str]:
    """Misuse it, then use the same model well, twice."""
    net = nn.Sequential(nn.EmbeddingBag(5, 4, sparse=True, mode="sum"), nn.Linear(4, 1))
    ddp = DistributedDataParallel(net if kind == "sparse" else small_net())
    good = Signum(ddp.parameters())
    foreign = Signum([*ddp.parameters(), nn.Parameter(torch.ones(1))])
    unmade = nn.Linear(2, 1, device="meta")
    arguments: dict[str, tuple[Any, ...]] = {
        "no model": (good,),
        "no optimizer": (ddp,),
        "other class": (ddp, good, torch.optim.AdamW(ddp.parameters())),
        "foreign parameter": (ddp, foreign),
        "meta": (unmade, Signum(unmade.parameters())),
        "sparse": (ddp, good),
    }
    try:
        enable_majority_vote(*arguments[kind])
    except (TypeError, ValueError) as error:
        refused = type(error).__name__, str(error)
    if kind == "sparse":
        net[0].sparse = False  # type: ignore[assignment]
    enable_majority_vote(ddp, good)
    enable_majority_vote(ddp, good)
    return refused


MISUSES = {
    "no model": "TypeError: enable_majority_vote takes a model first, a torch.nn.Module, got Signum",
    "no optimizer": "ValueError: enable_majority_vote needs the optimizers that are to vote, got none",
    "other class": "TypeError: a majority vote needs signsgd_lightning.Signum, optimizer 1 is AdamW: replace it, or "
    "train with plain DDP (in Lightning: strategy='ddp')",
    "foreign parameter": "ValueError: optimizer 0 holds parameters that are not the model's: 1, the first of shape "
    "(1,). Let the model have them, as a parameter or submodule; or, if they are another model's, make one optimizer "
    "for each model and enable each with its own",
    "meta": "ValueError: optimizer 0 has parameters without values, on the meta device: materialize the model first, "
    "by to_empty and then its initial values or a checkpoint's, and make the optimizer of what that leaves",
    "sparse": "ValueError: 0 (EmbeddingBag) has sparse gradients, which cannot vote; use sparse=False",
}


@pytest.mark.parametrize("kind", MISUSES)
def test_misuse(kind: str, workers: Workers) -> None:
    for name, message in workers.run(2, _misuse, kind):
        assert f"{name}: {message}" == MISUSES[kind]


def _uneven(early: bool, enable: bool) -> str:
    """Train in DDP's own context for ranks that have different numbers of batches; return the error."""
    model = DistributedDataParallel(small_net())
    optimizer = Signum(model.parameters(), lr=0.1)
    enable_majority_vote(model, optimizer)
    try:
        with model.join(enable=enable, throw_on_early_termination=early):
            for t in range(5 if dist.get_rank() == 0 and enable else 3):
                _backward(model, t)
                optimizer.step()
    except RuntimeError as error:
        return f"step {optimizer.t}: {error}"
    return f"step {optimizer.t}"


def test_join_is_refused_at_the_first_vote(workers: Workers) -> None:
    for message in workers.run(2, _uneven, False, True, group_timeout=10):
        assert message.startswith(
            "step 0: DDP.join() cannot be used with a majority vote: a rank that is through would "
        )
    first, second = workers.run(2, _uneven, True, True, group_timeout=10)  # torch's own error, on all ranks at once
    assert first == "step 3: Detected at least one rank that exhausted inputs. Throwing across all ranks."
    assert second == "step 3: Rank 1 exhausted all inputs."
    assert workers.run(2, _uneven, False, False, group_timeout=10) == ["step 3"] * 2


def _hooked() -> str:
    model = DistributedDataParallel(small_net())
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    try:
        enable_majority_vote(model, Signum(model.parameters()))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_another_communication_hook_is_refused(workers: Workers) -> None:
    for message in workers.run(2, _hooked):
        assert message.startswith("a majority vote takes the place of DDP's communication hook, and this model has one")
