"""`Signum` alone steps as the specification, Keras' Lion and the torch side do, whatever is set around it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest

from signsgd_core import Reference
from signsgd_keras import Signum

from .backends import (
    Array,
    assert_equal,
    everywhere,
    everywhere_jax_nightly,
    gradients,
    numbers,
    start,
    train,
    variables,
)

Settings = dict[str, Any]
Trajectory = list[list[Array]]
Step = Callable[[list[Any]], object]
"""Takes the gradients."""

LR = 0.25

LIONS: tuple[Settings, ...] = (
    {},
    {"beta_1": 0.75, "beta_2": 0.25},
    {"beta_1": 0.5, "beta_2": 0.5},
    {"weight_decay": 0.5},
    {"clipvalue": 0.125},
    {"clipnorm": 0.5},
    {"global_clipnorm": 0.5},
    {"loss_scale_factor": 4.0},
    {"gradient_accumulation_steps": 2},
    {"use_ema": True, "ema_momentum": 0.5},
    {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2, "weight_decay": 0.5},
)

TORCH: tuple[Settings, ...] = (
    {"betas": (0.0, 0.0)},
    {"betas": (0.5, 0.5)},
    {"betas": (0.5, 0.75), "weight_decay": 0.5},
    {"betas": (0.0, 0.0), "verdict_momentum": 0.75, "weight_decay": 0.5},
    {"betas": (0.5, 0.25), "warmup_steps": 2, "zeros": "alternate"},
    {"betas": (0.0, 0.5), "warmup_steps": "auto", "zeros": "positive"},
)


def signum(**settings: Any) -> Signum:
    return Signum(**{"learning_rate": LR, "beta_1": 0.5, "beta_2": 0.75, **settings})


def reference(steps: Sequence[Sequence[Any]], lrs: float | Sequence[float] = LR, **settings: Any) -> Trajectory:
    """What the specification makes of the steps with one worker, at a learning rate for each."""
    lrs = [lrs] * len(steps) if isinstance(lrs, float) else lrs
    betas = settings.pop("beta_1", 0.5), settings.pop("beta_2", 0.75)
    worker = Reference(start(), 1, lrs[0], betas, **settings)
    trajectory = []
    for worker.lr, step in zip(lrs, steps, strict=True):
        worker.step([step])
        trajectory.append([x.copy() for x in worker.parameters])
    return trajectory


def momentum_of(optimizer: Any, x: Any) -> Array:
    return numbers(optimizer.state_of(x)[0])


@everywhere
@pytest.mark.parametrize("settings", LIONS, ids=str)
def test_is_lion_where_lion_is_defined(settings: Settings) -> None:
    """All around the step is Keras' own: also clipping, averaging and accumulation must come to the same."""
    ours, given = signum(**settings), {"learning_rate": LR, "beta_1": 0.5, "beta_2": 0.75, **settings}
    theirs = keras.optimizers.Lion(**given)
    assert_equal(train(ours, gradients(4)), train(theirs, gradients(4)))
    state, expected = ([numbers(v) for v in optimizer.variables] for optimizer in (ours, theirs))
    assert_equal(state, expected)


@pytest.fixture(scope="module")
def of_torch() -> list[Trajectory]:
    """The trajectories of `signsgd_lightning.Signum`, which the package under test must not import."""
    import torch

    from signsgd_lightning import Signum as TorchSignum

    trajectories = []
    for settings in TORCH:
        xs = [torch.tensor(x, requires_grad=True) for x in start()]
        optimizer, trajectory = TorchSignum(xs, lr=LR, **settings), []
        for step in gradients():
            for x, g in zip(xs, step, strict=True):
                x.grad = torch.tensor(g)
            optimizer.step()
            trajectory.append([x.detach().numpy().copy() for x in xs])
        trajectories.append(trajectory)
    return trajectories


@everywhere
def test_is_the_torch_sides(of_torch: list[Trajectory]) -> None:
    for settings, expected in zip(TORCH, of_torch, strict=True):
        (beta_1, beta_2), others = settings["betas"], {k: v for k, v in settings.items() if k != "betas"}
        assert_equal(train(signum(beta_1=beta_1, beta_2=beta_2, **others), gradients()), expected)


@everywhere
def test_is_the_specifications_inside_a_compiled_step() -> None:
    """`stateless_apply` under `jax.jit`, `apply` in a `tf.function` with and without XLA, and torch as it is."""
    settings: Settings = {"verdict_momentum": 0.75, "weight_decay": 0.5, "warmup_steps": 2, "zeros": "alternate"}
    wild = gradients()
    wild[1][0][0] = [np.nan, np.inf, -np.inf, 1, -1]
    expected = reference(wild, **settings)
    for compiled in COMPILED[keras.backend.backend()]:
        optimizer, xs = signum(**settings), variables()
        optimizer.build(xs)
        take, trajectory = compiled(optimizer, xs), []
        for step in wild:
            take([keras.ops.convert_to_tensor(g) for g in step])
            trajectory.append([numbers(x) for x in xs])
        assert_equal(trajectory, expected)


def jax_stateless(optimizer: Any, xs: Any) -> Step:
    import jax

    apply = jax.jit(optimizer.stateless_apply)

    def take(step: Any) -> None:
        before = [v.value for v in optimizer.variables]
        moved, state = apply(before, step, [x.value for x in xs])
        for variable, value in [*zip(xs, moved, strict=True), *zip(optimizer.variables, state, strict=True)]:
            variable.assign(value)

    return take


def tf_function(optimizer: Any, xs: Any) -> Step:
    import tensorflow as tf

    take: Step = tf.function(lambda step: optimizer.apply_gradients(zip(step, xs, strict=True)))
    return take


def tf_xla(optimizer: Any, xs: Any) -> Step:
    import tensorflow as tf

    take: Step = tf.function(lambda step: optimizer.apply(step, xs), jit_compile=True)
    return take


def as_it_is(optimizer: Any, xs: Any) -> Step:
    return lambda step: optimizer.apply(step)


COMPILED = {"jax": [jax_stateless], "tensorflow": [tf_function, tf_xla], "torch": [as_it_is]}
"""What makes a compiled step, traced once, of an optimizer that is built and its variables."""


@everywhere
def test_weight_decay_is_decoupled_and_spares_what_is_excluded() -> None:
    """``x − lr·(u + λx)``, with ``u`` = +1: 4 − ¼·(1 + 2) = 3.25, without λ 3.75."""

    def moved(by_list: bool = False, by_name: str | None = None, **settings: Any) -> list[float]:
        optimizer, xs = signum(**settings), variables([np.full(1, 4.0)] * 3)
        if by_list or by_name:
            names = None if by_name is None else [by_name]
            optimizer.exclude_from_weight_decay(var_list=xs[:1] if by_list else None, var_names=names)
        return [float(x[0]) for x in train(optimizer, [[np.ones(1)] * 3], xs)[0]]

    assert moved(weight_decay=0.5) == [3.25, 3.25, 3.25]
    assert moved(weight_decay=0.5, by_list=True) == [3.75, 3.25, 3.25]
    assert moved(weight_decay=0.5, by_name="x2") == [3.25, 3.25, 3.75]
    assert moved(weight_decay=0.5, by_list=True, by_name="x2") == [3.75, 3.25, 3.75]
    assert moved(weight_decay=0.0) == moved(weight_decay=None) == [3.75, 3.75, 3.75]


@everywhere
def test_learning_rates() -> None:
    """A schedule's value at step `t`, a callable's, and one that is set between the steps."""
    rates = [0.5, 0.5, 0.25, 0.25, 0.125]
    expected = reference(gradients(), rates)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.5, 0.25, 0.125])
    assert [float(schedule(t)) for t in range(5)] == rates
    assert_equal(train(signum(learning_rate=schedule), gradients()), expected)

    left = iter(rates)
    assert_equal(train(signum(learning_rate=lambda: next(left)), gradients()), expected)

    optimizer, xs, trajectory = signum(learning_rate=0.5), variables(), []
    for rate, step in zip(rates, gradients(), strict=True):
        optimizer.learning_rate = rate
        trajectory += train(optimizer, [step], xs)
    assert_equal(trajectory, expected)
    assert numbers(optimizer.iterations) == 5


@everywhere
def test_moving_average() -> None:
    """The first value, then ``½·average + ½·x``; where it overwrites, it is what the next step moves."""
    for every in (None, 2):
        optimizer, xs = signum(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=every), variables()
        worker, averages = Reference(start(), 1, LR, (0.5, 0.75)), None
        for t, step in enumerate(gradients()):
            train(optimizer, [step], xs)
            worker.step([step])
            if averages is None:
                averages = [x.copy() for x in worker.parameters]
            averages = [(a + x) / 2 for a, x in zip(averages, worker.parameters, strict=True)]
            if every and t % every == every - 1:
                worker.parameters = [a.copy() for a in averages]
            assert_equal([numbers(x) for x in xs], worker.parameters)
            assert_equal([numbers(a) for a in optimizer._model_variables_moving_average], averages)
        optimizer.finalize_variable_values(xs)
        assert_equal([numbers(x) for x in xs], averages)


@everywhere_jax_nightly
def test_accumulated_gradients_are_one_vote_with_their_mean() -> None:
    """Momentum, warmup and the alternation of zeros count votes, not batches; between votes nothing moves."""
    steps = gradients(8)
    means = [[(a + b) / 2 for a, b in zip(*steps[k : k + 2], strict=True)] for k in range(0, 8, 2)]
    settings: Settings = {"zeros": "alternate", "warmup_steps": 2, "verdict_momentum": 0.5, "weight_decay": 0.5}
    trajectory = train(signum(gradient_accumulation_steps=2, **settings), steps)
    assert_equal(trajectory[1::2], reference(means, **settings))
    assert_equal(trajectory[::2], [start(), *trajectory[1:-1:2]])


@everywhere
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_gradients_are_clipped_before_they_enter_the_momentum(clip: str) -> None:
    """Of norm 4 and 1.5, clipped to 1: momentum 1·½·½, then ¼·½ − ½·½ < 0; unclipped it would stay positive."""
    steps = [[np.full(4, 2.0)], [np.full(4, -0.75)]]
    xs = variables([np.zeros(4)])
    optimizer = signum(beta_2=0.5, **{clip: 1.0})
    assert_equal(train(optimizer, steps, xs), [[np.full(4, -LR, np.float32)], [np.zeros(4, np.float32)]])
    np.testing.assert_allclose(momentum_of(optimizer, xs[0]), -0.125, rtol=1e-6)
    assert_equal(train(signum(beta_2=0.5), steps, variables([np.zeros(4)]))[-1], [np.full(4, -2 * LR, np.float32)])


@everywhere
def test_loss_scale_is_taken_out_of_the_gradients() -> None:
    optimizer, xs = signum(loss_scale_factor=8.0), variables()
    assert float(optimizer.scale_loss(keras.ops.convert_to_tensor(1.5))) == 12
    scaled = [[8 * g for g in step] for step in gradients()]
    assert_equal(train(optimizer, scaled, xs), reference(gradients()))
    plain, ys = signum(), variables()
    train(plain, gradients(), ys)
    assert_equal([momentum_of(optimizer, x) for x in xs], [momentum_of(plain, y) for y in ys])
