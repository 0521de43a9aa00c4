"""What the list of front ends skips because it is refused, is refused."""

from collections.abc import Callable, Collection
from typing import Any

import pytest

from tests.clusters import Cluster
from tests.devices import mirrored

from . import keras_runs
from .cases import Case
from .front_ends import FRONT_ENDS

CASE = Case(2, absent="somewhere")


def step(strategy: Any, without: Collection[int] = ()) -> None:
    """A step in which each replica lacks other gradients."""
    import tensorflow as tf

    with strategy.scope():
        xs, optimizer = keras_runs.make(CASE, without)
    first = CASE.gradients()[0]

    def replica() -> None:
        mine = first[int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))]
        kept = [g for k, g in enumerate(mine) if k not in without]
        optimizer.apply([None if g is None else tf.constant(g) for g in kept], xs)

    tf.function(lambda: strategy.run(replica), autograph=False)()


def test_replicas_that_lack_different_gradients() -> None:
    with pytest.raises(ValueError, match="the replicas have gradients for different variables"):
        step(mirrored(2))


def _refusal(without: Collection[int]) -> str:
    import tensorflow as tf

    from tests.keras.cluster_strategy import strategy

    try:
        step(strategy(), without)
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return "not refused"


def test_workers_that_lack_different_gradients(fresh_cluster: Callable[[int], Cluster]) -> None:
    """Their gradients differ in size, too, and no worker waits for what the other never sends."""
    (multi_worker,) = [end for end in FRONT_ENDS if end.name == "keras-multi-worker"]
    for error in fresh_cluster(2).run(_refusal, tuple(multi_worker.without), timeout=60):
        assert "the workers disagree and cannot vote: their models" in error
