"""Ballots reach the owners of their shards, and the verdict that comes back is the core's on every device."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import signsgd_core as core
from signsgd_core import Zeros
from signsgd_core.wire import HEADER_BYTES, shard_bytes
from signsgd_keras import _compat
from signsgd_keras.vote.agreement import Header
from signsgd_keras.vote.ballots import count_words, verdict
from signsgd_keras.vote.transport import Collectives, InProcess, Transport, transport_for
from tests import devices  # noqa: F401  replicas of this process are made before TensorFlow runs

from .models import plain


def exchange(transport: Transport, ballots: list[Any], zeros: Zeros, step: int) -> list[Any]:
    """The verdict on each device, as a vote has it."""
    header = Header({"zero_rule": zeros}, ["x: shape (3,)"], tf.constant(0.5), tf.constant(step, tf.int64))
    verdicts = []
    for ballot, owned in zip(ballots, transport.up(ballots, header), strict=True):
        with tf.device(ballot.device):
            verdicts.append(verdict(count_words(owned), zeros, tf.constant(step % 2, tf.uint8)))
    return transport.down(verdicts)


def check(transport: Transport, replicas: int, zeros: Zeros) -> None:
    """Odd and even numbers of replicas, ties, zeros, and both parities of the step."""
    random, width = np.random.default_rng(replicas), replicas * shard_bytes(8 * 41, replicas)
    for step in (4, 7):
        directions = random.integers(-1, 2, (replicas, 8 * width)).astype(np.float32)
        ballots = [core.pack(c, zeros, step, worker) for worker, c in enumerate(directions)]
        expected = np.stack(core.verdict([list(ballot) for ballot in ballots], zeros, step % 2))
        placed = []
        for k, ballot in enumerate(ballots):
            with tf.device(f"CPU:{k}"):
                placed.append(tf.constant(ballot))
        copies = exchange(transport, placed, zeros, step)
        assert len(copies) == replicas
        for k, copy in enumerate(copies):
            assert copy.dtype == tf.uint8
            assert copy.numpy().tobytes() == expected.tobytes()
            assert copy.device.endswith(f"CPU:{k}")


@pytest.mark.parametrize("zeros", ["alternate", "abstain", "positive"])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8])
def test_in_process(replicas: int, zeros: Zeros) -> None:
    check(InProcess(), replicas, zeros)


def test_an_op_has_its_transport() -> None:
    """And what that costs."""
    op = _compat.cross_device_ops(plain())
    assert isinstance(transport_for(op), Collectives)
    assert isinstance(transport_for(tf.distribute.ReductionToOneDevice()), InProcess)
    assert (transport_for(op).header_bytes, InProcess().header_bytes) == (HEADER_BYTES, 0)
    row = np.arange(6, dtype=np.int32).reshape(2, 3)
    for transport in (transport_for(op), InProcess()):
        np.testing.assert_array_equal(transport.gather(row), row[None], strict=True)
