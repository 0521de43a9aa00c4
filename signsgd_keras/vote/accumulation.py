"""Gradients of several steps in one vote: each replica sums its gradients, and votes with their mean."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ..replicas import Replicas
from ..step import Accumulation, Gradients

Tensor = Any


def vote_or_add(
    replicas: Replicas, accumulation: Accumulation, gradients: Gradients, vote: Callable[[Gradients], None]
) -> None:
    """Add each replica's gradients to its sums, or vote with their means; in cross-replica context.

    A variable without a gradient in the last step does not vote, and its sum starts over, too.

    Args:
        replicas: that vote.
        accumulation: of their gradients.
        gradients: of this step.
        vote: takes mean gradients and votes.
    """
    voting = [accumulation.sums[k] for k in accumulation.numbers]

    def mean() -> list[Tensor]:
        pairs = zip(gradients[replicas.current()[1]], voting, strict=True)
        means = [(g + s) / accumulation.steps for g, s in pairs]
        with tf.control_dependencies(means):
            for s in accumulation.sums:
                s.assign(tf.zeros_like(s))
        return means

    def add() -> None:
        for g, s in zip(gradients[replicas.current()[1]], voting, strict=True):
            s.assign_add(g)

    tf.cond(accumulation.is_last, lambda: vote(replicas.each(mean)), lambda: _nothing(replicas.each(add)))


def _nothing(found: Any) -> None:
    """Return nothing, as both branches of a condition must."""
