"""What a vote looked like from each replica, counted in the graph while a monitor watches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

import signsgd_core as core
from signsgd_core.figures import COUNTS

from . import internals
from .ballots import unwords, words

Tensor = Any


class VoteStatistics:
    """Counts of the votes of one optimizer, taken from the packed bits; each replica has its own.

    Args:
        strategy: in whose scope the optimizer was made.
        sizes: of the variables, in coordinates.
        planes: of a ballot.
    """

    def __init__(self, strategy: Any, sizes: Sequence[int], planes: int) -> None:
        self.strategy = strategy
        self._width = 4 * -(-sum(-(-size // 8) for size in sizes) // 4)
        private = {
            "trainable": False,
            "synchronization": tf.VariableSynchronization.ON_READ,
            "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA,
        }
        with strategy.scope():
            self._counts = tf.Variable(tf.zeros([len(COUNTS)], tf.float64), **private)
            self._votes = tf.Variable(0, dtype=tf.int64, **private)
            self._compared = tf.Variable(False, **private)
            last = tf.zeros([planes, self._width // 4], tf.int32)  # workers share no bytes
            self._last = tf.Variable(last, **private)

    def count(
        self,
        sizes: Sequence[int],
        ballot: Tensor,
        verdict: Tensor,
        tally: Sequence[Sequence[Tensor]],
        share: int,
        nonfinite: Tensor,
        sent_bytes: int,
        seconds: Tensor,
    ) -> None:
        """Count one vote, in replica context.

        Args:
            sizes: of the variables that were voted on, in coordinates.
            ballot: this replica's, uint8 of shape (planes, bytes).
            verdict: of the same shape.
            tally: the ballots that this replica tallied, each a list of planes in int64 words.
            share: which of the equal shares of a ballot these are.
            nonfinite: gradient entries that were not finite.
            sent_bytes: payload that this replica sent.
            seconds: that it waited, float64.
        """
        mask = _mask(sizes, ballot.shape[1])
        tallied = tf.split(mask, ballot.shape[1] // (8 * tally[0][0].shape[0]))[share]
        ties = tf.reshape(tf.bitcast(core.majority(tally)[1], tf.uint8), [-1])
        last = tf.pad(verdict, [[0, 0], [0, max(self._width - verdict.shape[1], 0)]])[:, : self._width]
        coordinates, compared = sum(sizes), tf.cast(self._compared, tf.float64)
        flips = _ones(_differences(unwords(self._last), last) & _mask(sizes, self._width))
        counts = [
            coordinates,
            _ones(_differences(ballot, verdict) & mask),
            compared * coordinates,
            compared * tf.cast(flips, tf.float64),
            _ones(tallied),
            _ones(ties & tallied),
            nonfinite,
            sent_bytes,
            seconds,
        ]
        self._counts.assign_add(tf.stack([tf.cast(count, tf.float64) for count in counts]))
        self._votes.assign_add(1)
        self._last.assign(words(last, tf.int32))
        self._compared.assign(True)

    def take(self) -> tuple[npt.NDArray[np.float64], int]:
        """Return all replicas' `COUNTS` since the last call, shape (replicas, 9), and of how many votes; start over."""
        own = [tf.identity(counts)[None] for counts in self.strategy.experimental_local_results(self._counts)]
        rows = self.strategy.gather(internals.per_replica(own), axis=0).numpy()  # strategy.run() would warn, being slow
        votes = int(self.strategy.experimental_local_results(self._votes)[0].numpy())
        self._counts.assign(tf.zeros_like(rows[0]))
        self._votes.assign(0)
        return rows, votes


def count_nonfinite(gradients: Sequence[Tensor]) -> Tensor:
    """Return how many entries are not finite in float32."""

    def count(gradient: Tensor) -> Tensor:
        return tf.cond(
            tf.math.is_finite(tf.reduce_sum(gradient)),  # reads once where all is well
            lambda: tf.constant(0, tf.int64),
            lambda: tf.math.count_nonzero(~tf.math.is_finite(gradient)),
        )

    return tf.add_n([count(tf.cast(gradient, tf.float32)) for gradient in gradients])


def _mask(sizes: Sequence[int], width: int) -> Tensor:
    """Return the bits that stand for a coordinate, uint8 of shape (width,); each variable begins a byte."""
    parts = []
    for size in sizes:
        parts.append(tf.fill([size // 8], tf.constant(255, tf.uint8)))
        if size % 8:
            parts.append(tf.constant([(1 << size % 8) - 1], tf.uint8))
    mask = tf.concat(parts, axis=0)
    return tf.pad(mask, [[0, width - mask.shape[0]]])


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Return where two ballots differ in any plane."""
    differ = tf.unstack(tf.bitwise.bitwise_xor(a, b))
    return differ[0] if len(differ) == 1 else differ[0] | differ[1]


def _ones(words: Tensor) -> Tensor:
    """Return how many bits are set."""
    return tf.reduce_sum(tf.cast(tf.raw_ops.PopulationCount(x=words), tf.int64))
