"""TensorFlow: the backend that votes, among the replicas of a `tf.distribute` strategy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from keras import ops

from .. import _compat
from ..replica_variable import ReplicaVariable
from ..replicas import Replicas
from ..traced import traced_once
from ..variables import native
from .base import Backend, GradientRows, Inherit, Product

Tensor = Any
Variable = Any
Array = npt.NDArray[Any]


class TensorFlow(Backend):
    """The TensorFlow backend."""

    can_vote = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._finite = traced_once(tf.TensorSpec([None], tf.float32))(super().finite)

    def workers(self, optimizer: Any) -> Replicas:
        """Return the replicas of the strategy in whose scope the optimizer was made."""
        return Replicas(_compat.strategy_of(optimizer))

    def private_variable(self, workers: Any, inherit: Inherit, **options: Any) -> Variable:
        """Return a variable that is saved with the rows of all replicas."""
        return ReplicaVariable(workers, inherit, **options)

    def read(self, variable: Variable) -> Array:
        """Return a variable's value, or the rows of all replicas, which all workers must then ask for."""
        if isinstance(variable, ReplicaVariable) and variable.replicas.count > 1:
            return variable.rows()
        return super().read(variable)

    def inherit(self, variable: Variable, rows: Array, inherit: Inherit) -> None:
        """Go on from the rows of any number of replicas, each replica from its own."""
        if isinstance(variable, ReplicaVariable):
            variable.inherit(rows)
        else:
            super().inherit(variable, rows, inherit)

    def dense(self, gradient: Tensor, variable: Variable) -> Tensor:
        """Return a gradient with an entry for every coordinate, of a known shape."""
        if isinstance(gradient, tf.IndexedSlices):
            return ops.scatter(ops.expand_dims(gradient.indices, -1), gradient.values, variable.shape)
        tensor = super().dense(gradient, variable)
        known = tensor.shape.is_fully_defined()  # TensorFlow learns some shapes only when it runs
        return tensor if known else ops.reshape(tensor, variable.shape)

    def is_compiled(self) -> bool:
        """Tell whether XLA compiles the step."""
        return _compat.in_xla()

    def finite(self, gradient: Tensor) -> Tensor:
        """Return a gradient with every NaN and ±Inf replaced by 0 (step 1)."""
        if self.is_compiled():
            return super().finite(gradient)
        return tf.reshape(self._finite(tf.reshape(gradient, [-1])), gradient.shape)

    def descend(self, target: Variable, direction: Tensor, rate: Tensor) -> None:
        """Take ``rate·direction`` from a variable, in one pass over memory."""
        tf.raw_ops.ResourceApplyGradientDescent(var=native(target).handle, alpha=rate, delta=direction)

    def gradient_rows(self, model: Any, samples: int, coordinates: int) -> GradientRows:
        """Return rows in a variable of each replica."""
        return _Rows(Replicas(model.distribute_strategy), samples, coordinates)

    def hessian_product(self, loss: Callable[[Any], Tensor], model: Any, variables: Sequence[Variable]) -> Product:
        """Return the derivative of the gradient, along a vector."""
        values, zeros = [native(v) for v in variables], tf.UnconnectedGradients.ZERO
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                scalar = loss(model)
            gradients = inner.gradient(scalar, values, unconnected_gradients=zeros)
            gradients = [self.dense(*pair) for pair in zip(gradients, variables, strict=True)]
        return lambda z: outer.gradient(gradients, values, z, zeros)


class _Rows(GradientRows):
    """In a variable of each replica, which a graph writes to."""

    def __init__(self, replicas: Replicas, samples: int, coordinates: int) -> None:
        super().__init__(samples)
        self._replicas = replicas
        self.replicas, self.is_first_worker = replicas.count, replicas.is_first_worker
        self._buffer = replicas.variable(tf.zeros([samples, coordinates]))
        self._seen = replicas.variable(0, tf.int64)

    def put(self, row: Callable[[], Tensor]) -> None:
        seen = tf.identity(self._seen)

        def keep() -> None:
            tf.raw_ops.ResourceScatterUpdate(resource=self._buffer.handle, indices=seen, updates=row())
            self._seen.assign_add(1)

        tf.cond(seen < self._samples, keep, lambda: None)

    def take(self) -> list[Array]:
        local = map(self._replicas.local, (self._buffer, self._seen))
        rows = [buffer.numpy()[: int(seen)] for buffer, seen in zip(*local, strict=True)]
        self._seen.assign(0)
        return rows

    def gather(self, values: list[Array]) -> Array:
        return self._replicas.gather([np.asarray(value) for value in values])
