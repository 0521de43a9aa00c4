"""Documented uses that trained wrongly, or ended without a sentence: right, or refused by name."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from signsgd_lightning import PeerLostError, RanksDifferError, Signum, enable_majority_vote, kernels
from signsgd_lightning.checkpoint.sharded import load_shards, save_shards
from signsgd_lightning.vote.transport import Message
from tests.workers import Workers, fresh_workers

from .models import judge, record, small_net

SIGNUM: dict[str, Any] = {"lr": 0.125, "betas": (0.5, 0.5)}


def _net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return small_net()


def _backward(model: nn.Module, t: int, rank: int | None = None) -> None:
    model.zero_grad()
    seed = 100 * t + (dist.get_rank() if rank is None else rank)
    model(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


def _voter(model: nn.Module | None = None, **options: Any) -> tuple[DistributedDataParallel, Signum]:
    ddp = DistributedDataParallel(_net() if model is None else model)
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer, **options)
    return ddp, optimizer


def _told(action: Callable[[], object]) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# What torch takes for a default


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["native", "NumPy", "tensor operations"])
def test_torchs_default_dtype(default: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters that no compiled loop takes: another dtype, or not row-major."""
    others = {"NumPy": kernels.NumpyKernel(), "tensor operations": kernels.DeviceKernel()}
    if kernel in others:
        monkeypatch.setattr(kernels, "for_device", lambda device: others[kernel])
    for values in (torch.zeros(200, dtype=torch.float64), torch.zeros(20, 10).t(), torch.zeros(200, dtype=torch.half)):
        p = nn.Parameter(values)
        torch.set_default_dtype(default)
        try:
            optimizer = Signum([p], lr=0.125, betas=(0.5, 0.25), verdict_momentum=0.5)
            p.grad = torch.ones_like(p)
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert (p == -0.0625).all()


def _by_default(dtype: torch.dtype, options: dict[str, Any]) -> Any:
    net = _net().double()
    ddp, optimizer = _voter(net, **options)
    (one,) = record(optimizer)
    if dist.get_rank() == 0:
        torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        for t in range(2):
            for k, p in enumerate(net.parameters()):
                random = torch.Generator("cpu").manual_seed(100 * t + 10 * k + dist.get_rank())
                p.grad = (torch.randint(-3, 4, p.shape, generator=random, device="cpu") / 8).double()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    del ddp
    return one


@pytest.mark.multiprocess
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_do_not_reach_a_vote(dtype: torch.dtype, workers: Workers) -> None:
    """Set on one rank alone; and a default device on all."""
    with fresh_workers(2) as own:
        judge(own.run(2, _by_default, dtype, {}), betas=(0.5, 0.5))


@pytest.mark.multiprocess
def test_defaults_do_not_reach_a_vote_between_nodes() -> None:
    with fresh_workers(4) as own:
        ends = own.run(4, _by_default, torch.float64, {"vote_between": "nodes"}, ranks_per_node=2)
    assert len({one.end[0].tobytes() for one in ends}) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(backend: str) -> None:
    ends = []
    for compiled in (False, True):
        net = _net()
        optimizer = Signum(net.parameters(), **SIGNUM)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for t in range(3):
            _backward(net, t, rank=0)
            step()
        ends.append([p.detach().clone() for p in net.parameters()])
        assert optimizer.t == 3
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def _compiled_step() -> Any:
    ddp, optimizer = _voter()
    (one,) = record(optimizer)

    def take_step() -> None:
        optimizer.step()

    step = torch.compile(take_step, backend="aot_eager")
    for t in range(3):
        _backward(ddp, t)
        step()
    return one


@pytest.mark.multiprocess
def test_a_compiled_step_votes() -> None:
    with fresh_workers(2) as own:
        judge(own.run(2, _compiled_step), betas=(0.5, 0.5))


# A user's own messages, and other models


def _own_messages(size: int) -> list[float]:
    ddp, optimizer = _voter()
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    got = []
    for tag in (0, 1, 4, 5):
        outgoing, incoming = torch.full((size,), float(10 * rank + tag)), torch.empty(size)
        works = [dist.isend(outgoing, other, tag=tag), dist.irecv(incoming, other, tag=tag)]
        _backward(ddp, tag)
        optimizer.step()
        for work in works:
            work.wait()  # type: ignore[union-attr]
        got.append(float(incoming[0]))
    return got


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_a_users_own_messages_are_not_taken_for_ours(size: int, workers: Workers) -> None:
    assert workers.run(2, _own_messages, size) == [[10.0, 11.0, 14.0, 15.0], [0.0, 1.0, 4.0, 5.0]]


def test_tags_are_apart() -> None:
    tags = [message.tag for message in Message]
    assert len(set(tags)) == len(tags)
    assert min(tags) > 1000


def _twins() -> tuple[str, str]:
    """Two models of one structure; rank 0 skips a step of one of them."""
    (a, on_a), (b, on_b) = _voter(), _voter()
    for t in range(3):  # at the second, DDP's forward pass waits for all ranks
        for model, optimizer in ((a, on_a), (b, on_b)):
            _backward(model, t)
            if (t, model, dist.get_rank()) == (2, a, 0):
                continue
            told = _told(optimizer.step)
            if told != "no error":
                return told, f"{on_a.t} {on_b.t}"
    return "no error", ""


def test_votes_on_two_models_of_one_structure_never_meet(workers: Workers) -> None:
    for told, steps in workers.run(2, _twins, group_timeout=10):
        assert "rank 0 has «optimizer 0 of model" in told
        assert steps == "2 2"


def _wrapped_anew(kept: bool) -> tuple[str, str]:
    net = _net()
    ddp, optimizer = _voter(net)
    if not kept:
        del ddp
    again = DistributedDataParallel(net)

    def train() -> None:
        _backward(again, 0)
        optimizer.step()

    told = _told(train)
    enable_majority_vote(again, optimizer)
    return told, _told(train)


@pytest.mark.parametrize("kept", [True, False])
def test_a_model_that_is_wrapped_anew_must_be_enabled_anew(kept: bool, workers: Workers) -> None:
    for told, then in workers.run(2, _wrapped_anew, kept):
        assert told.startswith(
            "RuntimeError: this DistributedDataParallel model averages gradients of parameters that vote: call enable"
            if kept
            else "RuntimeError: the model that this vote was enabled with is gone, and another wrapper may average"
        )
        assert then == "no error"


def _evaluated() -> str:
    """Another wrapper may be used where nothing is averaged."""
    net = _net()
    ddp, optimizer = _voter(net)
    other = DistributedDataParallel(net)
    with torch.no_grad():
        other(torch.ones(1, 4))
    _backward(ddp, 0)
    return _told(optimizer.step)


def test_another_wrapper_may_evaluate(workers: Workers) -> None:
    assert workers.run(2, _evaluated) == ["no error"] * 2


class _Wrapper(nn.Module):
    """As Fabric's: a module around the one that DDP has wrapped."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def _around(kind: str) -> Any:
    net = _net()
    if kind == "inside":
        net[0] = DistributedDataParallel(net[0])
        return _told(lambda: _voter(net))
    if kind == "a part":
        net[0] = DistributedDataParallel(net[0])
        return _told(lambda: enable_majority_vote(net, Signum(net.parameters())))
    if kind == "delayed":
        names = [("0.weight", net[0].weight)]
        ddp = DistributedDataParallel(net, delay_all_reduce_named_params=names, param_to_hook_all_reduce=net[0].weight)
        return _told(lambda: enable_majority_vote(ddp, Signum(net.parameters())))
    wrapper = _Wrapper(DistributedDataParallel(net))
    optimizer = Signum(net.parameters(), **SIGNUM)
    enable_majority_vote(wrapper, optimizer)
    (one,) = record(optimizer)
    for t in range(2):
        _backward(wrapper, t)
        optimizer.step()
    return one


def test_what_averages_beside_the_vote_is_refused(workers: Workers) -> None:
    for kind in ("inside", "a part"):
        for told in workers.run(2, _around, kind):
            assert told.startswith("ValueError: the model has DistributedDataParallel around a part of it, which would")
    for told in workers.run(2, _around, "delayed"):
        assert "delay_all_reduce_named_params averages past it: leave out" in told


def test_a_wrapper_around_ddp_is_seen_through(workers: Workers) -> None:
    judge(workers.run(2, _around, "wrapped"), betas=(0.5, 0.5))


def test_lookahead_and_its_like_may_step(workers: Workers) -> None:
    assert workers.run(2, _lookahead) == ["no error"] * 2


class _Lookahead(torch.optim.Optimizer):
    def __init__(self, inner: Any) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def _lookahead() -> str:
    ddp, optimizer = _voter()
    outer = _Lookahead(optimizer)
    _backward(ddp, 0)
    return _told(outer.step)


# Values


def _different_values(kind: str) -> tuple[str, int]:
    rank = dist.get_rank()
    net = _net(rank)
    if kind == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["0.weight"])  # type: ignore[no-untyped-call]
    ddp = DistributedDataParallel(net, init_sync=kind != "init_sync=False")
    settings = {**SIGNUM, "verdict_momentum": 0.5} if kind == "lost" else SIGNUM
    optimizer = Signum(ddp.parameters(), **settings)
    enable_majority_vote(ddp, optimizer)
    if kind == "loaded" and rank == 0:
        net.load_state_dict(_net(7).state_dict())
    net[0].head = head = nn.Linear(4, 1)  # that the model does not call
    with torch.no_grad():
        head.weight.fill_(float(rank))
    for t in range(2):
        _backward(ddp, t)
        if kind == "head" and t == 1:
            optimizer.add_param_group({"params": head.parameters()})
        if kind == "lost" and t == 1 and rank == 0:
            optimizer.state.clear()
        told = _told(optimizer.step)
        if told != "no error":
            return told, optimizer.t
    return "no error", optimizer.t


@pytest.mark.parametrize("kind", ["init_sync=False", "ignored", "loaded", "head", "lost"])
def test_ranks_that_start_from_other_values_are_told_before_they_vote(kind: str, workers: Workers) -> None:
    name = "0.head.weight" if kind == "head" else "0.weight"
    for told, steps in workers.run(3, _different_values, kind, group_timeout=10):
        if kind == "lost":
            assert "torch.float32» where rank 1 has «0.weight: shape (6, 4), torch.float32, verdict_momentum»" in told
        else:
            who = "rank 0 differs from the other ranks" if kind == "loaded" else "ranks 0, 1, 2 differ from one another"
            when = "before step 1" if kind == "head" else "before the first vote"
            assert told.startswith(f"RanksDifferError: {when} {who} in {name}"), told
        assert steps == (kind in ("head", "lost"))


# Gradients that change, settings that change, sizes


def _changed(how: str) -> str:
    ddp, optimizer = _voter(overlap=True)
    p = ddp.module[0].weight
    if how == "a hook registered later":
        p.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(-1)].clear())  # it must return None
    _backward(ddp, 0)
    assert p.grad is not None
    if how == ".data":
        p.grad.data.mul_(-1)
    if how == "NumPy":
        p.grad.numpy()[...] *= -1
    if how == "replaced":
        p.grad = -p.grad
    return _told(optimizer.step)


@pytest.mark.parametrize("how", [".data", "NumPy", "replaced", "a hook registered later", "not at all"])
def test_overlap_notices_gradients_that_changed(how: str, workers: Workers) -> None:
    for told in workers.run(2, _changed, how):
        if how == "not at all":
            assert told == "no error"
        else:
            assert told.startswith("RuntimeError: the gradient of 0.weight was changed between backward() and step()")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("momentum_dtype", torch.float16, "momentum_dtype must be None, which is float32, or torch.bfloat16, got"),
        ("betas", (1.5, 1.5), r"betas must lie in \[0, 1\), got \(1.5, 1.5\)"),
        ("betas", 0.9, r"betas must be a pair of numbers such as \(0.9, 0.9\), got 0.9"),
        ("lr", float("nan"), "lr must be 0 or more and finite, got nan"),
        ("verdict_momentum", 2.0, r"verdict_momentum must lie in \[0, 1\), got 2.0"),
        ("weight_decay", None, "weight_decay must be 0 or more and finite, got None"),
        ("warmup_steps", "never", "warmup_steps must be 'auto' or a whole number of 0 or more, got 'never'"),
    ],
)
def test_settings_are_checked_when_they_change(name: str, value: Any, told: str) -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer = Signum([p])
    p.grad = torch.ones(5)
    optimizer.step()
    before, good = p.detach().clone(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=told):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.t == 1
    optimizer.param_groups[0][name] = good
    optimizer.step()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer, **cycle: OneCycleLR(optimizer, 0.1, total_steps=10, **cycle),
        lambda optimizer, **cycle: CyclicLR(optimizer, 0.01, 0.1, **cycle),
    ],
)
def test_a_schedule_may_not_turn_no_momentum_into_one(schedule: Any) -> None:
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = Signum([p], lr=0.1, betas=(0.0, 0.0), verdict_momentum=0.8)
    schedule(optimizer)
    with pytest.raises(ValueError, match=r"betas were \(0.0, 0.0\) and are .* cycle_momentum=False"):
        optimizer.step()
    other = Signum([p], lr=0.1, betas=(0.0, 0.0), verdict_momentum=0.8)
    schedule(other, cycle_momentum=False)
    other.step()
    cycled = Signum([p], lr=0.1)
    schedule(cycled)
    cycled.step()
    assert 0.8 <= cycled.param_groups[0]["betas"][0] <= 0.95


def test_equal_settings_in_other_spellings_are_equal(workers: Workers) -> None:
    assert workers.run(2, _spelled) == ["no error"] * 2


def _spelled() -> str:
    ddp = DistributedDataParallel(_net())
    spelled: dict[str, Any] = {"lr": 0.125, "weight_decay": 0.0, "betas": (0.5, 0.5), "verdict_momentum": 0.0}
    if dist.get_rank() == 1:
        spelled = {"lr": np.float64(0.125), "weight_decay": 0, "betas": [0.5, 0.5], "verdict_momentum": 0}
    optimizer = Signum(ddp.parameters(), **spelled)

    def train() -> None:
        enable_majority_vote(ddp, optimizer)
        _backward(ddp, 0)
        optimizer.step()

    return _told(train)


def test_gradients_of_another_size_are_refused() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    p.data = torch.ones(500, 30)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 must have its shape \(500, 30\), got \(4, 3\)"):
        Signum([p]).step()
    q = nn.Parameter(torch.ones(4, 3))
    q.grad = torch.ones(4, 3)
    q.grad.data = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"must have its shape \(4, 3\), got \(1,\)"):
        Signum([q]).step()


def _lying() -> str:
    ddp, optimizer = _voter(adversaries={1: lambda g: g[:1]})
    _backward(ddp, 0)
    return _told(optimizer.step)


@pytest.mark.multiprocess
def test_an_adversary_of_another_shape_is_refused() -> None:
    with fresh_workers(2) as own:
        told = own.run(2, _lying, group_timeout=4)
    assert told[1].startswith(
        "ValueError: an adversary must return a gradient of the shape (6, 4) that it got, not (1, 4"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_tiny_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="must be real floating point of 2 bytes or more, got torch.float8"):
        Signum([nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)])


def test_no_parameters(workers: Workers) -> None:
    assert (
        workers.run(2, _without_parameters)
        == ["ValueError: optimizer 0 has no parameters to vote on: leave it out"] * 2
    )


def _without_parameters() -> str:
    ddp = DistributedDataParallel(_net())
    return _told(lambda: enable_majority_vote(ddp, Signum([{"params": []}])))


def test_a_scalers_factor_does_not_outlive_a_step_that_failed() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer, scaler = Signum([p], lr=0.25, betas=(0.5, 0.5)), torch.amp.GradScaler("cpu", init_scale=256.0)
    p.grad = scaler.scale(torch.ones(3))
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["momentum"].tolist() == [0.5] * 3


# Process groups of other kinds, and errors that travel


def _of_kind(backend: str | None, options: dict[str, Any], folder: str) -> list[bytes]:
    """Train in a process group made in another way, and save shards in it."""
    dist.destroy_process_group()
    dist.init_process_group(backend, timeout=timedelta(seconds=20))
    ddp, optimizer = _voter(**options)
    for t in range(2):
        _backward(ddp, t)
        optimizer.step()
    if not options:
        save_shards({"optimizer_states": [optimizer.state_dict()]}, f"{folder}/shards")
        load_shards(f"{folder}/shards", torch.load, dist.get_rank(), dist.get_world_size(), momenta=True)
    return [p.detach().numpy().tobytes() for p in ddp.parameters()]


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
@pytest.mark.parametrize("options", [{}, {"vote_between": "nodes"}], ids=["ranks", "nodes"])
def test_backends_of_other_names(backend: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    with fresh_workers(4) as own:
        ends = own.run(4, _of_kind, backend, options, str(tmp_path), ranks_per_node=2)
    assert len({tuple(end) for end in ends}) == 1


def _by_file(path: str) -> tuple[int | None, str]:
    """Meet over a file; lose rank 2."""
    import os

    rank = dist.get_rank()
    dist.destroy_process_group()
    limit = timedelta(seconds=4)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3, timeout=limit)
    ddp, optimizer = _voter()
    for t in range(3):
        _backward(ddp, t)
        if (t, rank) == (2, 2):
            os._exit(7)
        try:
            optimizer.step()
        except PeerLostError as error:
            return error.rank, str(error)
    return None, ""


@pytest.mark.multiprocess
def test_a_lost_rank_is_named_over_a_file(tmp_path: Path) -> None:
    with fresh_workers(3) as own:
        ends = own.run(3, _by_file, str(tmp_path / "store"), lost=(2,), group_timeout=4, timeout=60)
    for lost, told in ends[:2]:
        assert lost == 2, told


def _in_a_subgroup() -> tuple[int | None, str]:
    """Ranks 1 and 2 vote; 2 is lost, which is rank 1 of the group."""
    import os

    group = dist.new_group([1, 2], timeout=timedelta(seconds=4))
    rank = dist.get_rank()
    if rank == 0:
        return None, ""
    ddp = DistributedDataParallel(_net(), process_group=group)
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer)
    _backward(ddp, 0)
    if rank == 2:
        os._exit(7)
    try:
        optimizer.step()
    except PeerLostError as error:
        return error.rank, str(error)
    return None, "no error"


@pytest.mark.multiprocess
def test_a_lost_rank_of_a_subgroup_has_its_global_number() -> None:
    with fresh_workers(3) as own:
        ends = own.run(3, _in_a_subgroup, lost=(2,), timeout=60)
    lost, told = ends[1]
    assert lost == 2
    assert told.startswith("rank 2 stopped answering")


@pytest.mark.parametrize("error", [PeerLostError("gone", 3), RanksDifferError("differ", [1], 5, "net.weight")])
def test_errors_travel_between_processes(error: RuntimeError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.__dict__ == error.__dict__


def _group_gone() -> str:
    group = dist.new_group([0, 1])
    ddp = DistributedDataParallel(_net(), process_group=group)
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer)
    _backward(ddp, 0)
    dist.destroy_process_group(group)
    return _told(optimizer.step)


def test_a_group_that_was_destroyed(workers: Workers) -> None:
    for told in workers.run(2, _group_gone):
        assert "process group" in told
        assert "destroyed" in told


def _loaded_apart() -> tuple[str, int]:
    """Load a state whose verdict momentum is another on rank 1, where the parameters are the same."""
    ddp = DistributedDataParallel(_net())
    optimizer = Signum(ddp.parameters(), lr=0.125, betas=(0.0, 0.0), verdict_momentum=0.5)
    enable_majority_vote(ddp, optimizer)
    _backward(ddp, 0)
    optimizer.step()
    state = optimizer.state_dict()
    if dist.get_rank() == 1:
        state["state"][0]["verdict_momentum"] = state["state"][0]["verdict_momentum"] + 0.25
    optimizer.load_state_dict(state)
    return _told(optimizer.step), optimizer.t


def test_values_that_were_loaded_are_compared_verdict_momenta_too(workers: Workers) -> None:
    for told, steps in workers.run(3, _loaded_apart):
        assert told.startswith("RanksDifferError: before step 1 rank 1 differs from the other ranks in 0.weight")
        assert steps == 1


def _loaded_alone() -> str:
    ddp = DistributedDataParallel(_net())
    optimizer = Signum(ddp.parameters(), **SIGNUM)
    enable_majority_vote(ddp, optimizer)
    _backward(ddp, 0)
    optimizer.step()
    if dist.get_rank() == 0:
        optimizer.load_state_dict(optimizer.state_dict())
    return _told(optimizer.step)


def test_a_state_that_one_rank_alone_loads_is_named(workers: Workers) -> None:
    first, second = (f"{what} loaded or added since the last vote" for what in ("a state or parameter", "nothing"))
    for told in workers.run(2, _loaded_alone):
        assert f"rank 0 has «{first}» where rank 1 has «{second}»" in told
