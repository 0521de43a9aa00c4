"""The strategy for several machines: MultiWorkerMirroredStrategy as Keras 3 needs it, and the vote over it."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from signsgd_core.adversaries import Adversary, check_adversaries

from ._compat import CollectiveAllReduceExtended


def patient() -> Any:
    """Return TensorFlow's options for exchanges that wait for other workers as long as torch's: half an hour."""
    return tf.distribute.experimental.CommunicationOptions(timeout_seconds=1800.0)


def warn_if_alone() -> None:
    """Say that this worker is the only one, where the variable that names all is not set: TensorFlow is silent."""
    if "TF_CONFIG" not in os.environ:
        warnings.warn(
            "TF_CONFIG is not set, so this process trains alone and exchanges nothing: set it on every machine",
            stacklevel=3,
        )


class MultiWorkerMajorityVoteStrategy(tf.distribute.MultiWorkerMirroredStrategy):  # type: ignore[misc]
    """Train synchronously on several machines; `Signum` sends one bit per parameter each way.

    Ballots travel by TensorFlow's all-to-all, verdicts by its all-gather: ``2·(M−1)/M·d`` bits for each of `M` workers.
    Keras' own optimizers average gradients in full precision, as ever. `fit`, `evaluate` and `predict` work, which
    under the base class fail in Keras 3 (keras#20585): Keras asks it for the mean of a whole batch, to learn shapes,
    and for means of scalars along an axis that they have not.

    As under the base class every worker runs the same program, saving included, and a worker that is lost ends the
    others with `tf.errors.UnavailableError` or another `tf.errors.OpError`.

    Args:
        cluster_resolver: a `tf.distribute.cluster_resolver.ClusterResolver`; the environment variable ``TF_CONFIG``
            where left out.
        communication_options: a `tf.distribute.experimental.CommunicationOptions`. Its ``timeout_seconds`` bounds how
            long a worker waits in one exchange; 30 minutes where left out.
        adversaries: replica, counted over all workers -> what it makes of its gradients before it votes, as in
            `MajorityVote`.

    Raises:
        ValueError: if there is no such replica.

    Example:
        >>> strategy = MultiWorkerMajorityVoteStrategy()  # doctest: +SKIP
        >>> with strategy.scope():  # doctest: +SKIP
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        ...     model.compile(optimizer=Signum(learning_rate=1e-3), loss="mse")
        >>> model.fit(x, y)  # doctest: +SKIP
    """

    def __init__(
        self,
        cluster_resolver: Any = None,
        communication_options: Any = None,
        adversaries: Mapping[int, Adversary] | None = None,
    ) -> None:
        if cluster_resolver is None:
            warn_if_alone()
        options = communication_options or patient()
        extended = _Extended(self, cluster_resolver=cluster_resolver, communication_options=options)
        tf.distribute.Strategy.__init__(self, extended)
        check_adversaries(adversaries, self.num_replicas_in_sync, "replica")
        self.adversaries = dict(adversaries or {})

    def reduce(self, reduce_op: Any, value: Any, axis: Any) -> Any:
        """Reduce a value, or every value of a structure, across replicas.

        The mean of a batch, a structure of tensors that are no scalars, is this worker's own first: Keras asks so for
        a batch to build the model with, and batches of workers may differ in shape.

        Args:
            reduce_op: "SUM" or "MEAN", or a `tf.distribute.ReduceOp`.
            value: a `tf.distribute.DistributedValues` or tensor, or a structure of them.
            axis: along which to reduce within each replica; scalars have none.
        """
        if tf.nest.is_nested(value) and not isinstance(value, tf.distribute.DistributedValues):
            means = reduce_op in ("MEAN", tf.distribute.ReduceOp.MEAN)
            if means and not any(map(self._is_scalar, tf.nest.flatten(value))):
                return tf.nest.map_structure(lambda v: self.experimental_local_results(v)[0], value)
            return tf.nest.map_structure(lambda v: self.reduce(reduce_op, v, axis), value)
        return super().reduce(reduce_op, value, None if self._is_scalar(value) else axis)

    def _is_scalar(self, value: Any) -> bool:
        """Tell whether a value is a number on every replica of this worker."""
        return all(tf.is_tensor(v) and v.shape.rank == 0 for v in self.experimental_local_results(value))


class _Extended(CollectiveAllReduceExtended):  # type: ignore[misc]
    """Makes the workers agree whether a step is skipped: Keras' `LossScaleOptimizer` asks each worker for its own."""

    def _call_for_each_replica(self, fn: Any, args: Any, kwargs: Any) -> Any:
        owner = getattr(fn, "__self__", None)
        if not isinstance(owner, keras.optimizers.LossScaleOptimizer) or fn.__name__ != "check_finite":
            return super()._call_for_each_replica(fn, args, kwargs)

        def overflows(grads: Any) -> Any:
            return 1 - tf.cast(fn(grads), tf.int32)

        overflowed = super()._call_for_each_replica(overflows, args, kwargs)
        return tf.equal(self._container_strategy().reduce("SUM", overflowed, axis=None), 0)
