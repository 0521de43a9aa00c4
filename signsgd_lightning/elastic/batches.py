"""Who draws which batch, where nobody knows how many will draw: by seed, batches voted on, and number in the quorum."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Position(Protocol):
    """Where a worker stands among all batches, as `ElasticVote` says it."""

    @property
    def batches(self) -> int:
        """How many batches were voted on so far, of all workers and steps."""

    @property
    def number(self) -> int:
        """This worker's number in the quorum."""


class ElasticBatches:
    r"""Draws batches of map-style data, so that workers that come and go share them out.

    Every epoch has an order of its own, by seed and epoch, which is cut into batches. The next one of this worker is

    .. math::
        k = \mathrm{batches\\ voted\ on\ so\ far} + \mathrm{number\ in\ the\ quorum}

    counted through all epochs. So no batch is voted on twice in an epoch, and none is left out, whoever comes and goes:
    a batch whose step failed is drawn again by the quorum that is left. What does not fill a batch is left out of the
    epoch.

    Draw in the closure of `Signum.step`, or between `ElasticVote.begin` and the step. As the `batch_sampler` of a
    `DataLoader` it needs ``num_workers=0``, since others draw ahead.

    Args:
        length: how many examples there are.
        batch_size: of one worker.
        position: where this worker stands; what `enable_elastic_vote` returned.
        seed: the same on all workers.

    Raises:
        ValueError: if the examples do not fill a batch.

    Example:
        >>> from types import SimpleNamespace
        >>> first, second = (ElasticBatches(6, 2, SimpleNamespace(batches=0, number=k)) for k in range(2))
        >>> len({*next(first), *next(second)})
        4
    """

    def __init__(self, length: int, batch_size: int, position: Position, seed: int = 0) -> None:
        if not 0 < batch_size <= length:
            raise ValueError(f"batch_size must be 1 or more and at most the {length} examples, got {batch_size}")
        self._length, self._size, self._position, self._seed = length, batch_size, position, seed
        self._epoch, self._order = -1, np.arange(0)

    def __iter__(self) -> Iterator[list[int]]:
        """Return itself: there is always another batch."""
        return self

    def __next__(self) -> list[int]:
        """Return the examples of the next batch."""
        k = self._position.batches + self._position.number
        epoch, place = divmod(k, self._length // self._size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._length)
        indices: list[int] = self._order[place * self._size :][: self._size].tolist()
        return indices
