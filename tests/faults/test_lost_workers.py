"""A Keras worker that is killed or stopped ends the others with an error."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.clusters import Cluster
from tests.keras.cluster_strategy import strategy
from tests.keras.models import compiled, data, dataset

from .conftest import Fault


def _endless(victim: int, number: int) -> tuple[str, float]:
    """Fit until it fails; after its fifth step the victim gets a signal. Return the error and the wait for it."""
    import keras
    import tensorflow as tf

    from signsgd_keras import Signum

    scope, clock = strategy(), [time.monotonic()]
    with scope.scope():
        model = compiled(Signum())

    def note(batch: int, logs: Any) -> None:
        clock[0] = time.monotonic()
        if batch == 5 and scope.cluster_resolver.task_id == victim:
            os.kill(os.getpid(), number)

    repeated = dataset(*data(24), 6).repeat()
    try:
        model.fit(
            repeated,
            steps_per_epoch=10**6,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)],
        )
    except tf.errors.OpError as error:
        return type(error).__name__, time.monotonic() - clock[0]
    return "no error", 0.0


LOST = pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.nightly),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.nightly),
    ],
)
"""Who is lost of three workers, and by which signal."""


@LOST
def test_a_lost_worker_ends_the_others(
    number: signal.Signals, victim: int, fresh_cluster: Callable[[int], Cluster], fault: Fault
) -> None:
    """TensorFlow asks every 30 seconds and thrice more, 10 seconds for an answer; mostly it took 0.1 to 8 seconds."""
    with fault(f"a Keras worker gets {number.name} while it trains: the others end with an error"):
        ends = fresh_cluster(3).run(_endless, victim, int(number), lost=(victim,))
        for worker, end in enumerate(ends):
            if worker == victim:
                assert end is None
            else:
                name, seconds = end
                assert name in ("UnavailableError", "AbortedError", "InternalError", "FailedPreconditionError")
                assert seconds < 90
