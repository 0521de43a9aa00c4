"""Tensors whose memory is not their value: right or refused with a sentence, never read through a pointer."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from signsgd_lightning import Signum, enable_majority_vote, kernels, memory
from signsgd_lightning.memory import is_plain
from tests.workers import Workers

from .options import OPTIONS, Options, assert_same, name

VALUES = torch.tensor([-3.0, 0.5, 0.0, 2.0, -0.25, -0.0, 1e-30])
OPTED = pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[4], OPTIONS[5], OPTIONS[15]], ids=name)


class WithMemory(Tensor):
    """A subclass as datasets have them: with memory of its own."""


def negative(values: Tensor) -> Tensor:
    """The same values, of which torch has kept the sign for later."""
    lazy = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert lazy.is_neg()
    return lazy


READABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": negative,
    "negative bit, every other": lambda values: negative(torch.stack([values, values + 99], -1))[..., 0],
    "real part of a conjugate": lambda values: torch.complex(values, values).conj().real,
    "subclass with memory": lambda values: values.clone().as_subclass(WithMemory),
    "expanded": lambda values: values[:1].expand_as(values),
}


@pytest.fixture(params=["compiled", "NumPy", "tensor operations"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the CPU's kernels in turn."""
    others = {"NumPy": kernels.NumpyKernel(), "tensor operations": kernels.DeviceKernel()}
    if request.param in others:
        monkeypatch.setattr(kernels, "for_device", lambda device: others[request.param])
    else:
        assert isinstance(kernels.for_device(torch.device("cpu")), kernels.NativeKernel), "there is no compiler"
    return str(request.param)


@OPTED
@pytest.mark.parametrize("kind", READABLE)
def test_gradients_count_with_their_value(kind: str, options: Options, kernel: str) -> None:
    odd, plain = (nn.Parameter(torch.ones(7)) for _ in range(2))
    on_odd, on_plain = Signum([odd], lr=0.25, **options), Signum([plain], lr=0.25, **options)
    for t in range(3):
        odd.grad = READABLE[kind](VALUES.roll(t))
        plain.grad = odd.grad.resolve_neg().clone().as_subclass(Tensor)
        on_odd.step()
        on_plain.step()
        assert_same(on_odd, on_plain)


@OPTED
def test_gradients_of_zeros_that_have_no_memory(options: Options, kernel: str) -> None:
    odd, plain = (nn.Parameter(torch.ones(7)) for _ in range(2))
    on_odd, on_plain = (Signum([p], lr=0.25, zeros="alternate", **options) for p in (odd, plain))
    for _ in range(3):
        odd.grad, plain.grad = torch._efficientzerotensor(7), torch.zeros(7)
        on_odd.step()
        on_plain.step()
        assert_same(on_odd, on_plain)


@OPTED
@pytest.mark.parametrize("kind", ["negative bit", "negative bit, every other", "subclass with memory"])
def test_parameters_move_as_their_value_does(kind: str, options: Options, kernel: str) -> None:
    odd, plain = nn.Parameter(READABLE[kind](VALUES)), nn.Parameter(VALUES.clone())
    on_odd, on_plain = Signum([odd], lr=0.25, **options), Signum([plain], lr=0.25, **options)
    for t in range(3):
        odd.grad, plain.grad = VALUES.roll(t + 1), VALUES.roll(t + 1)
        on_odd.step()
        on_plain.step()
        assert torch.equal(odd.detach().resolve_neg().as_subclass(Tensor), plain.detach())


def test_a_loaded_momentum_counts_with_its_value(kernel: str) -> None:
    odd, plain = (nn.Parameter(torch.ones(7)) for _ in range(2))
    on_odd, on_plain = Signum([odd], lr=0.25), Signum([plain], lr=0.25)
    on_odd.state[odd]["momentum"], on_plain.state[plain]["momentum"] = negative(VALUES), VALUES.clone()
    odd.grad, plain.grad = VALUES.flip(0), VALUES.flip(0)
    on_odd.step()
    on_plain.step()
    assert_same(on_odd, on_plain)


def test_copies_of_such_parameters_step_alike() -> None:
    odd = nn.Parameter(negative(VALUES))
    optimizer = Signum([odd], lr=0.25)
    odd.grad = torch.ones(7)
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(7)
    optimizer.step()
    twin.step()
    assert torch.equal(odd, twin.param_groups[0]["params"][0])


def _voted(kind: str, of: str, adversarial: bool) -> list[float]:
    """Vote with a gradient or a parameter of a kind; return where the parameter went."""
    values = torch.arange(-3.0, 4.0)
    start = negative(values) if of == "parameter" else values.clone()
    model = nn.ParameterList([nn.Parameter(start)])
    ddp = DistributedDataParallel(model)
    optimizer = Signum(ddp.parameters(), lr=0.5, betas=(0.0, 0.0))
    liars: Any = {0: lambda g: g, 1: lambda g: g} if adversarial else None
    enable_majority_vote(ddp, optimizer, verify_every_n_steps=1, adversaries=liars)
    gradient = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    model[0].grad = READABLE[kind](gradient) if of == "gradient" else gradient
    optimizer.step()
    moved: list[float] = (model[0].detach().resolve_neg() - values).tolist()
    return moved


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(("kind", "of"), [("negative bit", "gradient"), ("negative bit", "parameter")])
def test_a_vote_counts_the_value(kind: str, of: str, adversarial: bool, workers: Workers) -> None:
    assert workers.run(2, _voted, kind, of, adversarial) == [[0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5]] * 2


def _refuse(p: nn.Parameter, match: str) -> None:
    optimizer = Signum([p])
    with pytest.raises((TypeError, RuntimeError), match=match):
        optimizer.step()
    assert optimizer.t == 0
    assert not optimizer.state


def test_gradients_without_memory_are_refused_before_anything_changes() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch._to_functional_tensor(torch.ones(3))
    _refuse(p, "the gradient of parameter 0 is a tensor of a function transform, whose values are not")
    with FakeTensorMode(), pytest.raises(TypeError, match="parameter 0 of group 0 is a FakeTensor"):
        Signum([nn.Parameter(torch.ones(3))])


def test_function_transforms_are_refused() -> None:
    seen = []

    def attempt(x: Tensor) -> Tensor:
        try:
            Signum([x])
        except TypeError as error:
            seen.append(str(error))
        return x

    torch.func.vmap(attempt)(torch.ones(2, 3))
    assert seen[0].startswith("parameter 0 of group 0 is a tensor of a function transform")


def test_what_is_plain() -> None:
    assert all(is_plain(x) for x in (torch.ones(2), nn.Parameter(torch.ones(2)), torch.ones(2).as_subclass(WithMemory)))
    assert not any(is_plain(x) for x in (negative(VALUES), torch._efficientzerotensor(2)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(()).expand(1),
        torch.ones(3).expand(2, 3),
        torch.arange(6.0).view(2, 3).T,
        torch.ones(0),
        torch.ones(()),
    ],
    ids=["stride 0", "expanded", "transposed", "empty", "scalar"],
)
def test_as_bytes(tensor: Tensor) -> None:
    assert memory.as_bytes(tensor).numpy().tobytes() == np.ascontiguousarray(tensor.numpy()).tobytes()
