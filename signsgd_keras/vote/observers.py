"""What is watched of a vote: statistics of the packed bits, counted in the graph while a monitor wants them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

import signsgd_core as core
from signsgd_core.analysis.vote_figures import COUNTS

from ..replicas import Replicas
from .ballots import Words, unwords, words

Tensor = Any


class Seen(NamedTuple):
    """One vote as a replica saw it.

    Attributes:
        replica: its number among all replicas.
        sizes: of the variables that were voted on, in coordinates.
        ballot: its own, uint8 of shape (planes, bytes).
        verdict: of the same shape.
        shards: the ballots of the shard that it owns, one from each replica.
        sent_bytes: payload that it sent.
        seconds: that it waited for the verdict, float64.
    """

    replica: int
    sizes: Sequence[int]
    ballot: Tensor
    verdict: Tensor
    shards: Sequence[Words]
    sent_bytes: int
    seconds: Tensor


class Observer:
    """Is told what happens in a vote, on each replica by itself; whatever it does changes nothing of it."""

    def gradients(self, gradients: Sequence[Tensor]) -> None:
        """A replica's gradients, as they came, are taken into a ballot; in replica context."""

    def verdict(self, seen: Seen) -> None:
        """A verdict is there; in replica context."""


class VoteStatistics(Observer):
    """Counts of the votes of one optimizer, taken from the packed bits; each replica has its own.

    Args:
        replicas: that vote.
        sizes: of all the optimizer's variables, in coordinates.
        planes: of a ballot.
    """

    def __init__(self, replicas: Replicas, sizes: Sequence[int], planes: int) -> None:
        self._replicas = replicas
        self._width = 4 * -(-sum(-(-size // 8) for size in sizes) // 4)
        self._counts = replicas.variable(tf.zeros([len(COUNTS)], tf.float64))
        self._votes = replicas.variable(0, tf.int64)
        self._compared = replicas.variable(False)
        self._last = replicas.variable(tf.zeros([planes, self._width // 4], tf.int32))  # workers share no bytes

    def gradients(self, gradients: Sequence[Tensor]) -> None:
        """Count the entries that are not finite in float32."""

        def count(gradient: Tensor) -> Tensor:
            return tf.cond(
                tf.math.is_finite(tf.reduce_sum(gradient)),  # reads once where all is well
                lambda: tf.constant(0, tf.int64),
                lambda: tf.math.count_nonzero(~tf.math.is_finite(gradient)),
            )

        self._add({"nonfinite": tf.add_n([count(tf.cast(gradient, tf.float32)) for gradient in gradients])})

    def verdict(self, seen: Seen) -> None:
        """Count where the ballot is not the verdict, where the verdict is not the last one, and the ties."""
        tallied = tf.split(_mask(seen.sizes, seen.ballot.shape[1]), self._replicas.count)[seen.replica]
        ties = tf.reshape(tf.bitcast(core.majority(seen.shards)[1], tf.uint8), [-1])
        last = tf.pad(seen.verdict, [[0, 0], [0, max(self._width - seen.verdict.shape[1], 0)]])[:, : self._width]
        coordinates, compared = sum(seen.sizes), tf.cast(self._compared, tf.float64)
        flips = _ones(_differences(unwords(self._last), last) & _mask(seen.sizes, self._width))
        self._add(
            {
                "coordinates": coordinates,
                "disagreements": _ones(_differences(seen.ballot, seen.verdict)),  # padding is 0 in both
                "compared": compared * coordinates,
                "flips": compared * tf.cast(flips, tf.float64),
                "tallied": _ones(tallied),
                "ties": _ones(ties & tallied),
                "sent_bytes": seen.sent_bytes,
                "seconds": seen.seconds,
            }
        )
        self._votes.assign_add(1)
        self._last.assign(words(last, tf.int32))
        self._compared.assign(True)

    def take(self) -> tuple[npt.NDArray[np.float64], int]:
        """Return all replicas' `COUNTS` since the last call, shape (replicas, 9), and of how many votes; start over."""
        rows = self._replicas.gather(self._replicas.local(self._counts))  # strategy.run() would warn, being slow
        votes = int(self._replicas.local(self._votes)[0].numpy())
        self._counts.assign(tf.zeros_like(rows[0]))
        self._votes.assign(0)
        return rows, votes

    def _add(self, counts: dict[str, Any]) -> None:
        self._counts.assign_add(tf.stack([tf.cast(counts.get(name, 0), tf.float64) for name in COUNTS]))


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
    differ = tf.unstack(a ^ b)
    return differ[0] if len(differ) == 1 else differ[0] | differ[1]


def _ones(words: Tensor) -> Tensor:
    """Return how many bits are set."""
    return tf.reduce_sum(tf.cast(tf.raw_ops.PopulationCount(x=words), tf.int64))
