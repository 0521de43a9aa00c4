"""What each replica has its own: its number, its variables, and the sums of its gradients since its last vote."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy.typing as npt
import tensorflow as tf

from . import internals

Tensor = Any
Variable = Any
Rows = npt.NDArray[Any]

PATIENCE = 60.0
"""Seconds after which a worker that waits for the others' rows says so."""

_ALL_SAVE = (
    "each worker alone has its momentum: all of them must save, at the same step, each to a file of its own, and not "
    "the chief alone"
)


class Own(keras.Variable):  # type: ignore[misc]
    """A variable of which each replica has its own, saved and restored with the rows of all.

    Args:
        inherit: rows of the old replicas, number of the new ones -> their rows.
        **options: of `keras.Variable`.
    """

    def __init__(self, inherit: Callable[[Rows, int], Rows], **options: Any) -> None:
        self._inherit, self._strategy, self._served = inherit, tf.distribute.get_strategy(), False
        super().__init__(**options)

    def rows(self) -> Rows:
        """Return the values of all replicas, shape (replicas, …); all workers must call it.

        Raises:
            RuntimeError: if they did something else.
        """
        if self._strategy.num_replicas_in_sync == 1:
            return self.numpy()[None]  # type: ignore[no-any-return]
        own = [tf.identity(value)[None] for value in self._strategy.experimental_local_results(self.value)]
        with _patience():
            return self._strategy.gather(internals.per_replica(own), axis=0).numpy()  # type: ignore[no-any-return]

    def take(self, rows: Rows) -> None:
        """Go on from the rows of all replicas, of this or another number of them."""
        new = self._inherit(rows, self._strategy.num_replicas_in_sync)
        if len(new) == 1:
            self.assign(new[0])
        else:
            self._strategy.run(lambda: self.assign(new[own_number(self._strategy)[0]]))

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        """Note what is asked for them, as TensorFlow does ahead of every save."""
        self._served = save_type == "savedmodel"  # read by others, who expect the variable's shape
        return super()._trackable_children(save_type, **options)  # type: ignore[no-any-return]

    def _serialize_to_tensors(self) -> dict[str, Tensor]:
        if self._served:
            return super()._serialize_to_tensors()  # type: ignore[no-any-return]
        return {"VARIABLE_VALUE": internals.later(lambda: tf.constant(self.rows()), self.value)}

    def _restore_from_tensors(self, restored_tensors: dict[str, Tensor]) -> dict[str, Any]:
        rows = restored_tensors["VARIABLE_VALUE"].numpy()
        if rows.ndim == len(self.shape):
            rows = rows[None]
            if self._strategy.num_replicas_in_sync > 1:
                warnings.warn(
                    "an earlier version wrote this tf.train.Checkpoint, of each momentum that of replica 0 alone: if "
                    "there were several replicas, those of the others are lost, and all go on with its one",
                    stacklevel=2,
                )
        self.take(rows)
        return {}


@contextmanager
def _patience() -> Iterator[None]:
    """Say what a worker waits for, and why it waited in vain."""
    waiting = f"this worker waits for the others to save: {_ALL_SAVE}"
    timer = threading.Timer(PATIENCE, warnings.warn, (waiting,), {"stacklevel": 1})
    timer.daemon = True
    timer.start()
    try:
        yield
    except tf.errors.OpError as error:
        raise RuntimeError(f"the other workers did something else while this one saved: {_ALL_SAVE}") from error
    finally:
        timer.cancel()


def own_number(strategy: Any) -> tuple[int, int]:
    """Return the number of the replica that runs this, among those of all workers and among this worker's."""
    replica = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
    return replica, replica % len(strategy.extended.worker_devices)


def mean_gradients(
    strategy: Any,
    gradients: Sequence[Sequence[Tensor]],
    sums: Sequence[Variable],
    others: Sequence[Variable],
    steps: int,
) -> list[list[Tensor]]:
    """Return each replica's mean gradients since its last vote, and start over; in cross-replica context.

    Args:
        strategy: of the replicas.
        gradients: of this worker's replicas, each a list, at the last of the steps.
        sums: of those before, each replica's own.
        others: sums of variables without a gradient at the last step, which do not vote: they start over, too.
        steps: how many.
    """

    def mean() -> list[Tensor]:
        means = [(g + s) / steps for g, s in zip(gradients[own_number(strategy)[1]], sums, strict=True)]
        with tf.control_dependencies(means):
            for s in (*sums, *others):
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
