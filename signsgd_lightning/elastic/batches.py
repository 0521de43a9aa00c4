"""Who draws which batch, where nobody knows how many will draw: by seed, batches voted on, and number in the quorum."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from signsgd_core import check_count


class Position(Protocol):
    """Where a worker stands among all batches, as `ElasticVote` and `ElasticLocalSteps` say it."""

    def begin(self) -> Any:
        """Wait for the quorum, if it was not met yet."""

    @property
    def next_batch(self) -> int:
        """The number of the batch that this worker is to draw next, counted through all workers."""


class ElasticBatches:
    r"""Draws batches of map-style data, so that workers that come and go share them out.

    Every epoch has an order of its own, by seed and epoch, which is cut into batches. The next one of this worker is

    .. math::
        k = \mathrm{batches\\ voted\ on\ so\ far} + \mathrm{number\ in\ the\ quorum}

    counted through all epochs. So no batch is voted on twice in an epoch, and none is left out, whoever comes and goes:
    a batch whose step failed is drawn again by the quorum that is left. What does not fill a batch is left out of the
    epoch. Under local steps a worker has `sync_every` batches a round, one behind the other, and those of a worker that
    is lost before the vote are left out.

    A draw waits for the quorum. Draw in the closure of `Signum.step`, or before the gradients. As the `batch_sampler`
    of a `DataLoader` it needs ``num_workers=0``, since others draw ahead.

    Args:
        length: how many examples there are.
        batch_size: of one worker.
        position: where this worker stands; what `enable_elastic_vote` returned.
        seed: the same on all workers.
        per_step: how many batches a worker draws for a step, where gradients accumulate.

    Raises:
        ValueError: if the examples do not fill a batch.

    Example:
        >>> from types import SimpleNamespace
        >>> first, second = (ElasticBatches(6, 2, SimpleNamespace(next_batch=k, begin=int)) for k in range(2))
        >>> len({*next(first), *next(second)})
        4
    """

    def __init__(self, length: int, batch_size: int, position: Position, seed: int = 0, per_step: int = 1) -> None:
        if not 0 < batch_size <= length:
            raise ValueError(f"batch_size must be 1 or more and at most the {length} examples, got {batch_size}")
        self._length, self._size, self._position, self._seed = length, batch_size, position, seed
        check_count("per_step", per_step, 1)
        self._per_step, self._place, self._draws = per_step, -1, 0
        self._epoch, self._order = -1, np.arange(0)

    def __iter__(self) -> Iterator[list[int]]:
        """Return itself: there is always another batch."""
        return self

    def __len__(self) -> int:
        """Return how many batches an epoch of all workers has."""
        return self._length // self._size

    def __next__(self) -> list[int]:
        """Return the examples of the next batch."""
        self._position.begin()
        if self._position.next_batch != self._place or self._draws == self._per_step:  # another step, or the same again
            self._place, self._draws = self._position.next_batch, 0
        k, self._draws = self._place * self._per_step + self._draws, self._draws + 1
        epoch, place = divmod(k, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._length)
        indices: list[int] = self._order[place * self._size :][: self._size].tolist()
        return indices
