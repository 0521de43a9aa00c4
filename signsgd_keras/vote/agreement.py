"""Are all workers about to vote on the same? Compared once in words, and in 32 bytes ahead of every shard."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from signsgd_core.wire import HEADER_BYTES, WIRE_VERSION, digest, disagreement

from ..slot import Slot
from ..variables import path

Tensor = Any
Settings = dict[str, Any]

HEADER_WORDS = HEADER_BYTES // 4
"""How many int32 words a header takes."""


def agree(transport: Any, settings: Settings, lines: Sequence[str]) -> None:
    """Make sure that all workers have the same wire version, settings and model, before one creates a variable.

    Args:
        transport: of the vote.
        settings: the optimizer's by name, but for the learning rate.
        lines: its variables in words.

    Raises:
        ValueError: if not, on all workers, naming the first difference.
    """
    lines = [f"wire version {WIRE_VERSION}", *(f"{name}={value!r}" for name, value in settings.items()), *lines]
    text = "\n".join(lines).encode()
    summaries = transport.gather(np.array([len(text), *_fingerprint(lines)], np.int32))
    if (summaries == summaries[0]).all():
        return
    row: npt.NDArray[np.int32] = np.frombuffer(text.ljust(4 * -(-int(summaries[:, 0].max()) // 4)), np.int32)
    everyone = [found.tobytes().decode().rstrip().split("\n") for found in transport.gather(row)]
    raise ValueError(
        f"the workers disagree and cannot vote: {disagreement(everyone, 'worker')}. Build the same model and the "
        "same optimizer, with the same settings, on every worker. Where values differ, load them on all, not on one."
    )


class Header:
    """What all workers must have in common for one vote, in `HEADER_BYTES` ahead of every shard.

    Args:
        settings: the optimizer's by name, but for the learning rate.
        lines: the variables that are voted on in words, in their order.
        learning_rate: a scalar.
        step: `t`, an integer scalar.
    """

    def __init__(self, settings: Settings, lines: Sequence[str], learning_rate: Tensor, step: Tensor) -> None:
        self._settings, self._lines, self._learning_rate, self._step = settings, lines, learning_rate, step

    def words(self) -> Tensor:
        """Return the header of this worker, int32 of shape (HEADER_WORDS,)."""
        fixed = tf.constant([WIRE_VERSION, *_fingerprint(self._settings)], tf.int32)
        rate = tf.bitcast(tf.cast(self._learning_rate, tf.float32), tf.int32)[None]
        step = tf.bitcast(tf.cast(self._step, tf.int64), tf.int32)
        return tf.concat([fixed, rate, step, tf.constant(_fingerprint(self._lines), tf.int32)], axis=0)

    def check(self, everyone: Tensor) -> list[Any]:
        """Return assertions that the headers of all workers are the same.

        Every worker gets those of all, so all raise the same error.

        Args:
            everyone: int32 of shape (replicas, HEADER_WORDS).
        """
        columns = (
            ("wire versions", 1),
            (f"settings ({', '.join(self._settings)})", 2),
            ("learning rates", 1),
            ("numbers of steps taken", 2),
            ("models (names, shapes, weight decay and constraints of the variables)", 2),
        )
        checks, first = [], 0
        for name, count in columns:
            found = everyone[:, first : first + count]
            message = f"the workers disagree and cannot vote: their {name} differ; worker by worker, as bits:"
            same = tf.reduce_all(tf.equal(found, found[0]))
            checks.append(tf.debugging.Assert(same, [message, found], summarize=-1))
            first += count
        return checks


def describe(slot: Slot, weight_decay: float | None) -> str:
    """Return a variable in words, with what each worker does to it by itself.

    Args:
        slot: of the variable.
        weight_decay: of the optimizer.
    """
    variable, constraint = slot.variable, getattr(slot.variable, "constraint", None)
    text = f"{path(variable)}: shape {tuple(variable.shape)}"
    if slot.update.polar is not None:
        text += ", orthogonalized with {rows} rows and {fan_in} columns".format(**slot.update.polar.matrix._asdict())
    if slot.weight_decay != (weight_decay or 0.0):
        text += ", no weight decay"
    if constraint is not None:
        config: Any = getattr(constraint, "get_config", dict)()
        text += f", constraint {getattr(constraint, '__name__', type(constraint).__name__)} "
        text += json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__)
    return text


def describe_values(variables: Sequence[Any]) -> list[str]:
    """Return in words a digest of each variable's values, as far as it has any by now."""
    lines = []
    with tf.init_scope():
        for variable in variables:
            try:
                lines.append(f"{path(variable)}: initial values {digest([variable.numpy()]).hex()}")
            except tf.errors.FailedPreconditionError:  # a layer that is built in the graph
                lines.append(f"{path(variable)}: no values yet")
    return lines


def _fingerprint(value: Any) -> list[int]:
    """Return two int32 words of a digest of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    whole = hashlib.sha256(text.encode()).digest()  # as in all messages of this wire version
    return [int.from_bytes(whole[k : k + 4], "little", signed=True) for k in (0, 4)]
