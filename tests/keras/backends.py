"""Tests that run on every Keras backend, each in a process with that backend, and what they train."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.tiers import nightly_where

BACKENDS = ("tensorflow", "jax", "torch")

Array = npt.NDArray[Any]
Test = Callable[..., None]


def everywhere(test: Test, nightly: Sequence[str] = ()) -> Test:
    """Let a test's body run once on each backend, in the process that has it; on some of them nightly.

    Its arguments are those of `pytest.mark.parametrize` and fixtures whose values can be sent.
    """

    def call(name: str, backend: Any, **arguments: Any) -> None:
        backend(name).run(_call, test.__module__, test.__name__, arguments)

    names = nightly_where(lambda name: name in nightly, BACKENDS)
    run: Test = pytest.mark.parametrize("name", names)(wraps(test)(call))

    asked: Any = run  # what pytest sees
    keys = ("name", "backend", *inspect.signature(test).parameters)
    asked.__signature__ = inspect.Signature([inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in keys])
    return run


everywhere_jax_nightly = partial(everywhere, nightly=["jax"])
"""Where JAX, which compiles every operation by itself, takes several times as long, and the rule is no backend's."""


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(import_module(module), name).__wrapped__(**arguments)


def eighths(*shape: int, seed: int = 0) -> Array:
    """Dyadic numbers, a seventh of them zero."""
    return np.asarray(np.random.default_rng(seed).integers(-3, 4, shape) / 8, np.float32)


SHAPES = ((3, 5), (), (0,), (37,), (2, 3, 4))


def start() -> list[Array]:
    """The parameters that `train` begins with."""
    return [eighths(*shape) for shape in SHAPES]


def gradients(steps: int = 5) -> list[list[Array]]:
    """Gradients of all parameters, [step][tensor]."""
    return [[eighths(*shape, seed=1 + t) for shape in SHAPES] for t in range(steps)]


def variables(parameters: Sequence[Array] | None = None, dtype: str = "float32") -> list[Any]:
    """Fresh Keras variables of these values."""
    import keras

    values = start() if parameters is None else parameters
    return [keras.Variable(x, dtype=dtype, name=f"x{k}") for k, x in enumerate(values)]


def numbers(variable: Any) -> Array:
    """A variable's value, float32 where NumPy has no such dtype."""
    import keras

    value: Array = keras.ops.convert_to_numpy(variable)
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value.copy()


def train(optimizer: Any, steps: Sequence[Sequence[Any]], xs: Sequence[Any] | None = None) -> list[list[Array]]:
    """Apply gradients and return the parameters after each step; None stays None."""
    import keras

    xs = variables() if xs is None else xs
    trajectory = []
    for step in steps:
        given = [
            None if g is None else keras.ops.convert_to_tensor(g, dtype=x.dtype) for g, x in zip(step, xs, strict=True)
        ]
        optimizer.apply(given, xs)
        trajectory.append([numbers(x) for x in xs])
    return trajectory


def assert_equal(one: Any, other: Any) -> None:
    """Two trajectories, or lists of arrays, are the same bit for bit."""
    assert len(one) == len(other)
    for t, (a, b) in enumerate(zip(one, other, strict=True)):
        if isinstance(a, list):
            assert_equal(a, b)
        else:
            np.testing.assert_array_equal(a, b, err_msg=f"number {t}", strict=True)
