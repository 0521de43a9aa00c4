"""Every private name of Keras and TensorFlow that is used, and who needs it; a test fails for each that moves.

`Signum`, `LossScaleOptimizer`, `ReplicaVariable`, `MajorityVote` and the strategy also override or call private methods
of the classes that they extend. `tests/keras/test_compat.py` lists those, too.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras

if keras.backend.backend() == "tensorflow":  # on the others only names of Keras itself are asked for
    import tensorflow as tf
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
    from tensorflow.python.checkpoint import tensor_callable
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
    from tensorflow.python.distribute.cross_device_ops import CollectiveAllReduce
    from tensorflow.python.distribute.distribute_utils import regroup
    from tensorflow.python.eager import context
    from tensorflow.python.ops import collective_ops, control_flow_util

Tensor = Any

__all__ = [
    "CollectiveAllReduce",
    "CollectiveAllReduceExtended",
    "all_gather",
    "all_to_all",
    "cross_device_ops",
    "gather_now",
    "group_size",
    "host_ops",
    "in_keras_loop",
    "in_xla",
    "lost_workers",
    "per_replica",
    "read_when_saved",
    "saved_name",
    "saved_variables",
    "strategy_of",
    "trainable_variables",
    "unbuilt_layers",
]


def strategy_of(optimizer: Any) -> Any:
    """Return the `tf.distribute` strategy in whose scope an optimizer was made; for `backend.tensorflow`."""
    return optimizer._distribution_strategy


def trainable_variables(optimizer: Any) -> list[Any]:
    """Return the model variables that an optimizer was built with; for `vote.verification` and the monitors."""
    return list(optimizer._trainable_variables)


def unbuilt_layers(model: Any) -> list[str]:
    """Return the names of a model and its layers that may have variables to come; for `local_steps.rounds`."""
    layers = [layer for layer in model._flatten_layers() if not layer.built]
    return [layer.name for layer in layers if not getattr(layer.build, "_is_default", False)]  # else it makes none


def saved_name(store: Any, child: str = "") -> str | None:
    """Return the name of the optimizer that wrote a group of Keras' h5 file; for `checkpoints.origin`.

    Args:
        store: what Keras hands to `load_own_variables`; None is returned for stores that keep no names.
        child: the attribute under which that optimizer holds the one that is asked about.
    """
    group = getattr(store, "_h5_entry_group", None)
    if child:
        group = getattr(store, "h5_file", {}).get(f"{getattr(store, '_h5_entry_path', '')}/{child}/vars")
    name = getattr(group, "attrs", {}).get("name")
    return None if name is None else str(name)


def saved_variables(checkpoint: str) -> list[list[str]]:
    """Return the names of the variables of every optimizer in a `tf.train.Checkpoint`; for `checkpoints.origin`.

    Args:
        checkpoint: its path, as `tf.train.Checkpoint.restore` takes it.
    """
    reader, key = tf.train.load_checkpoint(checkpoint), "_CHECKPOINTABLE_OBJECT_GRAPH"
    if not reader.has_tensor(key):
        return []
    nodes = TrackableObjectGraph.FromString(reader.get_tensor(key)).nodes
    found = []
    for node in nodes:
        children = {child.local_name: child.node_id for child in node.children}
        if {"_variables", "_iterations"} <= children.keys():
            numbers = [child.node_id for child in nodes[children["_variables"]].children]
            found.append([nodes[k].attributes[0].full_name for k in numbers if nodes[k].attributes])
    return found


def read_when_saved(read: Callable[[], Tensor], variable: Any) -> Any:
    """Return a value that TensorFlow reads when it writes a checkpoint; for `replica_variable`.

    TensorFlow asks for the value to restore it, too, when it is not to be read.
    """
    return tensor_callable.Callable(read, variable.dtype, variable.device)


def cross_device_ops(strategy: Any) -> Any:
    """Return the op that reduces between the devices of a strategy that mirrors variables; for `vote.vote`."""
    extended = strategy.extended
    return extended._cross_device_ops or extended._inferred_cross_device_ops


def host_ops(strategy: Any) -> "CollectiveAllReduce":
    """Return the op between the hosts of a `MultiWorkerMirroredStrategy`, one a worker; for `local_steps.exchange`."""
    return strategy.extended._host_cross_device_ops


def lost_workers(strategy: Any, seconds: int = 2) -> list[str]:
    """Return the names of workers that do not answer, or are not those of the beginning; for `local_steps.exchange`.

    Args:
        strategy: a `MultiWorkerMirroredStrategy`.
        seconds: for which each is waited for.
    """
    lost, cluster = [], strategy.cluster_resolver.cluster_spec().as_dict()
    for job, tasks in cluster.items():
        for task in range(len(tasks)):
            try:
                context.context().check_collective_ops_peer_health(f"/job:{job}/replica:0/task:{task}", 1000 * seconds)
            except tf.errors.OpError:
                lost.append(f"{job} {task}")
    return lost


def per_replica(values: Sequence[Any]) -> Any:
    """Return one value for each replica of this worker as `tf.distribute.DistributedValues`; for `replicas`."""
    return regroup(tuple(values))


def in_xla() -> bool:
    """Tell whether the function being traced is to be compiled by XLA; for `backend.tensorflow` and `vote.vote`."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def in_keras_loop() -> bool:
    """Tell whether Keras' loop over several batches (``steps_per_execution``) is being traced; for `vote.vote`."""
    graph, inside, looped = tf.compat.v1.get_default_graph(), False, False
    while graph is not None:
        inside = inside or getattr(graph, "name", "").startswith("one_step_on_data")
        looped = looped or (inside and getattr(graph, "is_control_flow_graph", False))
        graph = getattr(graph, "outer_graph", None)
    return looped


def group_size(ops: "CollectiveAllReduce") -> int:
    """Return between how many replicas TensorFlow's collectives run; for `vote.transport`."""
    return int(ops._group_size)


def all_to_all(ops: "CollectiveAllReduce", rows: Sequence[Tensor]) -> list[Tensor]:
    """Send row `i` of each device to replica `i`; row `j` of a result is from replica `j`; for `vote.transport`.

    Args:
        ops: of all workers.
        rows: of this worker's devices, int32 of shape (replicas, …); bytes are not accepted.
    """
    return _launch_all(collective_ops.all_to_all_v2, ops, rows)


def all_gather(ops: "CollectiveAllReduce", rows: Sequence[Tensor]) -> list[Tensor]:
    """Return on each device the rows of all replicas, int32, one's after the other's; for `vote.transport`."""
    return _launch_all(collective_ops.all_gather_v2, ops, rows)


def gather_now(ops: "CollectiveAllReduce", row: Any) -> Any:
    """Return the row, int32, of every worker, also while a function is being traced; for `vote.transport`.

    Returns:
        Shape (workers, …).
    """
    with tf.init_scope():
        rows = all_gather(ops, [tf.constant(row)[None] for _ in ops._devices])
    return rows[0].numpy()[:: len(rows)]


def _launch_all(collective: Any, ops: "CollectiveAllReduce", values: Sequence[Tensor]) -> list[Tensor]:
    """Launch a collective on all devices of this worker: in eager steps by a function, or the first would block."""
    if tf.executing_eagerly():
        return list(_launcher(collective, ops)(list(values)))
    return [_launch(collective, ops, device, value) for device, value in enumerate(values)]


@cache
def _launcher(collective: Any, ops: "CollectiveAllReduce") -> Any:
    """Return one function for all calls: a new one for each would be traced anew and kept."""
    return tf.function(lambda values: _launch_all(collective, ops, values))


def _launch(collective: Any, ops: "CollectiveAllReduce", device: int, value: Tensor) -> Tensor:
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
