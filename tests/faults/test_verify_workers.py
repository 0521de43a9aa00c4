"""`VerifyReplicas` between real worker processes: the flipped bit is found on all of them."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.clusters import Cluster
from tests.keras import cluster_strategy

from .conftest import Fault
from .flips import STEPS, FlipBit, Found, train


def _work(every: int, *flips: Any) -> Found:
    return train(cluster_strategy.strategy(), every, *flips)


def _flip(every: int, replica: int, step: int, momentum: bool) -> Found:
    return _work(every, FlipBit(replica, step, momentum))


def test_nothing_is_found_where_all_is_well(cluster: Callable[[int], Cluster]) -> None:
    assert cluster(3).run(_work, 1) == [("", STEPS)] * 3


@pytest.mark.parametrize(("replica", "momentum"), [(1, False), (2, True)])
def test_workers(replica: int, momentum: bool, cluster: Callable[[int], Cluster], fault: Fault) -> None:
    with fault("a bit flips in a variable or a verdict momentum of a Keras worker, and is found"):
        for message, found in cluster(3).run(_flip, 2, replica, 2, momentum):
            assert found == ([replica], 3, "net/two/kernel")
            assert f"after step 3 replica {replica} differs" in message
