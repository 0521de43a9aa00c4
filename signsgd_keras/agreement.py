"""What all workers must have in common for a vote: said once in words, and in 32 bytes ahead of every share."""

import hashlib
import json
from typing import Any

import numpy as np
import tensorflow as tf

import signsgd_core as core
from signsgd_core.traffic import HEADER_BYTES

from . import internals

Tensor = Any

WIRE_VERSION = 1
TERMS = HEADER_BYTES // 4
"""How many int32 words they take."""

SETTINGS = (
    "beta_1",
    "beta_2",
    "verdict_momentum",
    "zero_rule",
    "warmup_steps",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)
"""Of the optimizer, known before the graph runs."""

_COLUMNS = (
    ("wire versions", 1),
    (f"settings ({', '.join(SETTINGS)})", 2),
    ("learning rates", 1),
    ("numbers of steps taken", 2),
    ("models (names, shapes, weight decay and constraints of the variables)", 2),
)
"""What the words say, and how many it takes."""


def agree(ops: Any, settings: dict[str, Any], variables: list[str]) -> None:
    """Make sure that all workers have the same wire version, settings and model, before any of them creates a variable.

    Args:
        ops: of all workers, a `CollectiveAllReduce`.
        settings: the optimizer's `SETTINGS` by name.
        variables: what they are and hold, in words.

    Raises:
        ValueError: if not, on all workers, naming the first difference.
    """
    lines = [f"wire version {WIRE_VERSION}", *(f"{name}={value!r}" for name, value in settings.items())]
    lines += variables
    text = "\n".join(lines).encode()
    summaries = internals.gather_now(ops, np.array([len(text), *_digest(lines)], np.int32))
    if (summaries == summaries[0]).all():
        return
    words = np.frombuffer(text.ljust(4 * -(-int(summaries[:, 0].max()) // 4)), np.int32)
    everyone = [row.tobytes().decode().rstrip().split("\n") for row in internals.gather_now(ops, words)]
    raise ValueError(
        f"the workers disagree and cannot vote: {core.disagreement(everyone, 'worker')}. Build the same model and the "
        "same optimizer, with the same settings, on every worker. Where values differ, load them on all, not on one."
    )


def terms(settings: dict[str, Any], variables: list[str], learning_rate: Tensor, iterations: Tensor) -> Tensor:
    """Return this replica's terms.

    Args:
        settings: the optimizer's `SETTINGS` by name.
        variables: that are voted on, in words, in their order.
        learning_rate: float32 scalar.
        iterations: int64 scalar.

    Returns:
        int32 of shape (TERMS,).
    """
    fixed = tf.constant([WIRE_VERSION, *_digest(settings)], tf.int32)
    rate = tf.bitcast(tf.cast(learning_rate, tf.float32), tf.int32)[None]
    step = tf.bitcast(tf.cast(iterations, tf.int64), tf.int32)
    return tf.concat([fixed, rate, step, tf.constant(_digest(variables), tf.int32)], axis=0)


def check(rows: Tensor) -> list[Any]:
    """Return assertions that all workers' terms, int32 of shape (replicas, TERMS), are the same.

    Every worker gets the terms of all, so all raise the same error.
    """
    checks, first = [], 0
    for name, count in _COLUMNS:
        words = rows[:, first : first + count]
        message = f"the workers disagree and cannot vote: their {name} differ; worker by worker, as bits:"
        checks.append(tf.debugging.Assert(tf.reduce_all(tf.equal(words, words[0])), [message, words], summarize=-1))
        first += count
    return checks


def _digest(value: Any) -> list[int]:
    """Two int32 words of a digest of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[k : k + 4], "little", signed=True) for k in (0, 4)]
