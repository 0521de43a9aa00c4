"""The vote of one optimizer among the replicas of its strategy, in one exchange for all its variables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

import signsgd_core as core
from signsgd_core.adversaries import Adversary, check_adversaries
from signsgd_core.wire import shard_bytes

from .. import _compat
from ..replicas import Replicas
from ..slot import Slot
from ..step import Gradients, StepInput
from ..variables import path
from .accumulation import vote_or_add
from .adversaries import lie
from .agreement import Header, Settings, agree, describe, describe_values
from .ballots import Words, count_words, pack, unpack, verdict
from .cross_device_ops import MajorityVote
from .observers import Observer, Seen
from .transport import Transport, transport_for

Tensor = Any
Variable = Any


@dataclass(frozen=True)
class _Brought:
    """The gradients of one replica; opaque to TensorFlow, which would fail on replicas that differ."""

    gradients: Sequence[Tensor]
    numbers: Sequence[int]


class Vote:
    """Takes an optimizer's steps by the majority of its replicas: prepare, then commit.

    Every replica first updates its momentum and casts its ballot. Then ballots go up and verdicts come down.
    Variables and verdict momenta change only when the verdict on all of them has arrived.

    Args:
        replicas: that vote.
        transport: how bytes travel between them.
        adversaries: replica -> function of its gradients, which returns those that it votes with.

    Attributes:
        observers: are told what happens; `observe` adds one, `forget` removes those of a kind.
    """

    def __init__(
        self, replicas: Replicas, transport: Transport, adversaries: Mapping[int, Adversary] | None = None
    ) -> None:
        self.replicas, self.transport, self.adversaries = replicas, transport, adversaries or {}
        self.observers: list[Observer] = []

    def observe(self, observer: Observer) -> None:
        """Tell an observer of every vote that is traced from now on."""
        self.observers.append(observer)

    def forget(self, kind: type[Observer]) -> None:
        """Tell the observers of a kind of no vote that is traced from now on."""
        self.observers = [observer for observer in self.observers if not isinstance(observer, kind)]

    def agree(self, slots: Sequence[Slot], settings: Settings, weight_decay: float | None) -> None:
        """Make sure that all replicas have the variables, and all workers the same ones, settings and values.

        Args:
            slots: all variables of the optimizer, without their state.
            settings: the optimizer's by name.
            weight_decay: of the optimizer.

        Raises:
            ValueError: if not, or if an adversary is no replica; on all workers, if they differ.
        """
        check_adversaries(self.adversaries, self.replicas.count, "replica")
        for slot in slots:
            if not self.replicas.has(slot.variable):
                raise ValueError(
                    f"{path(slot.variable)} was made outside of the {self.replicas.name} that Signum votes in, whose "
                    "replicas have no copies of it: make the model, too, within `with strategy.scope():`"
                )
        if self.transport.between_workers:
            lines = [describe(slot, weight_decay) for slot in slots]
            agree(self.transport, settings, lines + describe_values([slot.variable for slot in slots]))

    def meet(
        self,
        gradients: Sequence[Tensor],
        numbers: Sequence[int],
        step: Callable[[Gradients, Sequence[int]], None],
    ) -> None:
        """Bring the gradients of this worker's replicas together, and step in cross-replica context.

        There a condition may hold a vote, which in replica context it may not.

        Args:
            gradients: of the replica that calls, dense.
            numbers: of their variables.
            step: takes the gradients of all and the numbers.

        Raises:
            ValueError: outside of `strategy.run`, where the vote cannot work, or if replicas lack different gradients.
        """
        context = tf.distribute.get_replica_context()
        if context is None:
            raise ValueError("Signum votes among replicas: call apply() within strategy.run(), or take model.fit()")
        if _compat.in_xla():
            raise ValueError(
                "a vote among replicas cannot be compiled by XLA: take compile(jit_compile=False) or 'auto'"
            )
        if self.transport.between_workers and _compat.in_keras_loop():
            raise ValueError(
                "TensorFlow's collectives fail within Keras' steps_per_execution > 1, whatever the optimizer, and "
                "where several optimizers are built in the first step: take compile(steps_per_execution=1), build them "
                "before, or on one machine take MirroredStrategy(cross_device_ops=MajorityVote())"
            )

        def together(strategy: Any, value: Any) -> None:
            brought = self.replicas.local(value)
            found = [list(one.numbers) for one in brought]
            if any(other != found[0] for other in found):
                raise ValueError(
                    f"the replicas have gradients for different variables, by their numbers {found}: a vote needs "
                    "them for the same ones on all"
                )
            step([one.gradients for one in brought], found[0])

        # AutoGraph would rewrite all of the package where a loop of one's own is a tf.function.
        context.merge_call(tf.autograph.experimental.do_not_convert(together), args=(_Brought(gradients, numbers),))

    def step(self, given: StepInput) -> None:
        """Take one step of the variables by the majority's verdict, in cross-replica context."""
        if given.accumulation is None:
            self._vote(given)
        else:
            vote_or_add(
                self.replicas,
                given.accumulation,
                given.gradients,
                lambda means: self._vote(given._replace(gradients=means)),
            )

    def _vote(self, given: StepInput) -> None:
        ballots = self.replicas.each(lambda: self._cast(given))
        self._commit(given, self._decide(given, ballots))

    def _cast(self, given: StepInput) -> Tensor:
        """Return the ballot of one replica, padded to whole shards (steps 1-4); in replica context."""
        replica, place = self.replicas.current()
        gradients = given.clip(given.gradients[place])
        if replica in self.adversaries:
            gradients = lie(self.adversaries[replica], gradients)
        for observer in self.observers:
            observer.gradients(gradients)
        bit = core.zero_bit(given.zeros, _parity(given), replica % 2)
        pairs = zip(gradients, given.slots, strict=True)
        ballots = [pack(slot.update.direction(g, slot.momentum, given.step), bit) for g, slot in pairs]
        # Padded to the size of all variables, with a gradient or without: an exchange of messages that differ in size
        # never ends, and workers that lack different gradients are to get as far as comparing their headers.
        count = self.replicas.count
        whole = count * shard_bytes(8 * given.ballot_bytes, count)
        padding = whole - sum(slot.ballot_bytes for slot in given.slots)
        return tf.concat([*ballots, tf.zeros([ballots[0].shape[0], padding], tf.uint8)], axis=1)

    def _decide(self, given: StepInput, ballots: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the verdict, once on each device of this worker (steps 5 and 6)."""
        if not self.observers:
            return self._exchange(given, ballots)[0]
        with tf.control_dependencies(ballots):
            begin = tf.timestamp()
        with tf.control_dependencies([begin]):  # no part of the exchange runs before the clock does
            ballots = self.replicas.each(tf.identity, self.replicas.spread(ballots))
        verdicts, shards = self._exchange(given, ballots)
        with tf.control_dependencies([begin, *verdicts]):
            seconds = tf.timestamp() - begin
        sizes, sent = [slot.size for slot in given.slots], self._sent_bytes(ballots[0])

        def tell() -> None:
            replica, place = self.replicas.current()
            for observer in self.observers:
                observer.verdict(Seen(replica, sizes, ballots[place], verdicts[place], shards[place], sent, seconds))

        self.replicas.each(tell)
        return verdicts

    def _exchange(self, given: StepInput, ballots: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Words]]]:
        """Return the verdict on each device, and what each replica of this worker counted for it."""
        lines = [describe(slot, given.weight_decay) for slot in given.slots]
        header = Header(given.settings, lines, given.learning_rate, given.step)
        shards, verdicts = [], []
        for ballot, owned in zip(ballots, self.transport.up(ballots, header), strict=True):
            with tf.device(ballot.device):
                shards.append(count_words(owned))
                verdicts.append(verdict(shards[-1], given.zeros, _parity(given)))
        return self.transport.down(verdicts), shards

    def _commit(self, given: StepInput, verdicts: Sequence[Tensor]) -> None:
        """Move all variables and verdict momenta on every device (steps 7 and 8)."""
        spread, first = self.replicas.spread(verdicts), 0
        for slot in given.slots:
            self._move(given, slot, spread, first)
            first += slot.ballot_bytes

    def _move(self, given: StepInput, slot: Slot, verdicts: Any, first: int) -> None:
        """Move a variable by its bytes of the verdict, of which `first` is the number of the first."""

        def move(x: Variable, bits: Tensor, u: Variable | None) -> None:
            signs = unpack(bits[:, first : first + slot.ballot_bytes], slot.size)
            v = tf.reshape(signs, slot.variable.shape)
            slot.update.move(x, v, u, given.learning_rate, slot.weight_decay)

        u = None if slot.verdict_momentum is None else slot.verdict_momentum.value
        self.replicas.update(slot.variable, move, verdicts, u)

    def _sent_bytes(self, ballot: Tensor) -> int:
        """Return the bytes of payload that one replica sends in one vote: a shard to each other, up and down."""
        planes, width = ballot.shape
        others = self.replicas.count - 1
        return int(others * (self.transport.header_bytes + 2 * planes * width // self.replicas.count))


def vote_among(replicas: Replicas) -> Vote:
    """Return the vote of an optimizer of these replicas, with the options of their strategy."""
    op = _compat.cross_device_ops(replicas.strategy)
    if isinstance(op, MajorityVote):
        return Vote(replicas, transport_for(op.wrapped), op.adversaries)
    return Vote(replicas, transport_for(op), getattr(replicas.strategy, "adversaries", None))


def _parity(given: StepInput) -> Tensor:
    return tf.cast(given.step % 2, tf.uint8)
