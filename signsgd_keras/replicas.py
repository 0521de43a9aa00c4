"""The replicas of a `tf.distribute` strategy: which one runs, what each of them holds, and what all of them hold."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from . import _compat
from .variables import native

Tensor = Any
Variable = Any
Array = npt.NDArray[Any]

_VOTE = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
"""The strategies that can vote."""


class Replicas:
    """The replicas that vote: those of one strategy, in this process and in others.

    Args:
        strategy: in whose scope the optimizer was made.

    Attributes:
        count: of all replicas, those of other workers included.
        local_count: of those of this worker.
        name: of the strategy.

    Example:
        >>> replicas = Replicas(tf.distribute.OneDeviceStrategy("CPU:0"))
        >>> replicas.count, replicas.name
        (1, 'OneDeviceStrategy')
    """

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.count: int = strategy.num_replicas_in_sync
        # The default strategy has one replica, and no list of devices.
        self.local_count = len(strategy.extended.worker_devices) if self.count > 1 else 1
        self.name = _name(strategy)

    @property
    def is_first_worker(self) -> bool:
        """Tell whether this worker is the one that writes files which all workers would write alike."""
        return bool(self.strategy.extended.should_checkpoint)

    def check_build(self, label: str) -> None:
        """Make sure that the strategy is in force and can vote; ValueError if not."""
        self.check_step()

    def check_step(self) -> None:
        """Make sure that the strategy is in force and can vote.

        Raises:
            ValueError: if not.
        """
        current = tf.distribute.get_strategy()
        if current is not self.strategy:
            raise ValueError(
                f"Signum was made under {self.name} and is used under {_name(current)}, where it would step "
                "without a vote: make model, optimizer and compile() within `with strategy.scope():`"
            )
        if tf.distribute.has_strategy() and not isinstance(current, (*_VOTE, tf.distribute.OneDeviceStrategy)):
            raise ValueError(
                f"Signum cannot vote under {self.name}: take tf.distribute.MirroredStrategy on one machine "
                "or signsgd_keras.MultiWorkerMajorityVoteStrategy on several"
            )

    def check_condition(self) -> None:
        """Make sure that a step of one replica may be taken under a condition, as accumulation and averages need it.

        Raises:
            ValueError: if not: the strategies that can vote would leave the replica's context within it.
        """
        if isinstance(self.strategy, _VOTE) and not tf.executing_eagerly():
            raise ValueError(
                "gradient_accumulation_steps and ema_overwrite_frequency need several replicas under "
                f"{self.name}, and it has one: make model and optimizer without a strategy"
            )

    def has(self, variable: Variable) -> bool:
        """Tell whether every replica has a copy of a variable."""
        return bool(self.strategy.extended.variable_created_in_scope(native(variable)))

    def current(self) -> tuple[int, int]:
        """Return the number of the replica that runs this, among all replicas and among this worker's."""
        replica = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
        return replica, replica % self.local_count

    def each(self, function: Callable[..., Any], *args: Any) -> Sequence[Any]:
        """Call a function on each replica of this worker, in cross-replica context, and return what each returned.

        Args:
            function: that returns tensors, or nothing.
            *args: from `spread`, of which each replica gets its own.
        """
        return self.local(self.strategy.extended.call_for_each_replica(function, args=args))

    def update(self, variable: Variable, function: Callable[..., Any], *args: Any) -> None:
        """Call a function on each replica's copy of a variable, in cross-replica context; `args` as in `each`."""
        self.strategy.extended.update(native(variable), function, args=args, group=False)

    def local(self, value: Any) -> Sequence[Any]:
        """Return what each replica of this worker holds of a value."""
        found: Sequence[Any] = self.strategy.experimental_local_results(value)
        return found

    def spread(self, values: Sequence[Any]) -> Any:
        """Return one value for each replica of this worker as TensorFlow hands them on together."""
        return _compat.per_replica(values)

    def gather(self, values: Sequence[Any]) -> Array:
        """Return the values of the replicas of all workers, which must all call it.

        Args:
            values: one for each replica of this worker.

        Returns:
            Shape (replicas, …).
        """
        rows = [tf.identity(value)[None] for value in values]
        if self.count == 1:
            return rows[0].numpy()  # type: ignore[no-any-return]
        if not rows[0].shape.num_elements():  # TensorFlow's collectives end the process where nothing is to be sent
            return np.zeros((self.count, *rows[0].shape[1:]), rows[0].dtype.as_numpy_dtype)
        return self.strategy.gather(self.spread(rows), axis=0).numpy()  # type: ignore[no-any-return]

    def variable(self, value: Any, dtype: Any = None) -> Any:
        """Return a new variable of which each replica has its own, with no part in what is saved."""
        with self.strategy.scope():
            return tf.Variable(
                value,
                dtype=dtype,
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )


def _name(strategy: Any) -> str:
    name = type(strategy).__name__
    return "no strategy" if name.startswith("_Default") else name
