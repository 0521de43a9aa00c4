"""A variable worked on tile by tile ends as one worked on at once; a gradient loses what is not finite."""

from typing import Any

import keras
import numpy as np
import pytest

from signsgd_core import TILE
from signsgd_keras.backend import current

from .backends import eighths, everywhere, numbers


def pair(*shape: int) -> tuple[Any, Any]:
    x = eighths(*shape)
    return keras.Variable(x), keras.ops.convert_to_tensor(x + 1)


@everywhere
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (TILE,), (TILE + 1,), (2, TILE - 3)], ids=str)
def test_tiles_cover_everything_once(shape: tuple[int, ...]) -> None:
    """Adding one to every tile adds one everywhere, in the variable itself."""
    variable, tensor = pair(*shape)
    sizes = []
    for x, nothing, y in current().tiles(variable, None, tensor):
        assert nothing is None
        assert tuple(x.shape) == tuple(y.shape)
        sizes.append(int(np.prod(x.shape)))
        current().write(x, y + 1)
        current().descend(x, 2 * keras.ops.ones(y.shape), keras.ops.convert_to_tensor(0.5))
    np.testing.assert_array_equal(numbers(variable), eighths(*shape) + 1, strict=True)
    assert sum(sizes) == np.prod(shape)
    if keras.backend.backend() == "torch":
        assert all(size == TILE for size in sizes[:-1])
    else:
        assert len(sizes) == 1


@everywhere
def test_what_is_not_contiguous_stays_whole() -> None:
    """A gradient may be a view in another order; tiles of it would be other coordinates."""
    variable, _ = pair(3, 5)
    gradient = keras.ops.transpose(keras.ops.convert_to_tensor(eighths(5, 3, seed=1)))
    (tile,) = current().tiles(variable, gradient)
    for whole in tile:
        assert tuple(whole.shape) == (3, 5)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(tile[1]), eighths(5, 3, seed=1).T)
    current().write(tile[0], tile[1])
    np.testing.assert_array_equal(numbers(variable), eighths(5, 3, seed=1).T)


@everywhere
@pytest.mark.parametrize("compiled", [False, True])
def test_finite(compiled: bool) -> None:
    """Also where the sum of finite numbers overflows."""
    largest = np.finfo(np.float32).max
    finite: Any = current().finite
    if compiled and keras.backend.backend() == "jax":
        import jax

        finite = jax.jit(finite)
    elif compiled and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        finite = tf.function(finite, jit_compile=True)
    for given, expected in (
        ([1.0, -2.0, 0.0], [1.0, -2.0, 0.0]),
        ([np.nan, -2.0, 3.0], [0.0, -2.0, 3.0]),
        ([np.inf, -np.inf, largest], [0.0, 0.0, largest]),
        ([largest, largest, -1.0], [largest, largest, -1.0]),
    ):
        result = finite(keras.ops.convert_to_tensor(np.array(given, np.float32)))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(result), np.array(expected, np.float32), strict=True)
