"""`Signum`'s state: which setting keeps what, and that it survives every way of saving it, bit for bit."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from signsgd_lightning import Signum

from .options import DTYPES, OPTIONS, Options, assert_same, copies, name, parameters, snapshot, take_step

over_options = pytest.mark.parametrize("options", OPTIONS, ids=name)


def by_state_dict(optimizer: Signum) -> Signum:
    """Into an optimizer built with the default settings."""
    resumed = Signum(copies(optimizer.param_groups[0]["params"]))
    resumed.load_state_dict(optimizer.state_dict())
    return resumed


def by_file(optimizer: Signum) -> Signum:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = Signum(copies(optimizer.param_groups[0]["params"]))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


def by_pickle(optimizer: Signum) -> Signum:
    resumed = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(resumed, Signum)
    return resumed


WAYS: dict[str, Callable[[Signum], Signum]] = {
    "state_dict": by_state_dict,
    "file": by_file,
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resume", WAYS.values(), ids=WAYS.keys())
@over_options
def test_resumes_bit_for_bit(options: Options, resume: Callable[[Signum], Signum], dtype: torch.dtype) -> None:
    optimizer = Signum(parameters(dtype), lr=0.0625, **options)
    for t in range(3):
        take_step(optimizer, t)
    resumed = resume(optimizer)
    assert_same(resumed, optimizer)
    before = snapshot(optimizer)
    for t in range(3, 6):
        take_step(resumed, t)
    for (p, state), (now, state_now) in zip(before, snapshot(optimizer), strict=True):
        assert torch.equal(p, now), "the copy's steps moved the original's parameters"
        assert all(torch.equal(value, state_now[key]) for key, value in state.items()), "they share a momentum"
    for t in range(3, 6):
        take_step(optimizer, t)
    assert_same(resumed, optimizer)
    kept = {"momentum": options.get("momentum_dtype") or torch.float32, "verdict_momentum": torch.float32}
    assert all(value.dtype is kept[key] for _, state in snapshot(resumed) for key, value in state.items())
    assert resumed.param_groups[0]["step"] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loaded_momentum_is_more_than_the_parameters_dtype_can_hold(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = Signum([p], betas=(0.9, 0.99), verdict_momentum=0.8)
    exact = {"momentum": torch.tensor([1 + 2**-20, 3e38, -1e-38]), "verdict_momentum": torch.tensor([0.1, -0.2, 0.3])}
    take_step(optimizer, 0)
    state_dict = optimizer.state_dict()
    state_dict["state"] = {0: exact}
    optimizer.load_state_dict(state_dict)
    for key, value in exact.items():
        torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0)
        assert optimizer.state[p][key].data_ptr() != value.data_ptr()


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"betas": (0.0, 0.0)}, []),
        ({"betas": (0.0, 0.9)}, []),
        ({"betas": (0.0, 0.0), "weight_decay": 0.5, "warmup_steps": 9, "zeros": "alternate"}, []),
        ({"betas": (0.0, 0.0), "verdict_momentum": 0.8}, ["verdict_momentum"]),
        ({}, ["momentum"]),
        ({"betas": (0.9, 0.0)}, ["momentum"]),
        ({"betas": (0.9, 0.99), "warmup_steps": 9}, ["momentum"]),
        ({"verdict_momentum": 0.8}, ["momentum", "verdict_momentum"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_state_that_a_setting_needs(options: Options, keys: list[str], dtype: torch.dtype) -> None:
    mine = parameters(dtype)
    optimizer = Signum(mine, **options)
    assert not optimizer.state
    for t in range(3):
        take_step(optimizer, t)
    if not keys:
        assert len(optimizer.state) == 0
        assert optimizer.state_dict()["state"] == {}
    else:
        for p in mine[:3]:  # the fourth is empty
            assert sorted(optimizer.state[p]) == keys
            assert all(value.shape == p.shape for value in optimizer.state[p].values())
            assert all(value.dtype is torch.float32 for value in optimizer.state[p].values())


def test_a_momentum_that_is_in_another_dtype_is_taken_into_the_settings_own() -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = Signum([p], betas=(0.5, 0.5))
    p.grad = torch.tensor([2.0 + 2**-7, -4.0])
    optimizer.step()
    optimizer.param_groups[0]["momentum_dtype"] = torch.bfloat16
    p.grad = torch.zeros(2)
    optimizer.step()
    momentum = optimizer.state[p]["momentum"]
    assert momentum.dtype is torch.bfloat16
    assert momentum.tolist() == [0.5, -1.0]  # 1 + 2^-8 lies in the middle of two that bfloat16 has


def test_a_group_saved_before_there_was_a_momentum_dtype_keeps_float32() -> None:
    optimizer = Signum(parameters())
    take_step(optimizer, 0)
    state_dict = optimizer.state_dict()
    del state_dict["param_groups"][0]["momentum_dtype"]
    resumed = Signum(copies(optimizer.param_groups[0]["params"]))
    resumed.load_state_dict(state_dict)
    assert_same(resumed, optimizer)
    take_step(resumed, 1)
    take_step(optimizer, 1)
    assert_same(resumed, optimizer)


def test_loading_leaves_the_state_dict_alone() -> None:
    optimizer = Signum(parameters(torch.bfloat16), verdict_momentum=0.8)
    take_step(optimizer, 0)
    state_dict = copy.deepcopy(optimizer.state_dict())
    words = str(state_dict)
    other = Signum(parameters(torch.bfloat16))
    other.load_state_dict(state_dict)
    take_step(other, 1)
    assert str(state_dict) == words


def test_loaded_checkpoint_is_not_held_on_to() -> None:
    optimizer = Signum(parameters())
    take_step(optimizer, 0)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    momentum = weakref.ref(checkpoint["state"][0]["momentum"])
    optimizer.load_state_dict(checkpoint)
    del checkpoint
    gc.collect()
    assert momentum() is None


def test_wrong_state_dict_is_refused_and_changes_nothing() -> None:
    optimizer, untouched = Signum(parameters()), Signum(parameters())
    one, more = Signum(parameters()[:1]), Signum([{"params": parameters()}, {"params": parameters()}])
    for wrong in (one, more):
        take_step(wrong, 0)
        with pytest.raises(ValueError, match="loaded state dict"):
            optimizer.load_state_dict(wrong.state_dict())
    assert str(optimizer.state_dict()) == str(untouched.state_dict())


def test_load_pre_hooks_decide_what_is_loaded() -> None:
    """Whether they return a new dict or change the one they get, and in whatever order."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Signum([p])
    take_step(optimizer, 0)
    momentum = torch.tensor([1 + 2**-20])
    order: list[str] = []

    def replaces(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("replaces")
        return {**state_dict, "state": {0: {"momentum": momentum}}}

    def changes(_: Optimizer, state_dict: dict[str, Any]) -> None:
        order.append("changes")
        state_dict["state"] = {0: {"momentum": state_dict["state"][0]["momentum"] * 2}}

    optimizer.register_load_state_dict_pre_hook(changes)
    handle = optimizer.register_load_state_dict_pre_hook(replaces, prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["replaces", "changes"]
    assert optimizer.state[p]["momentum"].tolist() == (2 * momentum).tolist()
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["replaces", "changes", "changes"]
    assert optimizer.state[p]["momentum"].tolist() == (4 * momentum).tolist()


def test_state_dict_hooks() -> None:
    optimizer = Signum(parameters())
    take_step(optimizer, 0)
    order: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "epoch": 3})
    state_dict = optimizer.state_dict()
    assert (order, state_dict["epoch"]) == (["pre"], 3)
    resumed = Signum(copies(optimizer.param_groups[0]["params"]))
    resumed.load_state_dict(state_dict)
    assert_same(resumed, optimizer)


def test_load_post_hooks_see_what_was_loaded_and_have_the_last_word() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Signum([p])
    take_step(optimizer, 0)
    momentum = torch.tensor([1 + 2**-20])
    optimizer.state[p]["momentum"].copy_(momentum)
    seen: list[float] = []

    def double(_: Optimizer) -> None:
        seen.append(optimizer.state[p]["momentum"].item())
        optimizer.state[p]["momentum"] = 2 * optimizer.state[p]["momentum"]

    optimizer.register_load_state_dict_post_hook(double)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == momentum.tolist()
    assert optimizer.state[p]["momentum"].tolist() == (2 * momentum).tolist()


def test_state_of_the_users_own_survives() -> None:
    """Torch keeps what is no tensor as it is."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = Signum([p])
    take_step(optimizer, 0)
    optimizer.state[p]["note"] = 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["note"] == 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copy_of_a_voter_does_not_step_alone(duplicate: Callable[[Signum], Signum]) -> None:
    optimizer = Signum([nn.Parameter(torch.zeros(1))])
    optimizer.vote = object()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="a copy of an optimizer that votes"):
        duplicate(optimizer).step()
