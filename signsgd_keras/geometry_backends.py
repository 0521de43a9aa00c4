"""What GeometryMonitor needs of each backend: a place for rows of gradients, and products with a Hessian."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from . import blocks

Tensor = Any
Variable = Any
Array = npt.NDArray[Any]
Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""Takes a tensor for each variable and returns the Hessian's product with them."""


def rows(model: Any, samples: int, coordinates: int) -> "Rows":
    """Return an empty place for rows of gradients of a model, each of so many coordinates."""
    kind = {"tensorflow": _TensorFlowRows, "jax": _JaxRows, "torch": Rows}[keras.backend.backend()]
    return kind(model, samples, coordinates)


def hessian(loss: Callable[[Any], Tensor], model: Any, variables: Sequence[Variable]) -> Product:
    """Return what multiplies by the Hessian of a loss of a model by these variables, at their values now."""
    kind = {"tensorflow": _tensorflow_hessian, "jax": _jax_hessian, "torch": _torch_hessian}[keras.backend.backend()]
    product: Product = kind(loss, model, variables)
    return product


class Rows:
    """What is kept of gradients, at most `samples` rows at a time: on their device, which need not wait."""

    replicas, chief = 1, True

    def __init__(self, model: Any, samples: int, coordinates: int) -> None:
        self._samples, self._kept = samples, list[Any]()

    def put(self, row: Callable[[], Tensor]) -> None:
        """Keep what `row` returns, if there is still room; called where the optimizer applies gradients."""
        if len(self._kept) < self._samples:
            self._kept.append(row())

    def take(self) -> list[Array]:
        """Return the rows of each local replica, and make room."""
        rows, self._kept = self._kept, []
        return [np.stack([ops.convert_to_numpy(row) for row in rows])] if rows else [np.zeros((0, 1))]

    def gather(self, own: list[Array]) -> Array:
        """Return what all replicas of all workers have, of what each of the local ones has."""
        return np.stack(own)


class _JaxRows(Rows):
    def put(self, row: Callable[[], Tensor]) -> None:
        import jax

        def arrived(found: Tensor) -> None:
            Rows.put(self, lambda: found)

        jax.debug.callback(arrived, row())

    def take(self) -> list[Array]:
        import jax

        jax.effects_barrier()  # type: ignore[no-untyped-call]
        return super().take()


class _TensorFlowRows(Rows):
    def __init__(self, model: Any, samples: int, coordinates: int) -> None:
        import tensorflow as tf

        super().__init__(model, samples, coordinates)
        self._strategy = model.distribute_strategy
        self.replicas, self.chief = self._strategy.num_replicas_in_sync, self._strategy.extended.should_checkpoint
        private = {
            "trainable": False,
            "synchronization": tf.VariableSynchronization.ON_READ,
            "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
        }
        with self._strategy.scope():
            self._buffer = tf.Variable(tf.zeros([samples, coordinates]), **private)
            self._seen = tf.Variable(0, dtype=tf.int64, **private)

    def put(self, row: Callable[[], Tensor]) -> None:
        import tensorflow as tf

        seen = tf.identity(self._seen)

        def keep() -> None:
            tf.raw_ops.ResourceScatterUpdate(resource=self._buffer.handle, indices=seen, updates=row())
            self._seen.assign_add(1)

        tf.cond(seen < self._samples, keep, lambda: None)

    def take(self) -> list[Array]:
        local = map(self._strategy.experimental_local_results, (self._buffer, self._seen))
        rows = [buffer.numpy()[: int(seen)] for buffer, seen in zip(*local, strict=True)]
        self._seen.assign(0)
        return rows

    def gather(self, own: list[Array]) -> Array:
        if self.replicas == 1:
            return super().gather(own)
        import tensorflow as tf

        from .internals import per_replica

        rows: Array = self._strategy.gather(per_replica([tf.constant(row[None]) for row in own]), axis=0).numpy()
        return rows


def _tensorflow_hessian(loss: Any, model: Any, variables: Sequence[Variable]) -> Any:
    import tensorflow as tf

    values, none = [v.value for v in variables], tf.UnconnectedGradients.ZERO
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            scalar = loss(model)
        gradients = inner.gradient(scalar, values, unconnected_gradients=none)
        gradients = [blocks.dense(*pair) for pair in zip(gradients, variables, strict=True)]
    return lambda z: outer.gradient(gradients, values, z, none)


def _jax_hessian(loss: Any, model: Any, variables: Sequence[Variable]) -> Any:
    import jax

    def stateless(values: Sequence[Tensor]) -> Tensor:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return loss(model)

    return jax.linearize(jax.grad(stateless), [v.value for v in variables])[1]


def _torch_hessian(loss: Any, model: Any, variables: Sequence[Variable]) -> Any:
    import torch

    values = [v.value for v in variables]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(model), values, create_graph=True, materialize_grads=True)
    bent = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]
    if not bent:
        return lambda z: [None] * len(z)
    return lambda z: torch.autograd.grad(
        [gradients[k] for k in bent], values, [z[k] for k in bent], retain_graph=True, materialize_grads=True
    )
