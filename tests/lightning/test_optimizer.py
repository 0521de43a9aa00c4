"""`Signum` alone is a torch optimizer: settings, parameter groups, closures, hooks, compiled models."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from signsgd_lightning import Signum

from .options import DTYPES, OPTIONS, Options, assert_same, name, parameters, take_step

over_options = pytest.mark.parametrize("options", OPTIONS, ids=name)

BAD: tuple[tuple[Options, str], ...] = (
    ({"lr": -1.0}, "lr must be 0 or more and finite, got -1.0"),
    ({"lr": float("nan")}, "lr must be 0 or more and finite, got nan"),
    ({"lr": float("inf")}, "lr must be 0 or more and finite, got inf"),
    ({"lr": torch.tensor(-1.0)}, "lr must be 0 or more and finite, got tensor(-1.)"),
    ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element, got a tensor of shape (2,)"),
    ({"weight_decay": -0.5}, "weight_decay must be 0 or more and finite, got -0.5"),
    ({"betas": (0.9, 1.0)}, "betas must lie in [0, 1), got (0.9, 1.0)"),
    ({"betas": (-0.1, 0.9)}, "betas must lie in [0, 1), got (-0.1, 0.9)"),
    ({"betas": (float("nan"), 0.9)}, "betas must lie in [0, 1), got (nan, 0.9)"),
    ({"betas": 0.9}, "betas must be a pair of numbers such as (0.9, 0.9), got 0.9"),
    ({"betas": (0.9,)}, "betas must be a pair of numbers such as (0.9, 0.9), got (0.9,)"),
    ({"betas": (0.9, 0.9, 0.9)}, "betas must be a pair of numbers such as (0.9, 0.9), got (0.9, 0.9, 0.9)"),
    ({"verdict_momentum": 1.0}, "verdict_momentum must lie in [0, 1), got 1.0"),
    ({"verdict_momentum": -0.5}, "verdict_momentum must lie in [0, 1), got -0.5"),
    ({"zeros": "negative"}, "zeros must be one of 'alternate', 'abstain', 'positive', got 'negative'"),
    ({"warmup_steps": -1}, "warmup_steps must be 'auto' or a whole number of 0 or more, got -1"),
    ({"warmup_steps": 1.5}, "warmup_steps must be 'auto' or a whole number of 0 or more, got 1.5"),
    ({"warmup_steps": "long"}, "warmup_steps must be 'auto' or a whole number of 0 or more, got 'long'"),
)
REAL = "parameters must be real floating point, got torch.complex64"


def test_signature_is_the_documented_one() -> None:
    signature = inspect.signature(Signum)
    assert [(key, p.default) for key, p in signature.parameters.items() if key != "params"] == [
        ("lr", 1e-4),
        ("betas", (0.9, 0.9)),
        ("weight_decay", 0.0),
        ("verdict_momentum", 0.0),
        ("zeros", None),
        ("warmup_steps", 0),
        ("maximize", False),
        ("momentum_dtype", None),
        ("orthogonalize", False),
        ("ns_steps", 5),
        ("ns_coefficients", (3.4445, -4.775, 2.0315)),
        ("matrices", 1),
    ]
    keyword_only = [key for key, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == list(signature.parameters)[4:]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=str)
def test_bad_setting_is_refused_with_a_sentence(options: Options, sentence: str) -> None:
    for refused in (
        lambda: Signum(parameters(), **options),
        lambda: Signum([{"params": parameters(), **options}]),
        lambda: Signum(parameters()).add_param_group({"params": parameters(), **options}),
    ):
        with pytest.raises(ValueError, match=".") as error:
            refused()
        assert str(error.value) == sentence


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0}, {"betas": (0.5, 0.5)}, {"warmup_steps": "auto"}], ids=name)
def test_borderline_setting_is_taken(options: Options) -> None:
    group = Signum(parameters(), **options).param_groups[0]
    assert {key: group[key] for key in options} == options


def test_bad_parameters_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    bad: tuple[tuple[Any, type[Exception], str], ...] = (
        ([], ValueError, "optimizer got an empty parameter list"),
        (p, TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
        ([[1.0]], TypeError, "optimizer can only optimize Tensors"),
        ([p * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": [p]}, {"params": [p]}], ValueError, "some parameters appear in more than one parameter group"),
        ([nn.Parameter(torch.ones(2, dtype=torch.complex64))], ValueError, REAL),
    )
    for params, error, sentence in bad:
        with pytest.raises(error) as raised:
            Signum(params)
        assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_options
def test_minimises(options: Options, dtype: torch.dtype) -> None:
    target = torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=dtype)
    p = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    optimizer = Signum([p], lr=0.04, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=100)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (p.view(-1) - target).square().sum()
        torch.autograd.backward(-loss if options.get("maximize") else loss)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@over_options
def test_maximize_is_minimising_the_negated_function(options: Options) -> None:
    up, down = parameters(), parameters()
    climbing = Signum(up, lr=0.1, **{**options, "maximize": True})
    falling = Signum(down, lr=0.1, **{**options, "maximize": False})
    for t in range(6):
        take_step(climbing, t)
        for p, q in zip(up, down, strict=True):
            assert p.grad is not None
            q.grad = -p.grad
        falling.step()
    assert_same(climbing, falling)
    assert not torch.equal(up[0], parameters()[0])


@over_options
def test_closure(options: Options) -> None:
    """It runs with gradients enabled, its loss is returned, and its gradients are the ones that count."""
    closed, opened = parameters(), parameters()
    with_closure, without = Signum(closed, lr=0.1, **options), Signum(opened, lr=0.1, **options)
    losses = []

    def loss_of(optimizer: Signum) -> Tensor:
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = torch.stack([p.sin().sum() for p in optimizer.param_groups[0]["params"]]).sum()
        torch.autograd.backward(loss)
        losses.append(loss)
        return loss

    for _ in range(3):
        returned = with_closure.step(lambda: loss_of(with_closure))
        assert returned is losses[-1]
        loss_of(without)
        assert without.step() is None
    assert len(losses) == 6
    assert_same(with_closure, without)
    with torch.no_grad():
        with_closure.step(closure=lambda: loss_of(with_closure))
    assert with_closure.t == 4


def test_step_hooks() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = Signum([p], lr=0.25, betas=(0.0, 0.0))
    seen: list[tuple[str, float]] = []

    def hook(word: str) -> Callable[..., None]:
        return lambda *_: seen.append((word, p.item()))

    def lose_closure(optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        assert args[1]() == 5.0
        return (args[0],), kwargs

    handles = [
        register_optimizer_step_pre_hook(hook("pre, all")),
        register_optimizer_step_post_hook(hook("post, all")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        optimizer.register_step_pre_hook(lose_closure),
    ]
    p.grad = torch.ones(1)
    assert optimizer.step(lambda: 5.0) is None
    assert sorted(seen) == [("post", -0.25), ("post, all", -0.25), ("pre", 0.0), ("pre, all", 0.0)]
    assert [word.split(",")[0] for word, _ in seen] == ["pre", "pre", "post", "post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 4


def test_compiled_model_trains_like_the_eager_one() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    original = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    original.load_state_dict(eager.state_dict())
    compiled: Any = torch.compile(original, backend="aot_eager")
    optimizers = Signum(eager.parameters(), lr=1 / 64), Signum(compiled.parameters(), lr=1 / 64)
    x = torch.randn(16, 4)
    for _ in range(5):
        for model, optimizer in zip([eager, compiled], optimizers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(model(x).square().sum())
            optimizer.step()
    assert_same(*optimizers)
    assert optimizers[1].t == 5


def test_repr_names_the_settings() -> None:
    groups: list[dict[str, Any]] = [{"params": parameters()}, {"params": parameters(), "lr": 0.5}]
    words = repr(Signum(groups, betas=(0.9, 0.99)))
    assert words.startswith("Signum (")
    for word in ("Parameter Group 1", "lr: 0.0001", "lr: 0.5", "betas: (0.9, 0.99)", "zeros: None", "maximize: False"):
        assert word in words


def test_a_step_between_forward_and_backward_is_told_to_autograd() -> None:
    p = nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    Signum([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
