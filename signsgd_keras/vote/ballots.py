"""Ballots in TensorFlow: 8 coordinates to a byte, little-endian, bit 1 = negative, as in `signsgd_core.ballots`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import signsgd_core as core
from signsgd_core import Zeros

from ..traced import traced_once

Tensor = Any
Words = list[Tensor]
"""A ballot as int64 words, one tensor a plane."""

_BYTES = np.arange(256, dtype=np.uint8)[None]
_SIGNS = core.unpack(_BYTES, 2048).reshape(256, 8)
"""Byte -> eight of ±1."""

_VOTES = (1 - _SIGNS) / 2
"""Byte -> eight of 0 or 1."""

_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as one word: the lowest bit of byte `j` comes to bit ``56 + j``."""


def pack(directions: Tensor, bit: Any) -> Tensor:
    """Return the ballot of a worker (step 4).

    Args:
        directions: float32, finite, any shape.
        bit: by which the worker says zero, from `signsgd_core.zero_bit`: None to abstain, 0 or 1, or a scalar tensor
            of 0 or 1.

    Returns:
        uint8 of shape (planes, ⌈size/8⌉); the unused bits of its last byte are 0.

    Example:
        >>> pack(tf.constant([-2.0, 0.0, 3.0, -0.5]), None).numpy()
        array([[ 9],
               [13]], dtype=uint8)
    """
    c = tf.reshape(directions, [-1])
    ballot = _signs_and_votes(c) if bit is None else _signs(c, tf.cast(bit, tf.uint8))
    ballot.set_shape([1 + (bit is None), -(-c.shape[0] // 8)])
    return ballot


def unpack(ballot: Tensor, length: int) -> Tensor:
    """Return the first `length` coordinates of a ballot or verdict as −1, +1, and 0 where nobody voted.

    Args:
        ballot: uint8 of shape (planes, at least ⌈length/8⌉).
        length: how many coordinates.

    Returns:
        float32 of shape (length,).

    Example:
        >>> unpack(tf.constant([[9], [13]], tf.uint8), 4).numpy()
        array([-1.,  0.,  1., -1.], dtype=float32)
    """
    numbers = (_ones if ballot.shape[0] == 1 else _ones_and_zeros)(ballot, length)
    numbers.set_shape([length])
    return numbers


def words(ballot: Tensor, dtype: Any) -> Tensor:
    """Return the bytes of a ballot, a multiple of the word's size, as integer words.

    Example:
        >>> words(tf.constant([[1, 0, 0, 0]], tf.uint8), tf.int32).numpy()
        array([[1]], dtype=int32)
    """
    return tf.bitcast(tf.reshape(ballot, [*ballot.shape[:-1], -1, dtype.size]), dtype)


def unwords(words: Tensor) -> Tensor:
    """Return integer words as the bytes that they are made of.

    Example:
        >>> unwords(tf.constant([[1]], tf.int32)).numpy()
        array([[1, 0, 0, 0]], dtype=uint8)
    """
    return tf.reshape(tf.bitcast(words, tf.uint8), [*words.shape[:-1], words.shape[-1] * words.dtype.size])


def count_words(ballots: Sequence[Tensor]) -> list[Words]:
    """Return ballots, each uint8 of shape (planes, bytes), as the words that a tally counts."""
    return [tf.unstack(words(ballot, tf.int64)) for ballot in ballots]


def verdict(ballots: Sequence[Words], zeros: Zeros, parity: Tensor) -> Tensor:
    """Return the verdict of every worker's ballot of one shard (steps 5 and 6).

    Args:
        ballots: from `count_words`.
        zeros: the zero rule.
        parity: of `t`, an integer scalar.

    Returns:
        uint8 of shape (planes, bytes).
    """
    return unwords(tf.stack(core.verdict(ballots, zeros, tf.cast(parity, tf.int64))))


@traced_once(tf.TensorSpec([None], tf.float32))
def _signs_and_votes(c: Tensor) -> Tensor:
    return tf.stack([_packbits(c < 0), _packbits(tf.not_equal(c, 0))])


@traced_once(tf.TensorSpec([None], tf.float32), tf.TensorSpec([], tf.uint8))
def _signs(c: Tensor, bit: Tensor) -> Tensor:
    return _packbits(tf.cond(tf.equal(bit, 1), lambda: c <= 0, lambda: c < 0))[None]


@traced_once(tf.TensorSpec([1, None], tf.uint8), tf.TensorSpec([], tf.int64))
def _ones(ballot: Tensor, length: Tensor) -> Tensor:
    return _look_up(_SIGNS, ballot[0])[:length]


@traced_once(tf.TensorSpec([2, None], tf.uint8), tf.TensorSpec([], tf.int64))
def _ones_and_zeros(ballot: Tensor, length: Tensor) -> Tensor:
    return (_look_up(_SIGNS, ballot[0]) * _look_up(_VOTES, ballot[1]))[:length]


def _packbits(bits: Tensor) -> Tensor:
    padded = tf.pad(tf.cast(bits, tf.uint8), [[0, -tf.size(bits, tf.int64) % 8]])
    eights = tf.bitcast(tf.reshape(padded, [-1, 8]), tf.uint64)
    gathered = eights * tf.constant(_GATHER, tf.uint64)
    return tf.cast(tf.bitwise.right_shift(gathered, tf.constant(56, tf.uint64)), tf.uint8)


def _look_up(table: Any, plane: Tensor) -> Tensor:
    return tf.reshape(tf.gather(tf.constant(table), tf.cast(plane, tf.int32)), [-1])
