"""`VerifyReplicas`: a flipped bit on one replica is found at the next check and named."""

from typing import Any

import keras
import numpy as np
import pytest

from signsgd_keras import LossScaleOptimizer, ReplicasDifferError, Signum, VerifyReplicas
from tests.devices import mirrored
from tests.keras.models import compiled, data, net

from .conftest import Fault
from .flips import STEPS, FlipBit, train

pytestmark = pytest.mark.multiprocess

REPLICAS = 3


def test_nothing_is_found_where_all_is_well() -> None:
    assert train(mirrored(REPLICAS), 1) == ("", STEPS)


@pytest.mark.parametrize(
    ("replica", "momentum"),
    [
        pytest.param(replica, momentum, marks=[pytest.mark.nightly] if momentum != replica % 2 or replica == 2 else [])
        for replica in range(REPLICAS)
        for momentum in (False, True)
    ],
)
def test_a_flipped_bit_is_found_at_the_next_check(replica: int, momentum: bool, fault: Fault) -> None:
    with fault("a bit flips in a variable or a verdict momentum of a Keras replica, and is found"):
        message, found = train(mirrored(REPLICAS), 2, FlipBit(replica, 2, momentum))
        assert found == ([replica], 3, "net/two/kernel")
        assert f"after step 3 replica {replica} differs from the other replicas in net/two/kernel, or in its" in message


def test_two_replicas_cannot_tell_which_of_them_is_wrong() -> None:
    message, found = train(mirrored(2), 1, FlipBit(1, 1))
    assert found == ([0, 1], 1, "net/two/kernel")
    assert "replicas 0 and 1 differ from the other replicas" in message


@pytest.mark.nightly
def test_every_so_many_votes() -> None:
    """Two batches a vote: the fourth is after the last batch."""
    assert train(mirrored(REPLICAS), 4, FlipBit(1, 0), gradient_accumulation_steps=2)[1] == ([1], 3, "net/two/kernel")
    assert train(mirrored(REPLICAS), 5, FlipBit(1, 0), gradient_accumulation_steps=2) == ("", STEPS // 2)


@pytest.mark.nightly
def test_under_a_loss_scale() -> None:
    assert train(mirrored(REPLICAS), 2, FlipBit(2, 2), wrap=LossScaleOptimizer)[1] == ([2], 3, "net/two/kernel")


@pytest.mark.parametrize("every", [0, -1, 1.5, "often"])
def test_wrong_settings_are_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every_n_steps must be a whole number of 1 or more, got {every!r}"):
        VerifyReplicas(every)


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, Signum])
def test_nothing_to_compare(optimizer: Any) -> None:
    model = net()
    model.compile(optimizer(), loss="mse")
    with pytest.raises(RuntimeError, match="VerifyReplicas has no replicas to compare: it needs Signum and several"):
        model.fit(*data(4), verbose=0, callbacks=[VerifyReplicas()])


def test_a_bit_that_is_the_same_number_is_found_too() -> None:
    """Minus zero."""
    with mirrored(REPLICAS).scope():
        model = compiled(Signum(0.0))
    for part in model.get_layer("one").bias.value.values:
        part.assign(np.zeros(3, np.float32))
    model.get_layer("one").bias.value.values[1].assign(np.full(3, -0.0, np.float32))
    with pytest.raises(ReplicasDifferError, match="replica 1 differs from the other replicas in net/one/bias"):
        model.fit(*data(6), batch_size=6, verbose=0, callbacks=[VerifyReplicas(1)])


def test_a_verdict_momentum_that_moves_nothing_is_found_too() -> None:
    """With a rate of 0 the variables stay the same on all."""
    with mirrored(REPLICAS).scope():
        model = compiled(Signum(0.0, verdict_momentum=0.5))
        model.optimizer.build(model.trainable_variables)
    bias = model.get_layer("one").bias
    model.optimizer.state_of(bias)[1].value.values[1].assign(np.full(3, 0.5, np.float32))
    with pytest.raises(ReplicasDifferError, match="replica 1 differs from the other replicas in net/one/bias"):
        model.fit(*data(6), batch_size=6, verbose=0, callbacks=[VerifyReplicas(1)])
