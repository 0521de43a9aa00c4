"""`Signum` alone against independent implementations: optax, torch's own optimizers, and the specification."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest
import torch
from torch import Tensor, nn

from signsgd_core import Reference, Zeros
from signsgd_lightning import Signum

from .options import Options, name

Array = npt.NDArray[Any]

SHAPES: tuple[tuple[int, ...], ...] = ((6, 4), (), (33,))
STEPS = 40
ROUNDING = 2.0**-17
"""Numbers below 1 in float32, 40 steps, in each of which ours and theirs round such a number twice, by up to 2^-25."""


def start() -> list[Array]:
    random = np.random.default_rng(0)
    return [np.asarray(random.integers(-4, 5, shape) / 8, np.float32) for shape in SHAPES]


def random_gradients(steps: int = STEPS) -> list[list[Array]]:
    """A tenth of the entries are zero."""
    random = np.random.default_rng(1)
    return [
        [np.asarray(random.standard_normal(s) * (random.random(s) > 0.1), np.float32) for s in SHAPES]
        for _ in range(steps)
    ]


def dyadic_gradients(steps: int = 5) -> list[list[Array]]:
    random = np.random.default_rng(2)
    return [[np.asarray(random.integers(-3, 4, s) / 8, np.float32) for s in SHAPES] for _ in range(steps)]


def by_torch(make: Any, gradients: Sequence[Sequence[Array]], dtype: torch.dtype = torch.float32) -> list[list[Array]]:
    """The parameters after each step of the torch optimizer that `make` makes of them."""
    mine = [nn.Parameter(torch.from_numpy(x.copy()).to(dtype)) for x in start()]
    optimizer = make(mine)
    trajectory = []
    for gradient in gradients:
        for p, g in zip(mine, gradient, strict=True):
            p.grad = torch.from_numpy(g.copy()).to(dtype)
        optimizer.step()
        trajectory.append([p.detach().numpy().copy() for p in mine])
    return trajectory


def by_optax(transformation: Any, gradients: Sequence[Sequence[Array]]) -> list[list[Array]]:
    mine: Any = [jnp.asarray(x) for x in start()]
    state, trajectory = transformation.init(mine), []
    for gradient in gradients:
        updates, state = transformation.update([jnp.asarray(g) for g in gradient], state, mine)
        mine = optax.apply_updates(mine, updates)
        trajectory.append([np.asarray(x) for x in mine])
    return trajectory


def by_reference(gradients: Sequence[Sequence[Array]], dtype: Any = np.float32, **options: Any) -> list[list[Array]]:
    reference = Reference([x.astype(dtype) for x in start()], 1, **options)
    trajectory = []
    for gradient in gradients:
        reference.step([gradient])
        trajectory.append([x.copy() for x in reference.parameters])
    return trajectory


def assert_close(ours: list[list[Array]], theirs: list[list[Array]], tolerance: float = ROUNDING) -> None:
    """At every step; one sign the other way would make a difference of 2·lr, thousands of times more."""
    for t, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for x, y in zip(mine, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=f"after step {t}", strict=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.9, 0.9), (0.5, 0.5), (0.9, 0.0)])
def test_lion_and_signum_are_optax_lion(betas: tuple[float, float], weight_decay: float) -> None:
    """With b1 = b2 = β optax's direction is its new momentum: Signum."""
    gradients = random_gradients()
    ours = by_torch(lambda p: Signum(p, lr=0.01, betas=betas, weight_decay=weight_decay), gradients)
    assert_close(ours, by_optax(optax.lion(0.01, *betas, weight_decay=weight_decay), gradients))


def test_lion_with_a_schedule_is_optax_lion_with_it() -> None:
    def make(p: list[nn.Parameter]) -> Signum:
        optimizer = Signum(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    gradients = random_gradients()
    lion = optax.lion(optax.cosine_decay_schedule(0.01, STEPS), 0.9, 0.99, weight_decay=0.3)
    assert_close(by_torch(make, gradients), by_optax(lion, gradients))


def test_signsgd_is_optax_sign_sgd() -> None:
    gradients = random_gradients()
    ours = by_torch(lambda p: Signum(p, lr=0.01, betas=(0.0, 0.0)), gradients)
    assert_close(ours, by_optax(optax.sign_sgd(0.01), gradients))


def test_signsgd_with_decay_is_optax_sign_and_decayed_weights() -> None:
    gradients = random_gradients()
    ours = by_torch(lambda p: Signum(p, lr=0.01, betas=(0.0, 0.0), weight_decay=0.3), gradients)
    chain = optax.chain(optax.scale_by_sign(), optax.add_decayed_weights(0.3), optax.scale_by_learning_rate(0.01))
    assert_close(ours, by_optax(chain, gradients))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_signsgd_is_torch_adamw_without_memory(weight_decay: float) -> None:
    """With betas (0, 0) and a tiny eps Adam divides each gradient by its own size."""
    gradients = [[np.where(g == 0, np.float32(1), g) for g in step] for step in random_gradients()]
    ours = by_torch(lambda p: Signum(p, lr=0.01, betas=(0.0, 0.0), weight_decay=weight_decay), gradients)
    adamw = by_torch(
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.0), eps=1e-20, weight_decay=weight_decay), gradients
    )
    assert_close(ours, adamw)


class SignedSGD(torch.optim.SGD):
    """torch's SGD fed with signs, decayed beforehand as AdamW decays."""

    def __init__(self, params: Any, decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.decay = decay

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.grad.sign_()
                p.mul_(1 - self.param_groups[0]["lr"] * self.decay)
        super().step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [0.5, 0.8, 0.95])
def test_verdict_momentum_is_torch_sgd_with_dampening(gamma: float, weight_decay: float, dtype: torch.dtype) -> None:
    """Both begin with a gradient of zero.

    torch's SGD takes its first gradient into the momentum buffer undamped: buffer = g, where ours would be (1−γ)·V.
    After a first gradient of zero its buffer is zero, as ours is at the start, and from then on the two formulas are
    the same. (The next test shows what they do without it.)
    """
    gradients = [[np.zeros(shape, np.float32) for shape in SHAPES], *random_gradients()]
    options: Options = {"betas": (0.0, 0.0), "verdict_momentum": gamma, "weight_decay": weight_decay}
    ours = by_torch(lambda p: Signum(p, lr=0.01, **options), gradients, dtype)
    sgd = by_torch(lambda p: SignedSGD(p, weight_decay, lr=0.01, momentum=gamma, dampening=gamma), gradients, dtype)
    assert_close(ours, sgd)


def test_first_step_of_verdict_momentum_is_damped_and_that_of_sgd_is_not() -> None:
    """So SGD is ahead by γ·V₀ in its buffer, which fades as γᵗ: known, and all of the difference there is."""
    gamma, lr, gradients = 0.8, 0.01, random_gradients()
    ours = by_torch(lambda p: Signum(p, lr=lr, betas=(0.0, 0.0), verdict_momentum=gamma), gradients)
    sgd = by_torch(lambda p: SignedSGD(p, lr=lr, momentum=gamma, dampening=gamma), gradients)
    for t, step in enumerate(sgd):
        ahead = lr * gamma * sum(gamma**k for k in range(t + 1))
        for x, g in zip(step, gradients[0], strict=True):
            x += np.float32(ahead) * np.sign(g)
    assert_close(ours, sgd)


SETTINGS: tuple[Options, ...] = (
    {"betas": (0.0, 0.0)},
    {"betas": (0.75, 0.75)},
    {"betas": (0.75, 0.25)},
    {"betas": (0.0, 0.0), "verdict_momentum": 0.75},
    {"betas": (0.5, 0.5), "verdict_momentum": 0.5, "weight_decay": 0.5},
    {"betas": (0.5, 0.5), "weight_decay": 0.25},
    {"betas": (0.5, 0.75), "warmup_steps": 3},
)
RULES: tuple[Zeros, ...] = ("alternate", "abstain", "positive")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("zeros", RULES)
@pytest.mark.parametrize("options", SETTINGS, ids=name)
def test_dyadic_trajectory_is_the_references(options: Options, zeros: Zeros, dtype: torch.dtype) -> None:
    """With numbers so short that float32 holds every step exactly, as the reference in float64 shows."""
    options = {**options, "lr": 0.25, "zeros": zeros}
    ours = by_torch(lambda p: Signum(p, **options), dyadic_gradients(), dtype)
    theirs = by_reference(dyadic_gradients(), np.float64, **options)
    assert_close([[x.astype(np.float64) for x in step] for step in ours], theirs, tolerance=0)


@pytest.mark.parametrize("zeros", RULES)
@pytest.mark.parametrize("options", SETTINGS, ids=name)
def test_random_trajectory_is_the_references(options: Options, zeros: Zeros) -> None:
    """The dyadic settings shifted to numbers that round."""
    betas = tuple(0.97 * beta for beta in options["betas"])
    options = {**options, "betas": betas, "lr": 0.01, "zeros": zeros}
    gradients = random_gradients()
    assert_close(by_torch(lambda p: Signum(p, **options), gradients), by_reference(gradients, **options))


@pytest.mark.parametrize("betas", [(0.8, 0.8), (0.5, 0.8)])
def test_auto_warmup_is_the_papers_number_of_steps(betas: tuple[float, float]) -> None:
    """C(0.8) = 19: while it lasts ballots are the gradients' signs."""
    gradients = random_gradients()
    ours = by_torch(lambda p: Signum(p, lr=0.01, betas=betas, warmup_steps="auto"), gradients)
    assert_close(ours, by_reference(gradients, lr=0.01, betas=betas, warmup_steps=19))


def test_maximize_is_the_reference_on_negated_gradients() -> None:
    gradients = dyadic_gradients()
    negated = [[-g for g in step] for step in gradients]
    ours = by_torch(lambda p: Signum(p, lr=0.25, betas=(0.5, 0.5), maximize=True), gradients)
    assert_close(ours, by_reference(negated, lr=0.25, betas=(0.5, 0.5)), tolerance=0)


def test_parameters_without_a_gradient_are_the_references() -> None:
    gradients: list[list[Any]] = [list(step) for step in dyadic_gradients()]
    gradients[1][0] = gradients[2][2] = gradients[2][0] = None
    mine: list[Tensor] = [nn.Parameter(torch.from_numpy(x)) for x in start()]
    optimizer = Signum(mine, lr=0.25, betas=(0.5, 0.5), verdict_momentum=0.5, zeros="alternate")
    reference = Reference(start(), 1, 0.25, (0.5, 0.5), verdict_momentum=0.5, zeros="alternate")
    for step in gradients:
        for p, g in zip(mine, step, strict=True):
            p.grad = None if g is None else torch.from_numpy(g)
        optimizer.step()
        reference.step([step])
        assert_close([[p.detach().numpy() for p in mine]], [reference.parameters], tolerance=0)
