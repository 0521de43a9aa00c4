"""State that is not this optimizer's, or not this rank's: refused before anything changes, or said in a warning."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lion_pytorch import Lion
from torch import nn
from torch.distributed.checkpoint import load, save  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signsgd_lightning import Signum, enable_majority_vote, gather_state, scatter_state
from tests.workers import Workers

from .models import Net, small_net, trainer

OTHERS: dict[str, tuple[Any, str]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.3), "Adam or AdamW"),
    "Adam, capturable": (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.3)), "Adam or AdamW"),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), "SGD"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.3), "RMSprop"),
    "Muon": (lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.3), "Muon"),
    "Lion": (lambda p: Lion(p, lr=0.3), "an optimizer with the settings betas, lr, weight_decay"),
}
REMEDY = (
    ", not of Signum: load the weights alone and let the momentum start anew. Leave out optimizer.load_state_dict; in "
    "Lightning load the model by load_from_checkpoint(path) and call fit without ckpt_path"
)


def _step(net: nn.Module, optimizer: Optimizer) -> None:
    net.zero_grad()
    torch.autograd.backward(net(torch.ones(2, 4)).sum())
    optimizer.step()


@pytest.mark.parametrize("way", [Signum.load_state_dict, scatter_state])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_optimizers_state_is_refused_before_anything_changes(kind: str, way: Any) -> None:
    build, called = OTHERS[kind]
    net = small_net()
    other = build(list(net.parameters()))
    _step(net, other)
    optimizer = Signum(net.parameters(), lr=0.01, betas=(0.5, 0.5))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=".") as error:
        way(optimizer, other.state_dict())
    assert str(error.value) == f"this is the state of {called}{REMEDY}"
    assert optimizer.state_dict() == before
    _step(net, optimizer)
    assert optimizer.t == 1


def test_what_is_no_optimizers_state_is_refused() -> None:
    optimizer = Signum([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="this is no state of Signum: it has no 'state', only 'net.weight'"):
        optimizer.load_state_dict({"net.weight": torch.ones(1)})


class _Adam(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


class _Emptied(Net):
    """Throws the optimizer's state away, as Lightning's users do who change optimizers."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []


class _OneMore(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        raise AssertionError("it was to be refused")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = Signum(self.net.parameters())
        checkpoint["optimizer_states"] = [own.state_dict()]

    def configure_optimizers(self) -> Any:
        return [Signum(layer.parameters()) for layer in (self.net[0], self.net[2])]


def _resumed(folder: str, module: type[Net]) -> tuple[str, bool]:
    """Resume a run of AdamW under a vote; return the error and whether the weights were changed by then."""
    path = f"{folder}/adam.ckpt"
    saver = ModelCheckpoint(dirpath=folder, filename="adam")
    trainer(strategy="ddp", callbacks=[saver], enable_checkpointing=True).fit(_Adam())
    model = module()
    before = [p.detach().clone() for p in model.parameters()]
    run = trainer(max_epochs=2)
    try:
        run.fit(model, ckpt_path=path)
    except ValueError as error:
        return str(error), any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return f"{run.global_step} steps", True


def test_a_run_of_another_optimizer_is_not_resumed(workers: Workers, tmp_path: Path) -> None:
    refused = (f"this is the state of Adam or AdamW{REMEDY}", False)
    assert workers.run(2, _resumed, str(tmp_path), Net) == [refused] * 2
    assert workers.run(2, _resumed, str(tmp_path), _Emptied) == [("8 steps", True)] * 2
    ((message, _), _) = workers.run(2, _resumed, str(tmp_path), _OneMore)
    assert message.startswith("the checkpoint has the states of 1 optimizers, and 2 are to go on: return as many")


def _weights_alone(folder: str) -> int:
    """The remedy."""
    saver = ModelCheckpoint(dirpath=folder, filename="adam")
    trainer(strategy="ddp", callbacks=[saver], enable_checkpointing=True).fit(_Adam())
    run = trainer()
    run.fit(Net.load_from_checkpoint(f"{folder}/adam.ckpt", weights_only=False))
    return run.global_step


def test_the_weights_alone_can_be_loaded(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, _weights_alone, str(tmp_path)) == [4, 4]


def _voter(betas: tuple[float, float] = (0.5, 0.5)) -> tuple[Any, Signum]:
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    optimizer = Signum(model.parameters(), lr=0.125, betas=betas)
    enable_majority_vote(model, optimizer)
    for t in range(2):
        optimizer.zero_grad()
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * t + dist.get_rank()))
        model(x).square().sum().backward()
        optimizer.step()
    return model, optimizer


def _reload(way: str, betas: tuple[float, float], folder: str) -> list[str]:
    """Save and load in a way, into a new optimizer that votes; return the warnings."""
    model, optimizer = _voter(betas)
    state: Any = [optimizer.state_dict()]
    if way == "rank 0's":  # as Accelerate and Trainer save
        dist.broadcast_object_list(state, 0)
    if way == "gathered":
        state = [gather_state(optimizer)]
        dist.broadcast_object_list(state, 0)
    if way == "by torch":
        weights, mine = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": mine}, checkpoint_id=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer = _voter(betas)
        if way == "by torch":
            weights, mine = get_state_dict(model, optimizer)
            loaded: dict[str, Any] = {"model": weights, "optimizer": mine}
            load(loaded, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        elif way == "before the vote":
            dist.broadcast_object_list(state, 0)
            model = DistributedDataParallel(small_net())
            optimizer = Signum(model.parameters(), lr=0.125, betas=betas)
            optimizer.load_state_dict(state[0])
            enable_majority_vote(model, optimizer)
        elif way in ("gathered", "scattered"):
            if way == "scattered":
                dist.broadcast_object_list(state, 0)
            scatter_state(optimizer, state[0])
        else:
            optimizer.load_state_dict(state[0])
    return [str(w.message) for w in caught if "goes on with the momentum" in str(w.message)]


def _expected(rank: int, whose: str) -> str:
    return (
        f"worker {rank} of 2 goes on with the momentum of {whose}, since its own was not saved: save what "
        "signsgd_lightning.gather_state(optimizer) returns, and load it on every rank by scatter_state(optimizer, "
        "state); in Lightning trainer.save_checkpoint and fit(ckpt_path=…) do that, in Accelerate "
        "accelerator.register_for_checkpointing(WorkerStates(optimizer)), in Hugging Face's Trainer "
        "MajorityVoteCallback(trainer); of a run that was killed within a save take an older checkpoint"
    )


@pytest.mark.parametrize("way", ["each its own", "rank 0's", "before the vote", "scattered", "gathered", "by torch"])
def test_momenta_that_were_lost_are_named(way: str, workers: Workers, tmp_path: Path) -> None:
    lost = [[], [_expected(1, "worker 0 of 2")]]
    if way == "by torch":
        lost = [[_expected(rank, "some worker")] for rank in range(2)]
    if way in ("each its own", "gathered"):
        lost = [[], []]
    assert workers.run(2, _reload, way, (0.5, 0.5), str(tmp_path)) == lost
    assert workers.run(2, _reload, way, (0.0, 0.0), str(tmp_path / "no momenta")) == [[], []]


def test_a_state_of_one_worker_is_no_loss(workers: Workers) -> None:
    assert workers.run(2, _from_one) == [[], []]


def _from_one() -> list[str]:
    net = small_net()
    alone = Signum(net.parameters(), lr=0.125)
    _step(net, alone)
    _, optimizer = _voter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(alone.state_dict())
    return [str(w.message) for w in caught]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"betas": (0.0, 0.0)},
    {"betas": (0.0, 0.0), "verdict_momentum": 0.5},
    {"betas": (0.5, 0.25), "verdict_momentum": 0.5, "zeros": "alternate"},
    {"betas": (0.5, 0.5), "weight_decay": 0.5, "lr": torch.tensor(0.25)},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("steps", [0, 3])
def test_torchs_dummy_step_changes_nothing(settings: dict[str, Any], steps: int) -> None:
    """It steps with zeros to make the state; without a state of one's own it does so at any time."""
    net = small_net()
    optimizer = Signum(net.parameters(), **{"lr": 0.25, **settings})
    for _ in range(steps):
        _step(net, optimizer)
    optimizer.zero_grad()
    weights = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    saved = get_optimizer_state_dict(net, optimizer)
    assert optimizer.t == steps
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])
    for entry in optimizer.state.values():
        assert steps or all(not value.any() for value in entry.values())
    if steps and state:
        assert str(optimizer.state_dict()["state"]) == str(state)
    twin_net = copy.deepcopy(net)
    twin = Signum(twin_net.parameters(), **{"lr": 0.25, **settings})
    set_optimizer_state_dict(twin_net, twin, saved)
    assert twin.t == steps
    for each in (net, twin_net):
        _step(each, optimizer if each is net else twin)
    for p, q in zip(net.parameters(), twin_net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_with_a_rate_of_zero_is_a_step() -> None:
    """As at the beginning of a warmup: it counts and enters the momentum."""
    p = nn.Parameter(torch.ones(2))
    optimizer = Signum([p], lr=0.0, betas=(0.5, 0.5))
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert optimizer.t == 1
    assert optimizer.state[p]["momentum"].tolist() == [0.5, 0.0]
    p.grad = torch.zeros(2)
    other = Signum([p], lr=0.0)
    other.step()
    assert other.t == 1


def _dummy_under_a_vote() -> tuple[int, int]:
    """Rank 0 alone asks for the state, and loads it: nobody votes."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net())
    optimizer = Signum(model.parameters(), lr=0.125, betas=(0.0, 0.0))
    enable_majority_vote(model, optimizer)
    assert optimizer.vote is not None
    sent = optimizer.vote.topology.workers.sent_bytes
    if dist.get_rank() == 0:
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    return optimizer.t, optimizer.vote.topology.workers.sent_bytes - sent


def test_torchs_dummy_step_does_not_vote(workers: Workers) -> None:
    assert workers.run(2, _dummy_under_a_vote, group_timeout=5) == [(0, 0), (0, 0)]
