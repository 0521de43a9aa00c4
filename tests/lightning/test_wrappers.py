"""No rank steps alone without a word: wrapped optimizers are seen through, others on a model that votes are refused."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from signsgd_lightning import (
    GeometryMonitor,
    MajorityVoteStrategy,
    Signum,
    VoteMonitor,
    enable_majority_vote,
    gather_state,
    scatter_state,
)
from signsgd_lightning.optimizer import find_signum
from tests.workers import Workers

from .models import Net, judge, record, small_net, trainer


class Holder:
    """As Accelerate's: an optimizer of no class of torch's, which holds another."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Lookalike:
    """Passes for an instance of what it holds, where nobody can find that."""

    def __init__(self, optimizer: Any) -> None:
        self._hidden = optimizer
        self.__class__ = type("Lookalike", (Lookalike, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hidden, name)


def _fabrics(optimizer: Any) -> Any:
    return _FabricOptimizer(optimizer, SingleDeviceStrategy())


WRAPPERS: dict[str, Any] = {
    "Lightning's": LightningOptimizer,
    "Fabric's": _fabrics,
    "Accelerate's": Holder,
    "one in another": lambda optimizer: Holder(LightningOptimizer(_fabrics(optimizer))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_seen_through(wrap: Any) -> None:
    optimizer = Signum([nn.Parameter(torch.ones(1))])
    assert find_signum(wrap(optimizer)) is optimizer


def test_what_cannot_be_seen_through_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(
        TypeError, match="optimizer 1 is a Lookalike that looks like a Signum and holds one where it can"
    ):
        find_signum(Lookalike(Signum([parameter])), 1)
    with pytest.raises(TypeError, match="needs signsgd_lightning.Signum, optimizer 0 is AdamW: replace it"):
        find_signum(Holder(torch.optim.AdamW([parameter])))
    itself = Holder(None)
    itself.optimizer = itself
    with pytest.raises(TypeError, match="optimizer 0 is Holder"):
        find_signum(itself)


def test_state_is_loaded_into_what_is_wrapped() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = Signum([parameter])
    optimizer.param_groups[0]["step"] = 5
    state, other = optimizer.state_dict(), Signum([parameter])
    LightningOptimizer(other).load_state_dict(state)
    assert other.t == 5


def _backward(model: nn.Module, t: int) -> None:
    model.zero_grad()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))
    model(x).square().sum().backward()


def _enabled_by_wrapper(name: str) -> tuple[list[Any], bool, list[str]]:
    """Enable, gather and scatter through a wrapper; return the records, what came back, what the state holds."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    optimizer = Signum(model.parameters(), lr=0.125, betas=(0.5, 0.5))
    records, wrapped = record(optimizer), WRAPPERS[name](optimizer)
    enable_majority_vote(model, wrapped)
    assert wrapped.zeros == optimizer.zeros == "alternate"
    assert wrapped.vote is optimizer.vote
    for t in range(3):
        _backward(model, t)
        optimizer.step()
    kept = [entry["momentum"].clone() for entry in optimizer.state.values()]
    state = gather_state(wrapped)
    everybodys = [copy.deepcopy(state)]
    dist.broadcast_object_list(everybodys, 0)
    for entry in optimizer.state.values():
        entry["momentum"].zero_()
    scatter_state(wrapped, everybodys[0])
    back = all(torch.equal(e["momentum"], m) for e, m in zip(optimizer.state.values(), kept, strict=True))
    return records, back, sorted(everybodys[0])


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_votes_saves_and_loads(name: str, workers: Workers) -> None:
    ranks = workers.run(2, _enabled_by_wrapper, name)
    judge([records[0] for records, *_ in ranks], betas=(0.5, 0.5))
    for _, back, held in ranks:
        assert back
        assert held == ["param_groups", "state", "state_of_other_workers"]


class _Returned(Net):
    """Hands Lightning an optimizer that is wrapped already."""

    def configure_optimizers(self) -> Any:
        return LightningOptimizer(super().configure_optimizers())


def _monitored() -> tuple[list[Any], dict[str, float]]:
    model = _Returned(betas=(0.5, 0.5))
    monitors = [VoteMonitor(), GeometryMonitor(every_n_steps=4, samples=3, directory=None)]
    run = trainer(callbacks=monitors, log_every_n_steps=2)
    run.fit(model)
    return model.records, {name: float(value) for name, value in run.callback_metrics.items()}


def test_monitors_see_through_wrappers(workers: Workers) -> None:
    ranks = workers.run(2, _monitored)
    judge([records[0] for records, _ in ranks], betas=(0.5, 0.5))
    assert any(name.startswith("vote/") for name in ranks[0][1])
    assert any(name.startswith("geometry/") for name in ranks[0][1])


def _another_optimizer(kind: str) -> tuple[str, bool]:
    """Step once more, by an optimizer that was not enabled; return the error and whether anything moved."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    good = Signum(model.module[0].parameters(), lr=0.1)
    enable_majority_vote(model, good)
    _backward(model, 0)
    good.step()
    rest = model.module[2].parameters()
    other = Signum(rest, lr=0.1) if kind == "Signum" else torch.optim.AdamW(rest, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        other.step()
    except RuntimeError as error:
        return str(error), any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return "no error", True


@pytest.mark.parametrize("kind", ["Signum", "AdamW"])
def test_no_other_optimizer_steps_on_a_model_that_votes(kind: str, workers: Workers) -> None:
    for message, moved in workers.run(2, _another_optimizer, kind):
        assert message.startswith(f"{kind} steps on parameters of a model that votes, and has no vote: ")
        assert not moved


def _enabled_later() -> list[Any]:
    """The optimizer is replaced midway, and the new one enabled with the same model."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    records = []
    for t in range(2):
        optimizer = Signum(model.parameters(), lr=0.125, betas=(0.5, 0.5))
        enable_majority_vote(model, optimizer)
        records += record(optimizer)
        _backward(model, t)
        optimizer.step()
    return records


def test_an_optimizer_may_be_replaced(workers: Workers) -> None:
    ranks = workers.run(2, _enabled_later)
    for k in range(2):
        judge([records[k] for records in ranks], betas=(0.5, 0.5))


def _two_models(shared: bool) -> str:
    first, second = (DistributedDataParallel(nn.Linear(4, 1)) for _ in range(2))
    if shared:
        both = Signum([*first.parameters(), *second.parameters()])
        try:
            enable_majority_vote(first, both)
        except ValueError as error:
            return str(error)
    optimizers = [Signum(model.parameters(), lr=0.1) for model in (first, second)]
    for model, optimizer in zip((first, second), optimizers, strict=True):
        enable_majority_vote(model, optimizer)
    first(second(torch.randn(2, 4)).expand(2, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return "no error"


def test_one_optimizer_of_two_models_is_refused_for_the_reason_that_it_is(workers: Workers) -> None:
    for message in workers.run(2, _two_models, True):
        assert message == (
            "optimizer 0 holds parameters that are not the model's: 2, the first of shape (1, 4). Let the model have "
            "them, as a parameter or submodule; or, if they are another model's, make one optimizer for each model and "
            "enable each with its own"
        )
    assert workers.run(2, _two_models, False) == ["no error"] * 2  # the remedy


def _hooks_after_fits(overlap: bool) -> list[int]:
    """Fit a model three times; return how many hooks its parameters and torch have more after each."""
    model, counts, before = Net(samples=8), [], set(_global_optimizer_pre_hooks)  # those of other tests' garbage
    for _ in range(3):
        run = trainer(strategy=MajorityVoteStrategy(overlap=overlap, find_unused_parameters=not overlap))
        run.fit(model)
        model.trainer = None
        del run
        gc.collect()
        hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
        counts.append(sum(hooks) + len(set(_global_optimizer_pre_hooks) - before))
    return counts


@pytest.mark.parametrize("overlap", [False, True])
def test_hooks_go_when_the_vote_ends(overlap: bool, workers: Workers) -> None:
    for counts in workers.run(2, _hooks_after_fits, overlap):
        assert counts == [0, 0, 0]


def _collected_in_a_step() -> int:
    """A model that nobody holds any more is collected while torch goes through the hooks of another's step."""

    def collect(*_: Any) -> None:
        gc.collect()

    before = set(_global_optimizer_pre_hooks)
    gc.disable()
    handle = register_optimizer_step_pre_hook(collect)
    model = small_net()
    object.__setattr__(model, "itself", model)  # so that it goes when the collector comes
    enable_majority_vote(model, Signum(model.parameters()))
    del model
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()
    handle.remove()
    gc.enable()
    again = small_net()
    enable_majority_vote(again, Signum(again.parameters()))
    return len(set(_global_optimizer_pre_hooks) - before)


def test_a_model_that_is_collected_during_a_step(workers: Workers) -> None:
    assert workers.run(2, _collected_in_a_step) == [1, 1], "the first one's hook is gone, too"


def _afterwards() -> float:
    """Train by votes, then the same module by plain DDP and AdamW in the same process, as notebooks do."""
    model = Net(samples=8)
    run = trainer()
    run.fit(model)
    ddp = DistributedDataParallel(model.net)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    ddp(torch.ones(2, 4) * dist.get_rank()).sum().backward()
    optimizer.step()
    return float(sum(p.detach().double().sum() for p in ddp.parameters()))


def test_other_optimizers_may_step_after_a_fit(workers: Workers) -> None:
    first, second = workers.run(2, _afterwards)
    assert first == second
