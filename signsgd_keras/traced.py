"""Functions of TensorFlow that a graph holds once, however many variables they are called for."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import tensorflow as tf

Tensor = Any
Function = Callable[..., Tensor]


def traced_once(*signature: tf.TensorSpec) -> Callable[[Function], Function]:
    """Return a decorator by which graphs call one trace of a function.

    TensorFlow inlines the calls when it runs the graph. What is saved is Python's time: a step's operations are
    otherwise made anew for every variable of every replica. Without a graph the function is called as it is.

    Args:
        signature: of the function's arguments.

    Example:
        >>> @traced_once(tf.TensorSpec([None]))
        ... def double(x):
        ...     return 2 * x
        >>> double(tf.constant([1.0, 2.0])).numpy()
        array([2., 4.], dtype=float32)
    """

    def decorate(function: Function) -> Function:
        traced = tf.function(function, input_signature=signature, autograph=False)

        @wraps(function)
        def call(*args: Tensor) -> Tensor:
            return function(*args) if tf.executing_eagerly() else traced(*args)

        return call

    return decorate
