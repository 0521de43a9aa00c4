"""Which old worker's private state a new worker goes on with, where their number changes."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any
"""An array of any framework that has arithmetic operators."""


def predecessors(worker: int, workers: int, old_workers: int) -> range:
    """Return from which old workers' momenta one of `workers` workers goes on, where there were another number.

    With more workers, new worker `i` of `M'` goes on from old worker ``i mod M``; with fewer from those it replaces,
    the old ones ``j`` with ``j mod M' = i``.

    Args:
        worker: i.
        workers: M', at least 1.
        old_workers: M, at least 1.

    Example:
        >>> list(predecessors(0, 2, 3)), list(predecessors(2, 3, 2))
        ([0, 2], [0])
    """
    if workers >= old_workers:
        return range(worker % old_workers, worker % old_workers + 1)
    return range(worker, old_workers, workers)


def inherited(momenta: Array, worker: int, workers: int) -> Array:
    """Return the momentum with which one of `workers` workers goes on: the mean of its `predecessors`'.

    Args:
        momenta: of the old workers, shape (M, …), of any framework.
        worker: i.
        workers: M', at least 1.

    Returns:
        Of the shape of one momentum.

    Example:
        >>> inherited(np.array([1.0, 3.0, 5.0]), worker=0, workers=2)
        np.float64(3.0)
    """
    old = predecessors(worker, workers, len(momenta))
    return momenta[old.start] if len(old) == 1 else momenta[old.start :: old.step].sum(0) / len(old)


def redistribute(momenta: npt.NDArray[Any], workers: int) -> npt.NDArray[Any]:
    """Return the momenta of all `workers` workers, each by `inherited`.

    Args:
        momenta: of the old workers, shape (M, …).
        workers: M', at least 1.

    Returns:
        Shape (M', …).

    Example:
        >>> redistribute(np.array([1.0, 3.0, 5.0]), 2), redistribute(np.array([1.0, 3.0]), 3)
        (array([3., 3.]), array([1., 3., 1.]))
    """
    return np.stack([inherited(momenta, worker, workers) for worker in range(workers)])
