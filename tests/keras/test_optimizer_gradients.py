"""What `Signum` makes of odd gradients (not finite, missing, sparse, of half precision), and which state it keeps."""

import re
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest

from signsgd_core import Reference
from signsgd_keras import Signum

from .backends import SHAPES, Array, assert_equal, eighths, everywhere, gradients, numbers, train, variables
from .test_optimizer import LR, Settings, momentum_of, signum


@everywhere
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_counts_as_zero(bad: float) -> None:
    """Momentum 2, 1, −1 in the first coordinate: the second vote there is momentum alone."""
    xs = variables([np.zeros(2)])
    optimizer = signum(beta_2=0.5)
    steps = [[np.array(g)] for g in ([4.0, 4.0], [bad, 4.0], [-3.0, 4.0])]
    trajectory = train(optimizer, steps, xs)
    assert [step[0].tolist() for step in trajectory] == [[-LR, -LR], [-2 * LR, -2 * LR], [-LR, -3 * LR]]
    assert momentum_of(optimizer, xs[0]).tolist() == [-1.0, 3.5]


@everywhere
def test_variables_without_a_gradient_stay_untouched() -> None:
    """With decay and both momenta; the zero rule goes on counting."""
    xs = variables([np.full(2, 4.0), np.full(2, 4.0)])
    optimizer = signum(weight_decay=0.5, verdict_momentum=0.5, beta_2=0.5)
    first = train(optimizer, [[np.ones(2), np.ones(2)]], xs)[0]
    state = [numbers(v) for v in optimizer.state_of(xs[1])]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        moved = train(optimizer, [[np.ones(2), None]], xs)[0]
    assert_equal(moved[1], first[1])
    assert (moved[0] < first[0]).all()
    assert_equal([numbers(v) for v in optimizer.state_of(xs[1])], state)
    assert numbers(optimizer.iterations) == 2
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        train(optimizer, [[None, None]], xs)


def sparse() -> Any:
    """Rows 0 and 2 of three; row 2 comes twice where repeated rows exist."""
    rows, values = [0, 2, 2], [[1.0, -1.0], [3.0, 0.0], [-1.0, 1.0]]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant([3, 2]))
    if keras.backend.backend() == "torch":
        import torch

        return torch.sparse_coo_tensor(torch.tensor([rows]), torch.tensor(values), (3, 2))
    from jax.experimental.sparse import BCOO

    dense: Any = np.array([[1.0, -1.0], [0.0, 0.0], [2.0, 1.0]], np.float32)
    return BCOO.fromdense(dense, n_batch=0, n_dense=1)


SPARSE: dict[str, tuple[Settings, ...]] = {
    "tensorflow": ({"clipvalue": 0.5}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}, {"gradient_accumulation_steps": 2}),
    "jax": ({"loss_scale_factor": 2.0},),
    "torch": ({"loss_scale_factor": 2.0}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}),
}
"""What Keras' own Lion takes with such gradients; with all else it raises."""


@everywhere
def test_sparse_gradients() -> None:
    """Repeated rows add up, and the rows that are not in the gradient go on by their momentum."""
    dense, other = np.array([[1, -1], [0, 0], [2, 1]], np.float32), np.full((3, 2), -0.25, np.float32)
    worker = Reference([np.ones((3, 2), np.float32)], 1, LR, (0.5, 0.75))
    xs, optimizer = variables([np.ones((3, 2))]), signum()
    for g, exact in ((sparse(), dense), (keras.ops.convert_to_tensor(other), other), (sparse(), dense)):
        optimizer.apply([g], xs)
        worker.step([[exact]])
        assert_equal([numbers(xs[0])], worker.parameters)
    for settings in SPARSE[keras.backend.backend()]:
        ends = []
        for cls in (Signum, keras.optimizers.Lion):
            xs, taken = variables([np.ones((3, 2))]), cls(LR, beta_1=0.5, beta_2=0.75, **settings)
            for _ in range(2):
                taken.apply([sparse()], xs)
            ends.append(numbers(xs[0]))
        assert_equal([ends[0]], [ends[1]])


@everywhere
def test_state_exists_only_where_a_setting_needs_it() -> None:
    for settings, kinds in (
        ({"beta_1": 0.0, "beta_2": 0.0}, []),
        ({"beta_1": 0.0, "beta_2": 0.5}, []),
        ({}, ["momentum"]),
        ({"beta_1": 0.0, "beta_2": 0.0, "verdict_momentum": 0.5}, ["verdict_momentum"]),
        ({"verdict_momentum": 0.5}, ["momentum", "verdict_momentum"]),
    ):
        optimizer, xs = signum(**settings, name="vote"), variables()
        train(optimizer, gradients(1), xs)
        expected = [f"vote/x{k}_{kind}" for kind in kinds for k in range(len(SHAPES))]
        assert [v.path for v in optimizer.variables] == ["vote/iteration", "vote/learning_rate", *expected]
        assert {keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables[2:]} <= {"float32"}


@everywhere
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_variables_round_once_and_keep_float32_momenta(dtype: str) -> None:
    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x: Array = np.random.default_rng(0).standard_normal(500).astype(half)
    xs = variables([x.astype(np.float32)], dtype=dtype)
    optimizer = signum(learning_rate=0.003, weight_decay=0.1, verdict_momentum=0.3)
    u: Array = np.zeros(500, np.float32)
    m: Array = np.zeros(500, np.float32)
    lr, decay, g = np.float32(0.003), np.float32(0.1), eighths(500, seed=1)
    for t in range(3):
        train(optimizer, [[g]], xs)
        u = np.float32(0.3) * u + np.float32(0.7) * np.sign(g)
        m = (3 * m + g) / 4
        x = (x.astype(np.float32) - lr * (u + decay * x.astype(np.float32))).astype(half)
        np.testing.assert_array_equal(numbers(xs[0]).astype(half), x, err_msg=f"after step {t}")
    momentum, average = optimizer.state_of(xs[0])
    assert momentum is not None
    assert average is not None
    assert {keras.backend.standardize_dtype(v.dtype) for v in (momentum, average)} == {"float32"}
    np.testing.assert_allclose(numbers(average), u, rtol=1e-6)
    assert_equal([numbers(momentum)], [m])


@everywhere
@pytest.mark.parametrize("shape", [(1,), (3, 2), (6,)])
def test_a_gradient_of_another_shape_alone(shape: tuple[int, ...]) -> None:
    x, optimizer = keras.Variable(np.ones((2, 3), np.float32), name="x"), signum()
    with pytest.raises(ValueError, match=re.escape(f"the gradient of x has shape {shape} and the variable (2, 3)")):
        optimizer.apply([keras.ops.ones(shape)], [x])
    assert (numbers(x) == 1).all()


@everywhere
def test_a_complex_variable() -> None:
    """Its imaginary part was dropped."""
    x = keras.Variable(np.ones(2, np.complex64), dtype="complex64", name="x")
    with pytest.raises(ValueError, match="x is complex64, and a complex number has no sign"):
        signum().build([x])
