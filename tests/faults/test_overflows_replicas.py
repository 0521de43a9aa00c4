"""An overflow lowers the loss scale of the replica that had it, and nothing else: the vote is `Reference`'s."""

import keras
import numpy as np
import pytest

from signsgd_keras import LossScaleOptimizer, Signum
from tests.devices import mirrored
from tests.keras.models import arrays, compiled, components, data, dataset, replay, same, shares

from .conftest import Fault
from .overflows import OVERFLOWS, expected, given, judge, run

pytestmark = pytest.mark.multiprocess

LR = 2.0**-4


def test_the_overflows_are_what_they_claim() -> None:
    _, states, _ = expected(given(3))
    assert [[scale for scale, _ in state] for state in zip(*states, strict=True)] == [
        [8, 8, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32],
        [8, 4, 2, 2, 2, 4, 4, 4, 8, 4, 4, 4, 8, 8],
        [8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128],
    ]


def test_replicas(fault: Fault) -> None:
    with fault("a scaled gradient overflows on a Keras replica: it costs its votes, nobody's step", len(OVERFLOWS)):
        judge(run(mirrored(3), given(3)), given(3), slice(3))


def test_fit_in_mixed_float16() -> None:
    """The second replica sees an Inf in the third batch of four: it abstains there, and its scale alone is halved."""
    x, y = data(24)
    x[16] = np.inf
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with mirrored(2).scope():
            model = compiled(LossScaleOptimizer(Signum(LR, 0.5, 0.75)))
        model.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    finally:
        keras.config.set_dtype_policy(before)
    assert type(model.optimizer) is LossScaleOptimizer
    assert components([model.optimizer.dynamic_scale])[0].tolist() == [2.0**15, 2.0**14]
    reference = replay(shares(mirrored(2), dataset(x, y, 6)), LR, betas=(0.5, 0.75))
    assert same(arrays(model.trainable_variables), reference.parameters)
