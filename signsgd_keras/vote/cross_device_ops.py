"""MajorityVote: an option of `tf.distribute.MirroredStrategy`, for how its replicas vote and reduce everything else."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from signsgd_core.adversaries import Adversary


class MajorityVote(tf.distribute.CrossDeviceOps):  # type: ignore[misc]
    """Carry a `MirroredStrategy`'s ballots through the process' memory; an option, also to try faulty replicas.

    `Signum` votes among several replicas with it or without it, with the same verdicts. Without it the ballots travel
    by TensorFlow's collectives, and ``steps_per_execution`` must be 1. With it they go through memory, any
    ``steps_per_execution`` works, and `adversaries` try what a vote withstands. It takes no step by itself: everything
    else that is reduced (losses, metrics, batch statistics, gradients of other optimizers) goes unchanged to the op
    that it wraps.

    Args:
        wrapped: the op for everything else; `tf.distribute.ReductionToOneDevice()` where left out.
        adversaries: replica -> function of its gradients, which returns those that it votes with
            (`signsgd_core.adversaries`): of clipped and, where they are accumulated, mean gradients. A replica whose
            function returns None, as `silent` does, votes with a gradient of zeros. If it does so always, its ballots
            are neutral by the zero rule, and under "abstain" it casts none.

    Raises:
        TypeError: if `wrapped` is not a `tf.distribute.CrossDeviceOps`.
        ValueError: when `Signum` is built, if there is no such replica.

    Example:
        >>> strategy = tf.distribute.MirroredStrategy(["CPU:0"], cross_device_ops=MajorityVote())
    """

    def __init__(self, wrapped: Any = None, adversaries: Mapping[int, Adversary] | None = None) -> None:
        super().__init__()
        wrapped = tf.distribute.ReductionToOneDevice() if wrapped is None else wrapped
        if not isinstance(wrapped, tf.distribute.CrossDeviceOps):
            raise TypeError(f"MajorityVote wraps a tf.distribute.CrossDeviceOps, got {wrapped!r}")
        self.wrapped, self.adversaries = wrapped, adversaries or {}

    def reduce_implementation(self, reduce_op: Any, per_replica_value: Any, destinations: Any, options: Any) -> Any:
        """Reduce a value by the wrapped op."""
        return self.wrapped.reduce_implementation(reduce_op, per_replica_value, destinations, options)

    def batch_reduce_implementation(self, reduce_op: Any, value_destination_pairs: Any, options: Any) -> Any:
        """Reduce several values by the wrapped op."""
        return self.wrapped.batch_reduce_implementation(reduce_op, value_destination_pairs, options)

    def broadcast_implementation(self, tensor: Any, destinations: Any) -> Any:
        """Broadcast a tensor by the wrapped op."""
        return self.wrapped.broadcast_implementation(tensor, destinations)

    def _gather_implementation(self, per_replica_value: Any, destinations: Any, axis: Any, options: Any) -> Any:
        return self.wrapped._gather_implementation(per_replica_value, destinations, axis, options)
