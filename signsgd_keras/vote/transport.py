"""How bytes travel between replicas: through the memory of one process, or by TensorFlow's collectives."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from signsgd_core.wire import HEADER_BYTES

from .. import _compat
from .agreement import HEADER_WORDS, Header
from .ballots import unwords, words

Tensor = Any
Row = npt.NDArray[np.int32]


class Transport(Protocol):
    """Carries ballots to the owners of shards, and verdicts back.

    A ballot is cut into as many equal shards as there are replicas; replica `i` owns shard `i` of every ballot.

    Attributes:
        header_bytes: sent ahead of each shard.
        between_workers: whether workers have to agree: they are several, or run TensorFlow's collectives.
    """

    header_bytes: int
    between_workers: bool

    def up(self, ballots: Sequence[Tensor], header: Header) -> list[list[Tensor]]:
        """Send every shard to its owner.

        Args:
            ballots: of this worker's replicas, in their order: uint8 of shape (planes, bytes), the same for all, a
                multiple of 8 bytes for each replica of all workers.
            header: what all workers must have in common, compared by the owners.

        Returns:
            For each replica of this worker the shards that it owns, one from each replica of all workers.

        Raises:
            tf.errors.InvalidArgumentError: on all workers when the graph runs, if their headers differ.
        """

    def down(self, verdicts: Sequence[Tensor]) -> list[Tensor]:
        """Send the verdict on every shard to all replicas.

        Args:
            verdicts: of the shards that this worker's replicas own, uint8 of shape (planes, bytes), on their devices.

        Returns:
            The verdict on the whole ballot, once on each device.
        """

    def gather(self, row: Row) -> Row:
        """Return the row of every worker, shape (workers, …), also while a function is being traced."""


def transport_for(ops: Any) -> Transport:
    """Return the transport where a cross-device op reduces everything else."""
    return Collectives(ops) if isinstance(ops, _compat.CollectiveAllReduce) else InProcess()


class InProcess:
    """Between the devices of one process."""

    header_bytes, between_workers = 0, False

    def up(self, ballots: Sequence[Tensor], header: Header) -> list[list[Tensor]]:
        """Hand every shard to its owner; there is nobody to disagree."""
        shards = [tf.split(ballot, len(ballots), axis=1) for ballot in ballots]
        return [list(owned) for owned in zip(*shards, strict=True)]

    def down(self, verdicts: Sequence[Tensor]) -> list[Tensor]:
        """Copy all verdicts to every device."""
        copies = []
        for verdict in verdicts:
            with tf.device(verdict.device):
                copies.append(tf.concat(verdicts, axis=1))
        return copies

    def gather(self, row: Row) -> Row:
        """Return the one row that there is."""
        return row[None]


class Collectives:
    """By TensorFlow's collectives, between all workers: an all-to-all up, and an all-gather down.

    Args:
        ops: of all workers, a `CollectiveAllReduce`.
    """

    header_bytes, between_workers = HEADER_BYTES, True

    def __init__(self, ops: Any) -> None:
        self._ops, self._replicas = ops, _compat.group_size(ops)

    def up(self, ballots: Sequence[Tensor], header: Header) -> list[list[Tensor]]:
        """Send every shard to its owner behind the header, and compare the headers."""
        replicas, (planes, length) = self._replicas, ballots[0].shape
        sent = []
        for ballot in ballots:
            with tf.device(ballot.device):
                shards = tf.reshape(words(ballot, tf.int32), [planes, replicas, length // replicas // 4])
                rows = tf.reshape(tf.transpose(shards, [1, 0, 2]), [replicas, -1])
                headers = tf.repeat(header.words()[None], replicas, axis=0)
                sent.append(tf.concat([headers, rows], axis=1))
        owned = []
        for ballot, rows in zip(ballots, _compat.all_to_all(self._ops, sent), strict=True):
            with tf.device(ballot.device), tf.control_dependencies(header.check(rows[:, :HEADER_WORDS])):
                bodies = tf.reshape(rows[:, HEADER_WORDS:], [replicas, planes, length // replicas // 4])
                owned.append(tf.unstack(unwords(bodies)))
        return owned

    def down(self, verdicts: Sequence[Tensor]) -> list[Tensor]:
        """Gather all verdicts on every device."""
        replicas, (planes, length) = self._replicas, verdicts[0].shape
        sent = []
        for verdict in verdicts:
            with tf.device(verdict.device):
                sent.append(words(verdict, tf.int32))
        copies = []
        for verdict, rows in zip(verdicts, _compat.all_gather(self._ops, sent), strict=True):
            with tf.device(verdict.device):
                rows = tf.transpose(tf.reshape(rows, [replicas, planes, length // 4]), [1, 0, 2])
                copies.append(unwords(tf.reshape(rows, [planes, replicas * length // 4])))
        return copies

    def gather(self, row: Row) -> Row:
        """Gather the rows, ahead of the graph."""
        rows: Row = _compat.gather_now(self._ops, row)
        return rows
