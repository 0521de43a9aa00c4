"""Messages between the processes of a cluster: NumPy arrays, by TensorFlow's collectives on the hosts' processors."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from .. import _compat

Array = npt.NDArray[Any]
Words = npt.NDArray[np.int32]

PIECE = 1 << 22
"""Words of a broadcast that travel together."""


class Exchange:
    """Carry int32 words between all workers of a cluster, each of which must call the same methods.

    Args:
        strategy: a `tf.distribute.MultiWorkerMirroredStrategy`, of which only the connections are used.

    Attributes:
        workers: how many there are.
        sent_bytes: payload that this worker sent until now.
        seconds: that it waited for messages until now.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy, ops = strategy, _compat.host_ops(strategy)
        self.workers, self.sent_bytes, self.seconds = _compat.group_size(ops), 0, 0.0
        self._gather = tf.function(lambda row: _compat.all_gather(ops, [row])[0], reduce_retracing=True)
        self._up = tf.function(lambda rows: _compat.all_to_all(ops, [rows])[0], reduce_retracing=True)

    def gather(self, row: Words) -> Words:
        """Return the rows of all workers, int32 of shape (workers, words).

        Raises:
            RuntimeError: if a worker is lost, on all others.
        """
        return self._run(self._gather, row[None], self.workers - 1)

    def up(self, rows: Words) -> Words:
        """Send row `i` to worker `i`, and return the rows for this worker; int32 of shape (workers, words).

        Raises:
            RuntimeError: if a worker is lost, on all others.
        """
        return self._run(self._up, rows, (self.workers - 1) / self.workers)

    def rank(self) -> int:
        """Return the number of this worker, by which all collectives order theirs."""
        ours = np.frombuffer(np.random.default_rng().bytes(16), np.int32)
        return int((self.gather(ours) == ours).all(axis=1).argmax())

    def gather_arrays(self, arrays: Sequence[Array]) -> list[list[Array]]:
        """Return the arrays of all workers, which have the same shapes and dtypes on each: [worker][array]."""
        return [_arrays(row, arrays) for row in self.gather(_words(arrays))]

    def broadcast(self, arrays: Sequence[Array]) -> list[Array]:
        """Return worker 0's arrays: it sends each worker a shard, and all gather the shards."""
        sent, received = _words(arrays), list[Words]()
        for piece in np.split(sent, range(PIECE, sent.size, PIECE)):
            padded = np.pad(piece, (0, -piece.size % self.workers)).reshape(self.workers, -1)
            received.append(self.gather(self.up(padded)[0]).reshape(-1)[: piece.size])
        return _arrays(np.concatenate(received), arrays)

    def _run(self, collective: Callable[[Any], Any], rows: Words, share: float) -> Words:
        begin = time.perf_counter()
        try:
            received: Words = collective(tf.constant(rows)).numpy()
        except tf.errors.OpError as error:
            lost = _compat.lost_workers(self._strategy)
            raise RuntimeError(
                f"{' and '.join(lost) or 'a worker'} did not answer, and the round did not close: the variables are "
                "those of its beginning. Restart all workers from the last checkpoint"
            ) from error
        self.seconds += time.perf_counter() - begin
        self.sent_bytes += round(share * rows.nbytes)
        return received


def _words(arrays: Sequence[Array]) -> Words:
    """Return the bytes of arrays, one after the other, as int32 words; at least one."""
    whole = b"".join(array.tobytes() for array in arrays)
    return np.frombuffer(whole.ljust(max(4, len(whole) + -len(whole) % 4), b"\0"), np.int32)


def _arrays(words: Words, like: Sequence[Array]) -> list[Array]:
    """Return arrays of the same shapes and dtypes as others, out of words."""
    ends = np.cumsum([array.nbytes for array in like])
    parts = np.split(np.ascontiguousarray(words).view(np.uint8), ends)
    return [part.view(array.dtype).reshape(array.shape) for part, array in zip(parts, like, strict=False)]
