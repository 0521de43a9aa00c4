"""What the list of front ends skips because it is refused, is refused."""

from collections.abc import Callable

import pytest

from tests.clusters import Cluster
from tests.devices import mirrored

from . import keras_runs
from .front_ends import FRONT_ENDS


def test_replicas_that_lack_different_gradients() -> None:
    with pytest.raises(ValueError, match="the replicas have gradients for different variables"):
        keras_runs.apart(mirrored(2))


def test_workers_that_lack_different_gradients(fresh_cluster: Callable[[int], Cluster]) -> None:
    """Their gradients differ in size, too, and no worker waits for what the other never sends."""
    (multi_worker,) = [end for end in FRONT_ENDS if end.name == "keras-multi-worker"]
    for error in fresh_cluster(2).run(keras_runs.refusal, tuple(multi_worker.without), timeout=60):
        assert "the workers disagree and cannot vote: their models" in error
