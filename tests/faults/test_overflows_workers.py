"""Each worker has a loss scale of its own, in memory and in files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.clusters import Cluster
from tests.keras.cluster_strategy import strategy
from tests.keras.models import Array, arrays, compiled, components, data, same

from .conftest import Fault
from .overflows import OVERFLOWS, Steps, given, judge, run


def _run(gradients: Array) -> tuple[Steps, list[Array], int]:
    return run(strategy(), gradients)


def test_workers(cluster: Callable[[int], Cluster], fault: Fault) -> None:
    with fault("a scaled gradient overflows on a Keras worker: it costs its votes, nobody's step", len(OVERFLOWS)):
        for worker, outcome in enumerate(cluster(2).run(_run, given(2))):
            judge(outcome, given(2), slice(worker, worker + 1))


def _made() -> Any:
    from signsgd_keras import LossScaleOptimizer, Signum

    with strategy().scope():
        made = compiled(LossScaleOptimizer(Signum(2.0**-4, 0.5, 0.5), initial_scale=8.0))
        made.optimizer.build(made.trainable_variables)
    return made


def _state(made: Any) -> tuple[float, list[Array]]:
    scaled = made.optimizer
    own = components([scaled.dynamic_scale, scaled.step_counter, *scaled.inner_optimizer._momentums])
    return float(own[0][0]), [*own, *arrays(made.trainable_variables)]


def _save_and_load(folder: str) -> tuple[float, float, bool]:
    """The scales before and after, and whether the rest is the same."""
    first, file = _made(), f"{folder}/{strategy().cluster_resolver.task_id}.weights.h5"
    x, y = data(8)
    x[5] = np.inf  # of the second worker
    first.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    first.save_weights(file)
    second = _made()
    second.load_weights(file)
    (before, saved), (after, loaded) = _state(first), _state(second)
    return before, after, same(saved, loaded)


def test_files(cluster: Callable[[int], Cluster], tmp_path: Path) -> None:
    for found, scale in zip(cluster(2).run(_save_and_load, str(tmp_path)), (8.0, 4.0), strict=True):
        assert found == (scale, scale, True)
