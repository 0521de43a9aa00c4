"""`overlap=True`: ballots leave in the backward pass, steps are the specification's, what it excludes is said."""

import gc
import os
import re
import signal
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import invert
from signsgd_lightning import MajorityVoteStrategy, PeerLostError, Signum, VoteMonitor, enable_majority_vote
from tests.votes import set_bucket_size
from tests.workers import Workers, fresh_workers

from .models import Net, Record, judge, record, trainer
from .test_callbacks import Notes

SETTINGS: dict[str, Any] = {"betas": (0.5, 0.75), "weight_decay": 0.25, "verdict_momentum": 0.5}


class Model(nn.Module):
    """Three layers, one tensor frozen, one with a NaN in its gradient at times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 1))
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()  # type: ignore[no-any-return]


def build(overlap: bool = True, view: bool = True, bucket_size: int = 400, **signum: Any) -> Any:
    model = DistributedDataParallel(Model(), gradient_as_bucket_view=view)
    optimizer = Signum(model.parameters(), lr=0.0625, **signum)
    enable_majority_vote(model, optimizer, overlap=overlap)
    set_bucket_size(optimizer, bucket_size)
    return model, optimizer


def batch(t: int, part: int = 0) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * t + 10 * part + dist.get_rank()))
    x[0, 0] = torch.nan if t == 3 and dist.get_rank() == 1 else 1.0
    return x


def _train(view: bool, set_to_none: bool) -> tuple[Record, list[int]]:
    """Six steps of two batches each; return also how many buckets were still to leave after each backward pass."""
    model, optimizer = build(view=view, **SETTINGS)
    (one,) = record(optimizer)
    left = []
    for t in range(6):
        optimizer.zero_grad(set_to_none=set_to_none)
        with model.no_sync():
            model(batch(t)).backward()
        model(batch(t, part=1)).backward()
        left.append(len(optimizer.vote.schedule._begun.waiting))
        assert len(optimizer.vote.schedule._begun.round._sent) > 5
        optimizer.step()
    return one, left


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("view", "set_to_none"), [(True, True), (True, False), (False, True)])
def test_steps_are_those_of_the_specification(size: int, view: bool, set_to_none: bool, workers: Workers) -> None:
    ranks = workers.run(size, _train, view, set_to_none)
    judge([one for one, _ in ranks], **SETTINGS)
    assert all(left == [0] * 6 for _, left in ranks), "ballots waited for step()"


def _clip(model: Any, optimizer: Any) -> None:
    model(batch(0)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


def _scale(model: Any, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch(0))).backward()
    scaler.step(optimizer)


def _twice(model: Any, optimizer: Any) -> None:
    model(batch(0)).backward()
    model(batch(1)).backward()


def _faster(model: Any, optimizer: Any) -> None:
    model(batch(0)).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


def _forgetful(model: Any, optimizer: Any) -> None:
    model(batch(0)).backward()
    next(model.parameters()).grad = None
    optimizer.step()


def _apart(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.5 + dist.get_rank()
    model(batch(0)).backward()


def _refusal(act: Callable[[Any, Any], None]) -> tuple[str, bool]:
    """What was said, and whether a vote of the same ranks works after it."""
    model, optimizer = build()
    try:
        act(model, optimizer)
    except RuntimeError as error:
        (one,) = [error]
        message = str(one)
    else:
        message = "nothing was refused"
    again, optimizer = build()
    again(batch(0)).backward()
    optimizer.step()
    return message, all(bool(p.isfinite().all()) for p in again.parameters())


REFUSED = {
    _clip: r"the gradient of layers\.0\.weight was changed between backward\(\) and step\(\), after it was voted with",
    _scale: r"overlap=True takes gradients as the backward pass leaves them, which a gradient scaler has multiplied",
    _twice: r"a second gradient of layers\.\d\.\w+ came before step\(\), after the first was voted with",
    _faster: r"was changed after the vote had begun, in the backward pass \(group 0: lr=0\.0625\)",
    _forgetful: r"overlap=True needs a gradient for every parameter, layers\.0\.weight has none",
    _apart: r"the ranks disagree and cannot vote: rank 0 has «group 0: lr=0\.5» where rank 1 has «group 0: lr=1\.5»",
}


@pytest.mark.parametrize(("act", "message"), REFUSED.items(), ids=[act.__name__ for act in REFUSED])
def test_what_it_excludes_is_said_on_all_ranks(act: Any, message: str, workers: Workers) -> None:
    for said, works in workers.run(2, _refusal, act):
        assert re.search(message, said), said
        assert works


def _one_overlaps() -> str:
    try:
        build(overlap=dist.get_rank() == 1)
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


def test_all_ranks_overlap_or_none(workers: Workers) -> None:
    for said in workers.run(2, _one_overlaps):
        assert re.search(
            "bucket_size=4194304, overlap=False.* where rank 1 has .*: bucket_size=4194304, overlap=True", said
        )


def _settings_refused(settings: dict[str, Any], ddp: dict[str, Any], optimizers: int) -> str:
    model = DistributedDataParallel(nn.Linear(3, 2), **ddp)
    try:
        enable_majority_vote(
            model, *(Signum([p]) for p in list(model.parameters())[:optimizers]), overlap=True, **settings
        )
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("settings", "ddp", "optimizers", "excluded"),
    [
        ({"vote_between": "nodes"}, {}, 1, "vote_between='nodes'"),
        ({"adversaries": {0: invert}}, {}, 1, "adversaries"),
        ({}, {"find_unused_parameters": True}, 1, "find_unused_parameters=True"),
        ({}, {"static_graph": True}, 1, "static_graph=True"),
        ({}, {}, 2, "2 optimizers"),
    ],
)
def test_settings_that_it_excludes(settings: Any, ddp: Any, optimizers: int, excluded: str, workers: Workers) -> None:
    said = workers.run(2, _settings_refused, settings, ddp, optimizers)
    assert said == [f"overlap=True excludes {excluded}: leave out either"] * 2


def _fit(overlap: bool, settings: dict[str, Any]) -> tuple[Record, list[Any]]:
    model, notes = Net(samples=48, **SETTINGS), Notes()
    strategy = MajorityVoteStrategy(overlap=overlap)
    run = trainer(strategy=strategy, callbacks=[VoteMonitor()], logger=notes, log_every_n_steps=1, **settings)
    run.fit(model)
    return model.records[0], [row for _, row in notes.rows]


def test_trainer(workers: Workers) -> None:
    """With accumulation and bfloat16; the monitor sees what it sees without."""
    settings = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    ours, plain = (workers.run(2, _fit, overlap, settings) for overlap in (True, False))
    judge([one for one, _ in ours], **SETTINGS)
    for (_, metrics), (_, expected) in zip(ours, plain, strict=True):
        assert [_figures(one) for one in metrics] == [_figures(one) for one in expected]
        assert len(metrics) > 1


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name.startswith("vote/") and "seconds" not in name}


def _fit_refused(settings: dict[str, Any]) -> str:
    try:
        _fit(True, settings)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def test_trainer_refuses_clipping_before_the_first_step(workers: Workers) -> None:
    said = workers.run(2, _fit_refused, {"gradient_clip_val": 0.5})
    assert said == ["overlap=True excludes gradient_clip_val: leave out either"] * 2


def _die_in_backward(victim: int) -> int | None:
    model, optimizer = build()
    try:
        for t in range(3):
            if t == 1 and dist.get_rank() == victim:
                middle = model.module.layers[2].weight
                middle.register_hook(lambda g: os.kill(os.getpid(), signal.SIGKILL))
            optimizer.zero_grad()
            model(batch(t)).backward()
            optimizer.step()
    except PeerLostError as error:
        return error.rank
    return None


@pytest.mark.multiprocess
def test_a_rank_that_dies_in_its_backward_pass_is_named() -> None:
    with fresh_workers(3) as workers:
        ends = workers.run(3, _die_in_backward, 1, lost=(1,), group_timeout=6.0, timeout=40)
    assert [ends[0], ends[2]] == [1, 1]


def _what_is_left() -> bool:
    model, optimizer = build()
    exchange = weakref.ref(optimizer.vote)
    parameters = list(model.parameters())
    del model, optimizer
    gc.collect()
    parameters[0].sum().backward()  # its hook finds nobody
    return exchange() is None


def test_parameters_do_not_keep_the_exchange_alive(workers: Workers) -> None:
    assert workers.run(2, _what_is_left) == [True, True]
