"""Replicas that lie vote as `Reference` has it; a silent one sends zeros."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from signsgd_core.adversaries import Adversary, invert, send_nan, silent
from signsgd_keras import MajorityVote, Signum, VoteMonitor
from tests.keras.models import Array, arrays, compiled, data, same

from .conftest import Fault
from .lies import CASES, SHAPES, Moody, adversaries, given, reference, train

pytestmark = pytest.mark.multiprocess

REPLICAS = 4


def strategy(lying: dict[int, Adversary]) -> Any:
    devices = [f"CPU:{k}" for k in range(REPLICAS)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=MajorityVote(adversaries=lying))


@pytest.mark.parametrize("names", CASES)
def test_they_vote_as_the_reference_has_it(names: dict[int, str], fault: Fault) -> None:
    gradients = given(REPLICAS)
    with fault("Keras replicas that lie: they cost their votes and nothing else", len(names)):
        found = train(strategy(adversaries(names)), gradients, "alternate")
        assert same(found, reference(gradients, adversaries(names), "alternate"))
    assert not same(found, reference(gradients, {}, "alternate"))


def test_a_silent_replica_casts_no_vote_where_zeros_abstain() -> None:
    gradients = given(REPLICAS)
    found = train(strategy({2: silent}), gradients, "abstain")
    assert same(found, reference(gradients, {2: silent}, "abstain"))


@pytest.mark.parametrize("names", [{2: "silent"}, {0: "silent", 3: "silent"}])
def test_a_silent_replica_else_votes_with_zeros(names: dict[int, str]) -> None:
    """Neutral ballots: in `Reference`, which counts no ballot of it, ties are others."""
    gradients, zeros = given(REPLICAS), adversaries(dict.fromkeys(names, "zeros"))
    found = train(strategy(adversaries(names)), gradients, "alternate")
    assert same(found, reference(gradients, zeros, "alternate"))


def test_silence_now_and_then_is_a_gradient_of_zeros() -> None:
    gradients = given(REPLICAS)
    found = train(strategy({1: Moody()}), gradients, "alternate")
    assert same(found, reference(gradients, {1: Moody(np.zeros_like)}, "alternate"))


def test_they_get_what_a_replica_would_vote_with() -> None:
    """The clipped mean of two batches, once a vote, float32."""
    seen: list[Array] = []

    def watch(gradient: Array) -> Array:
        seen.append(gradient.copy())
        return gradient

    gradients = given(REPLICAS)
    train(strategy({3: watch}), gradients, "alternate", clipvalue=0.125, gradient_accumulation_steps=2)
    means = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(*_of(gradients, 3), strict=True)]
    assert same(seen, [np.clip(g, -0.125, 0.125) for mean in means for g in mean])
    assert [g.shape for g in seen[:2]] == list(SHAPES)


def _of(gradients: list[list[list[Array]]], replica: int) -> tuple[list[list[Array]], list[list[Array]]]:
    """A replica's gradients of the even and of the odd steps."""
    own = [step[replica] for step in gradients]
    return own[::2], own[1::2]


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_fit_and_its_monitor(eager: bool) -> None:
    """What lies send counts as not finite where it is so; parameters stay the same on all."""
    with strategy({1: send_nan, 2: invert}).scope():
        model = compiled(Signum(2.0**-4), run_eagerly=eager)
    history = model.fit(*data(24), batch_size=8, verbose=0, callbacks=[VoteMonitor()]).history
    assert history["vote/nonfinite"] == [3 * model.count_params()]
    assert all(np.isfinite(x).all() for x in arrays(model.trainable_variables))


def test_half_precision() -> None:
    with strategy({1: invert}).scope():
        x = keras.Variable(np.ones(3), dtype="bfloat16")
        optimizer = Signum(0.25, 0.0, 0.0)
        optimizer.build([x])
    gradients = tf.constant([[1, 1, 1], [-2, 2, 2], [-1, -1, 1], [-1, 1, 1]], tf.bfloat16)  # the second is inverted

    def own() -> None:
        replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        optimizer.apply([gradients[replica]], [x])

    tf.function(lambda: optimizer._distribution_strategy.run(own))()
    # with the lie two ties, positive at the first step, and a majority; without it the first were negative
    assert arrays([x])[0].astype(np.float32).tolist() == [0.75, 0.75, 0.75]


@pytest.mark.parametrize("number", [-1, REPLICAS])
def test_others_are_refused(number: int) -> None:
    with strategy({number: invert}).scope():
        model = compiled(Signum())
    with pytest.raises(ValueError, match=rf"adversaries must be replicas 0 to 3, got \[{number}\]"):
        model.fit(*data(8), batch_size=8, verbose=0)
