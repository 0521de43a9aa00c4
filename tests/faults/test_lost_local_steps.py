"""A worker that is killed or stopped between rounds of local steps ends the others, where the round began."""

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.clusters import Cluster
from tests.keras.models import compiled, data, dataset, same

from .conftest import Fault
from .test_lost_workers import LOST


def _endless(victim: int, number: int) -> tuple[str, float, bool]:
    """Fit until it fails; in its third round the victim gets a signal.

    Returns:
        The error, the wait for it, and whether the variables are those of the round's beginning.
    """
    import keras

    from signsgd_keras import LocalVote

    task = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    vote = LocalVote(sync_every=3)  # before anything else of TensorFlow
    model, seen, clock = compiled("adam"), list[Any](), [0.0]

    def note(batch: int, logs: Any) -> None:
        seen.append([v.numpy() for v in model.trainable_variables])
        clock[0] = time.monotonic()
        if batch == 6 and task == victim:
            os.kill(os.getpid(), number)

    callbacks = [vote, keras.callbacks.LambdaCallback(on_train_batch_end=note)]
    try:
        model.fit(dataset(*data(24), 6).repeat(), steps_per_epoch=10**6, verbose=0, callbacks=callbacks)
    except RuntimeError as error:
        began = seen[3 * (len(seen) // 3) - 1]
        return str(error), time.monotonic() - clock[0], same([v.numpy() for v in model.trainable_variables], began)
    return "no error", 0.0, False


@LOST
def test_a_lost_worker_is_named(
    number: signal.Signals, victim: int, fresh_cluster: Callable[[int], Cluster], fault: Fault
) -> None:
    with fault(f"a Keras worker gets {number.name} between rounds: the others name it, their variables unchanged"):
        for worker, end in enumerate(fresh_cluster(3).run(_endless, victim, int(number), lost=(victim,))):
            if worker != victim:
                assert f"worker {victim} did not answer, and the round did not close" in end[0]
                assert end[1] < 90
                assert end[2]
