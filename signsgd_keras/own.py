"""What each replica has its own: its number, and the sums of its gradients since its last vote."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

Tensor = Any
Variable = Any


def own_number(strategy: Any) -> tuple[int, int]:
    """Return the number of the replica that runs this, among those of all workers and among this worker's."""
    replica = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
    return replica, replica % len(strategy.extended.worker_devices)


def mean_gradients(
    strategy: Any, gradients: Sequence[Sequence[Tensor]], sums: Sequence[Variable], steps: int
) -> list[list[Tensor]]:
    """Return each replica's mean gradients since its last vote, and start over; in cross-replica context.

    Args:
        strategy: of the replicas.
        gradients: of this worker's replicas, each a list, at the last of the steps.
        sums: of those before, each replica's own.
        steps: how many.
    """

    def mean() -> list[Tensor]:
        means = [(g + s) / steps for g, s in zip(gradients[own_number(strategy)[1]], sums, strict=True)]
        with tf.control_dependencies(means):
            for s in sums:
                s.assign(tf.zeros_like(s))
        return means

    means = strategy.extended.call_for_each_replica(mean)
    return [list(row) for row in zip(*(strategy.experimental_local_results(m) for m in means), strict=True)]


def accumulate(strategy: Any, gradients: Sequence[Sequence[Tensor]], sums: Sequence[Variable]) -> None:
    """Add each replica's gradients to its sums; in cross-replica context."""

    def add() -> None:
        for g, s in zip(gradients[own_number(strategy)[1]], sums, strict=True):
            s.assign_add(g)

    strategy.extended.call_for_each_replica(add)
