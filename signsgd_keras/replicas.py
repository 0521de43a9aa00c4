"""Signum among the replicas of a `tf.distribute` strategy: cast, vote, apply."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

import signsgd_core as core
from signsgd_core.adversaries import check_adversaries
from signsgd_core.digests import digest

from . import agreement, internals
from .adversaries import lie
from .ballots import pack, unpack
from .blocks import path
from .cross_device_ops import MajorityVote, width
from .own import accumulate, mean_gradients, own_number
from .statistics import count_nonfinite

if TYPE_CHECKING:
    from .optimizer import Signum

Tensor = Any
Variable = Any


@dataclass(frozen=True)
class _Own:
    """What one replica brings to a step; opaque to TensorFlow, which would fail on replicas that differ."""

    gradients: list[Tensor]
    variables: list[Variable]


class Voter:
    """One optimizer's vote among the replicas of its strategy.

    Args:
        optimizer: made in the scope of the strategy.
    """

    def __init__(self, optimizer: "Signum") -> None:
        self.optimizer = optimizer
        self.strategy: Any = optimizer._distribution_strategy

    @property
    def op(self) -> MajorityVote:
        """The op that votes: the strategy's, or one of ours around it."""
        op = internals.cross_device_ops(self.strategy)
        return op if isinstance(op, MajorityVote) else MajorityVote(op, getattr(self.strategy, "adversaries", None))

    def check_scope(self) -> None:
        """Make sure that the optimizer belongs to the strategy in force, and that this one can vote.

        Raises:
            ValueError: if not.
        """
        current = tf.distribute.get_strategy()
        if current is not self.strategy:
            raise ValueError(
                f"Signum was made under {_name(self.strategy)} and is used under {_name(current)}, where it would step "
                "without a vote: make model, optimizer and compile() within `with strategy.scope():`"
            )
        votes = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
        if tf.distribute.has_strategy() and not isinstance(current, (*votes, tf.distribute.OneDeviceStrategy)):
            raise ValueError(
                f"Signum cannot vote under {_name(self.strategy)}: take tf.distribute.MirroredStrategy on one machine "
                "or signsgd_keras.MultiWorkerMajorityVoteStrategy on several"
            )

    def agree(self, variables: list[Variable]) -> None:
        """Make sure that all replicas have the variables and their votes, and that those who lie are there.

        Raises:
            ValueError: if a variable was made elsewhere, or, on all workers, if they differ in settings, variables or
                their values.
        """
        check_adversaries(self.op.adversaries, self.optimizer.replicas, "replica")
        for variable in variables:
            if not self.strategy.extended.variable_created_in_scope(_raw(variable)):
                raise ValueError(
                    f"{path(variable)} was made outside of the {_name(self.strategy)} that Signum votes in, whose "
                    "replicas have no copies of it: make the model, too, within `with strategy.scope():`"
                )
        if isinstance(self.op.wrapped, internals.CollectiveAllReduce):
            agreement.agree(
                self.op.wrapped, _settings(self.optimizer), [*_terms(self.optimizer, variables), *_values(variables)]
            )

    def apply(self, gradients: list[Tensor], variables: list[Variable]) -> None:
        """Take one step, in replica context: accumulate, or clip, cast, vote and move.

        Args:
            gradients: this replica's, dense.
            variables: theirs.

        Raises:
            ValueError: outside of `strategy.run`, where the vote cannot work, or if replicas lack different gradients.
        """
        context = tf.distribute.get_replica_context()
        if context is None:
            raise ValueError("Signum votes among replicas: call apply() within strategy.run(), or take model.fit()")
        if internals.in_xla():
            raise ValueError(
                "a vote among replicas cannot be compiled by XLA: take compile(jit_compile=False) or 'auto'"
            )
        if internals.in_keras_loop() and isinstance(self.op.wrapped, internals.CollectiveAllReduce):
            raise ValueError(
                "TensorFlow's collectives fail within Keras' steps_per_execution > 1, whatever the optimizer: take "
                "compile(steps_per_execution=1), or on one machine MirroredStrategy(cross_device_ops=MajorityVote())"
            )
        context.merge_call(self._step, args=(_Own(gradients, variables),))

    def _step(self, strategy: Any, own: Any) -> None:
        """The step in cross-replica context, where a condition may hold a vote."""
        optimizer, own = self.optimizer, strategy.experimental_local_results(own)
        keys = [[optimizer._get_variable_index(v) for v in replica.variables] for replica in own]
        if any(replica != keys[0] for replica in keys):
            raise ValueError(
                f"the replicas have gradients for different variables, by their numbers {keys}: a vote needs them for "
                "the same ones on all"
            )
        gradients = [replica.gradients for replica in own]
        steps = optimizer.gradient_accumulation_steps
        if steps:
            sums = [optimizer._accumulated_gradients[k] for k in keys[0]]
            others = [s for k, s in enumerate(optimizer._accumulated_gradients) if k not in keys[0]]
            tf.cond(
                tf.equal((optimizer._iterations.value + 1) % steps, 0),
                lambda: self._vote(mean_gradients(strategy, gradients, sums, others, steps), keys[0]),
                lambda: accumulate(strategy, gradients, sums),
            )
        else:
            self._vote(gradients, keys[0])
        if optimizer.use_ema:
            self._average()

    def _vote(self, gradients: list[list[Tensor]], keys: list[int]) -> None:
        """Steps 1-8, in cross-replica context."""
        optimizer, strategy = self.optimizer, self.strategy
        variables, adversaries = [optimizer._trainable_variables[k] for k in keys], self.op.adversaries
        t, rule = optimizer.iterations, optimizer.zero_rule
        parity, lr = tf.cast(t % 2, tf.uint8), tf.convert_to_tensor(optimizer.learning_rate)
        # Of all variables, with a gradient or without: an exchange of messages that differ in size never ends, and
        # workers that lack different gradients are to get as far as comparing their terms.
        size = width(sum(map(_bytes, optimizer._trainable_variables)), optimizer.replicas)

        def cast() -> tuple[Tensor, Tensor]:
            replica, local = own_number(strategy)
            bit = core.zero_bit(rule, parity, replica % 2)
            sent = optimizer._clip_gradients(gradients[local])
            if replica in adversaries:
                sent = lie(adversaries[replica], sent)
            nonfinite = 0 if optimizer.statistics is None else count_nonfinite(sent)
            ballots = [
                pack(optimizer.direction(g, optimizer.state_of(v)[0]), bit)
                for g, v in zip(sent, variables, strict=True)
            ]
            padding = tf.zeros([ballots[0].shape[0], size - sum(map(_bytes, variables))], tf.uint8)
            return tf.concat([*ballots, padding], axis=1), nonfinite

        cast_all, nonfinite = strategy.extended.call_for_each_replica(cast)
        ballots = strategy.experimental_local_results(cast_all)
        terms = agreement.terms(_settings(optimizer), _terms(optimizer, variables), lr, t)
        if optimizer.statistics is None:
            verdicts = self.op.vote(ballots, rule, parity, terms)
        else:
            verdicts = self._watch(ballots, rule, parity, terms, variables, nonfinite)
        verdict = internals.per_replica(verdicts)
        first = 0
        for variable in variables:
            self._move(variable, verdict, first, lr)
            first += _bytes(variable)

    def _watch(
        self,
        ballots: Sequence[Tensor],
        rule: core.Zeros,
        parity: Tensor,
        terms: Tensor,
        variables: list[Variable],
        nonfinite: Any,
    ) -> list[Tensor]:
        """Vote, and count what the vote looked like."""
        optimizer, strategy = self.optimizer, self.strategy
        with tf.control_dependencies(ballots):
            begin = tf.timestamp()
        with tf.control_dependencies([begin]):  # no part of the vote runs before the clock does
            ballots = strategy.experimental_local_results(
                strategy.extended.call_for_each_replica(tf.identity, args=(internals.per_replica(ballots),))
            )
        tallies: list[list[list[Tensor]]] = []
        verdicts = self.op.vote(ballots, rule, parity, terms, tallies)
        with tf.control_dependencies([begin, *verdicts]):
            seconds = tf.timestamp() - begin
        planes, length = ballots[0].shape
        sent, sizes = self.op.sent_bytes(length, planes, optimizer.replicas), [int(np.prod(v.shape)) for v in variables]
        counts = strategy.experimental_local_results(nonfinite)

        def count() -> None:
            replica, local = own_number(strategy)
            optimizer.statistics.count(
                sizes, ballots[local], verdicts[local], tallies[local], replica, counts[local], sent, seconds
            )

        strategy.extended.call_for_each_replica(count)
        return verdicts

    def _move(self, variable: Variable, verdict: Any, first: int, lr: Tensor) -> None:
        """Move a variable on every device by its bytes of the verdict, the first of which is `first`."""
        length, optimizer = int(np.prod(variable.shape)), self.optimizer
        average, decay = optimizer.state_of(variable)[1], optimizer.decay(variable)

        def move(x: Variable, bits: Tensor, u: Variable | None) -> None:
            bits = bits[:, first : first + -(-length // 8)]
            optimizer.move(x, tf.reshape(unpack(bits, length), variable.shape), u, lr, decay)

        average = None if average is None else average.value
        self.strategy.extended.update(_raw(variable), move, args=(verdict, average), group=False)

    def _average(self) -> None:
        """Keras' moving average of the variables, and where asked for the variables from it."""
        optimizer = self.optimizer
        optimizer._update_model_variables_moving_average(optimizer._trainable_variables)
        if optimizer.ema_overwrite_frequency:
            tf.cond(
                tf.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0),
                lambda: optimizer._overwrite_model_variables_with_average_value(optimizer._trainable_variables),
                lambda: None,
            )


def _settings(optimizer: "Signum") -> dict[str, Any]:
    return {name: getattr(optimizer, name) for name in agreement.SETTINGS}


def _terms(optimizer: "Signum", variables: list[Variable]) -> list[str]:
    """Return what all workers must do alike with each variable, in words."""
    words = []
    for variable in variables:
        text, constraint = f"{path(variable)}: shape {tuple(variable.shape)}", getattr(variable, "constraint", None)
        if optimizer.decay(variable) != (optimizer.weight_decay or 0.0):
            text += ", no weight decay"
        if constraint is not None:
            config: Any = getattr(constraint, "get_config", dict)()
            text += f", constraint {getattr(constraint, '__name__', type(constraint).__name__)} "
            text += json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__)
        words.append(text)
    return words


def _values(variables: list[Variable]) -> list[str]:
    """Return what stands for the values of variables, as far as they have any by now."""
    words = []
    with tf.init_scope():
        for variable in variables:
            try:
                words.append(f"{path(variable)}: initial values {digest([variable.numpy()]).hex()}")
            except tf.errors.FailedPreconditionError:  # a layer that is built in the graph
                words.append(f"{path(variable)}: no values yet")
    return words


def _raw(variable: Variable) -> Any:
    """Return TensorFlow's variable of Keras', which may be one already."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _bytes(variable: Variable) -> int:
    """Return how many bytes each plane of its ballot takes."""
    return -(-int(np.prod(variable.shape)) // 8)


def _name(strategy: Any) -> str:
    name = type(strategy).__name__
    return "no strategy" if name.startswith("_Default") else name
