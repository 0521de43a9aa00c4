"""The one place that touches private names of TensorFlow; `tests/keras/test_internals.py` fails if one moves."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
from tensorflow.python.distribute.cross_device_ops import CollectiveAllReduce
from tensorflow.python.distribute.distribute_utils import regroup
from tensorflow.python.ops import collective_ops, control_flow_util

Tensor = Any

__all__ = [
    "CollectiveAllReduce",
    "CollectiveAllReduceExtended",
    "all_gather",
    "all_to_all",
    "cross_device_ops",
    "gather_now",
    "in_keras_loop",
    "in_xla",
    "per_replica",
]


def cross_device_ops(strategy: Any) -> Any:
    """Return the op that reduces between the devices of a `MirroredStrategy` or `MultiWorkerMirroredStrategy`."""
    extended = strategy.extended
    return extended._cross_device_ops or extended._inferred_cross_device_ops


def per_replica(values: Sequence[Any]) -> Any:
    """Return one value for each replica of this worker as `tf.distribute.DistributedValues`."""
    return regroup(tuple(values))


def in_xla() -> bool:
    """Tell whether the function that is being traced is to be compiled by XLA."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def in_keras_loop() -> bool:
    """Tell whether Keras' loop over several batches (``steps_per_execution``) is being traced."""
    graph, inside, looped = tf.compat.v1.get_default_graph(), False, False
    while graph is not None:
        inside = inside or getattr(graph, "name", "").startswith("one_step_on_data")
        looped = looped or (inside and getattr(graph, "is_control_flow_graph", False))
        graph = getattr(graph, "outer_graph", None)
    return looped


def all_to_all(ops: CollectiveAllReduce, device: int, rows: Tensor) -> Tensor:
    """Send row `i` to replica `i`; row `j` of the result is what replica `j` sent here.

    Args:
        ops: of all workers.
        device: index of this worker's device.
        rows: int32 of shape (replicas, …).
    """
    return _launch(collective_ops.all_to_all_v2, ops, device, rows)


def all_gather(ops: CollectiveAllReduce, device: int, rows: Tensor) -> Tensor:
    """Return the rows of all replicas, int32, one replica's after the other's."""
    return _launch(collective_ops.all_gather_v2, ops, device, rows)


def gather_now(ops: CollectiveAllReduce, row: Any) -> Any:
    """Return the row, int32, of every worker, shape (workers, …), also while a function is being traced."""
    with tf.init_scope():
        rows = _gatherer(ops)(tf.constant(row))
    return rows[0].numpy()[:: len(rows)]


@cache
def _gatherer(ops: CollectiveAllReduce) -> Any:
    """Once for all, since a new function for every call would be traced anew and kept."""

    @tf.function  # type: ignore[untyped-decorator]
    def gather(row: Tensor) -> list[Tensor]:
        return [all_gather(ops, device, row[None]) for device in range(len(ops._devices))]

    return gather


def _launch(collective: Any, ops: CollectiveAllReduce, device: int, value: Tensor) -> Tensor:
    launcher = ops._launchers[device]
    with tf.device(launcher._device):
        return collective(
            value,
            launcher._group_size,
            launcher._group_key,
            launcher._next_instance_key(),
            communication_hint=launcher._options.implementation.value,
            timeout=launcher._options.timeout_seconds or 0,
            ordering_token=launcher._get_ordering_token(),
        )
