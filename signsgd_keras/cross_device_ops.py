"""MajorityVote: ballots up, verdict down, between the replicas of `tf.distribute` (steps 4-6)."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

import signsgd_core as core
from signsgd_core import Zeros
from signsgd_core.adversaries import Adversary
from signsgd_core.traffic import HEADER_BYTES, WORD_BITS

from . import agreement, internals
from .ballots import unwords, words

Tensor = Any


class MajorityVote(tf.distribute.CrossDeviceOps):  # type: ignore[misc]
    """Cross-device op that votes: one bit per parameter from each replica, and one back.

    Every replica is the teller of its own share of the coordinates: it gets that share of every ballot and sends its
    verdict to all, so that each sends ``2·(M−1)/M·d`` bits. Between machines the ballots travel by all-to-all and the
    verdicts by all-gather. `Signum` hands it ballots; whatever else is reduced (losses, metrics, batch statistics,
    gradients of other optimizers) goes unchanged to the op that it wraps.

    Args:
        wrapped: the op for everything else; `tf.distribute.ReductionToOneDevice()` where left out.
        adversaries: replica -> what it makes of its gradients before it votes (`signsgd_core.adversaries`), to try what
            a vote withstands: of its clipped and, where they are accumulated, mean gradients. A replica that hands
            nothing on, as `silent`, votes with a gradient of zeros: always silent, it casts neutral ballots by the zero
            rule, and under "abstain" none.

    Raises:
        TypeError: if `wrapped` is not a `tf.distribute.CrossDeviceOps`.
        ValueError: when `Signum` is built, if there is no such replica.

    Example:
        >>> strategy = tf.distribute.MirroredStrategy(["CPU:0"], cross_device_ops=MajorityVote())
    """

    def __init__(self, wrapped: Any = None, adversaries: Mapping[int, Adversary] | None = None) -> None:
        super().__init__()
        wrapped = tf.distribute.ReductionToOneDevice() if wrapped is None else wrapped
        if not isinstance(wrapped, tf.distribute.CrossDeviceOps):
            raise TypeError(f"MajorityVote wraps a tf.distribute.CrossDeviceOps, got {wrapped!r}")
        self.wrapped, self.adversaries = wrapped, dict(adversaries or {})

    def vote(
        self,
        ballots: Sequence[Tensor],
        zeros: Zeros,
        step: Tensor,
        terms: Tensor,
        tallies: list[list[list[Tensor]]] | None = None,
    ) -> list[Tensor]:
        """Return the verdict of all replicas, once on each device of this worker.

        Args:
            ballots: of this worker's replicas, in their order: uint8 of shape (planes, bytes), the same for all, a
                multiple of 8 bytes for each replica of all workers.
            zeros: the zero rule.
            step: parity of `t`, a uint8 scalar.
            terms: what all workers must have in common, as `agreement.terms` has it.
            tallies: where a monitor wants to know, an empty list; for each replica of this worker it gets the ballots
                that this one tallied, in int64 words.

        Returns:
            uint8 of the ballots' shape, one a ballot.

        Raises:
            tf.errors.InvalidArgumentError: on all workers when the graph runs, if they differ in their terms.
        """
        if isinstance(self.wrapped, internals.CollectiveAllReduce):
            return _vote_by_collectives(self.wrapped, ballots, zeros, step, terms, tallies)
        return _vote_here(ballots, zeros, step, tallies)

    def sent_bytes(self, width: int, planes: int, replicas: int) -> int:
        """Return the bytes of payload that one replica sends in one vote.

        Args:
            width: of a ballot, in bytes.
            planes: of a ballot.
            replicas: of all workers.
        """
        heads = HEADER_BYTES if isinstance(self.wrapped, internals.CollectiveAllReduce) else 0
        return (replicas - 1) * (heads + 2 * planes * width // replicas)

    def reduce_implementation(self, reduce_op: Any, per_replica_value: Any, destinations: Any, options: Any) -> Any:
        """Reduce what is no ballot."""
        return self.wrapped.reduce_implementation(reduce_op, per_replica_value, destinations, options)

    def batch_reduce_implementation(self, reduce_op: Any, value_destination_pairs: Any, options: Any) -> Any:
        """Reduce several of what are no ballots."""
        return self.wrapped.batch_reduce_implementation(reduce_op, value_destination_pairs, options)

    def broadcast_implementation(self, tensor: Any, destinations: Any) -> Any:
        """Broadcast."""
        return self.wrapped.broadcast_implementation(tensor, destinations)

    def _gather_implementation(self, per_replica_value: Any, destinations: Any, axis: Any, options: Any) -> Any:
        return self.wrapped._gather_implementation(per_replica_value, destinations, axis, options)


def _vote_here(
    ballots: Sequence[Tensor], zeros: Zeros, step: Tensor, tallies: list[list[list[Tensor]]] | None
) -> list[Tensor]:
    """Between the devices of one process."""
    shares = [tf.split(ballot, len(ballots), axis=1) for ballot in ballots]
    verdicts = []
    for teller, ballot in enumerate(ballots):
        with tf.device(ballot.device):
            verdicts.append(_verdict([share[teller] for share in shares], zeros, step, tallies))
    copies = []
    for ballot in ballots:
        with tf.device(ballot.device):
            copies.append(tf.concat(verdicts, axis=1))
    return copies


def _vote_by_collectives(
    ops: Any,
    ballots: Sequence[Tensor],
    zeros: Zeros,
    step: Tensor,
    terms: Tensor,
    tallies: list[list[list[Tensor]]] | None,
) -> list[Tensor]:
    """Between all workers: every replica's share travels behind the terms, and the verdicts come back alone."""
    replicas, received = ops._group_size, []
    for device, ballot in enumerate(ballots):
        with tf.device(ballot.device):
            planes, width = ballot.shape
            shares = tf.reshape(words(ballot, tf.int32), [planes, replicas, width // replicas // 4])
            rows = tf.reshape(tf.transpose(shares, [1, 0, 2]), [replicas, -1])
            heads = tf.repeat(terms[None], replicas, axis=0)
            received.append(internals.all_to_all(ops, device, tf.concat([heads, rows], axis=1)))
    verdicts = []
    for device, (ballot, rows) in enumerate(zip(ballots, received, strict=True)):
        with tf.device(ballot.device):
            checks = agreement.check(rows[:, : agreement.TERMS])
            with tf.control_dependencies(checks):
                planes, width = ballot.shape
                shares = unwords(tf.reshape(rows[:, agreement.TERMS :], [replicas, planes, width // replicas // 4]))
                verdict = _verdict(tf.unstack(shares), zeros, step, tallies)
                verdicts.append(internals.all_gather(ops, device, words(verdict, tf.int32)))
    copies = []
    for ballot, gathered in zip(ballots, verdicts, strict=True):
        with tf.device(ballot.device):
            planes, width = ballot.shape
            rows = tf.transpose(tf.reshape(gathered, [replicas, planes, width // replicas // 4]), [1, 0, 2])
            copies.append(unwords(tf.reshape(rows, [planes, width // 4])))
    return copies


def _verdict(
    ballots: Sequence[Tensor], zeros: Zeros, step: Tensor, tallies: list[list[list[Tensor]]] | None = None
) -> Tensor:
    """The teller's work: uint8 of shape (planes, bytes) from every worker's."""
    cast = [tf.unstack(words(ballot, tf.int64)) for ballot in ballots]
    if tallies is not None:
        tallies.append(cast)
    return unwords(tf.stack(core.verdict(cast, zeros, tf.cast(step, tf.int64))))


def width(length: int, replicas: int) -> int:
    """Return to how many bytes a ballot of `length` bytes is padded, so that every teller's share is whole words."""
    unit = replicas * WORD_BITS // 8
    return unit * -(-length // unit)
