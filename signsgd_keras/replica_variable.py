"""A variable of which each replica has its own: every way to save it keeps the values of all replicas as rows."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy.typing as npt
import tensorflow as tf

from . import _compat
from .replicas import Replicas

Tensor = Any
Rows = npt.NDArray[Any]

PATIENCE = 60.0
"""Seconds after which a worker that waits for the rows of the others says so."""

_ALL_SAVE = (
    "each worker alone has its momentum: all of them must save, at the same step, each to a file of its own, and not "
    "the chief alone"
)


class ReplicaVariable(keras.Variable):  # type: ignore[misc]
    """A variable of which each replica has its own, saved and restored with the rows of all.

    Args:
        replicas: that have it.
        inherit: rows of the old replicas, number of the new ones -> their rows.
        **options: of `keras.Variable`.
    """

    def __init__(self, replicas: Replicas, inherit: Callable[[Rows, int], Rows], **options: Any) -> None:
        self.replicas, self._inherit, self._is_exported = replicas, inherit, False
        if replicas.count > 1:
            options |= {"aggregation": "only_first_replica", "synchronization": "on_read"}
        super().__init__(**options)

    def rows(self) -> Rows:
        """Return the values of all replicas, shape (replicas, …); all workers must call it.

        Raises:
            RuntimeError: if they did something else.
        """
        if self.replicas.count == 1:
            return self.numpy()[None]  # type: ignore[no-any-return]
        with _patience():
            return self.replicas.gather(self.replicas.local(self.value))

    def inherit(self, rows: Rows) -> None:
        """Go on from the rows of all replicas, of this or another number of them."""
        new = self._inherit(rows, self.replicas.count)
        if len(new) == 1:
            self.assign(new[0])
        else:
            self.replicas.strategy.run(lambda: self.assign(new[self.replicas.current()[0]]))

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        """Note what is asked for them, as TensorFlow does ahead of every save."""
        self._is_exported = save_type == "savedmodel"  # read by others, who expect the variable's shape
        return super()._trackable_children(save_type, **options)  # type: ignore[no-any-return]

    def _serialize_to_tensors(self) -> dict[str, Tensor]:
        if self._is_exported:
            return super()._serialize_to_tensors()  # type: ignore[no-any-return]
        return {"VARIABLE_VALUE": _compat.read_when_saved(lambda: tf.constant(self.rows()), self.value)}

    def _copy_trackable_to_cpu(self, object_map: Any) -> None:
        """Copy the value for an asynchronous checkpoint, which has room for that of one replica alone."""
        if self.replicas.count > 1:
            raise ValueError(
                f"an asynchronous tf.train.Checkpoint would keep {self.path} of one of {self.replicas.count} replicas "
                "and lose those of the others: save it without enable_async"
            )
        super()._copy_trackable_to_cpu(object_map)

    def _restore_from_tensors(self, restored_tensors: dict[str, Tensor]) -> dict[str, Any]:
        rows = restored_tensors["VARIABLE_VALUE"].numpy()
        if rows.ndim == len(self.shape):
            rows = rows[None]
            if self.replicas.count > 1:
                warnings.warn(
                    "an earlier version wrote this tf.train.Checkpoint, of each momentum that of replica 0 alone: if "
                    "there were several replicas, those of the others are lost, and all go on with its one",
                    stacklevel=2,
                )
        self.inherit(rows)
        return {}


@contextmanager
def _patience() -> Iterator[None]:
    """Warn of a wait that is long, and say why it was in vain."""
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
