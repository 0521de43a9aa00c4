"""The vote of a round: ballots packed on the host, an all-to-all up, an all-gather down, and what is counted of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import signsgd_core as core
from signsgd_core.analysis.vote_figures import COUNTS
from signsgd_core.wire import shard_bytes

from .exchange import Exchange

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


class PackedVote:
    """Vote on displacements, 8 coordinates a byte.

    Args:
        exchange: between all workers.
        sizes: of all tensors, in coordinates.

    Attributes:
        rank: the number of this worker.
        counts: `COUNTS` of this worker until now.
    """

    def __init__(self, exchange: Exchange, sizes: Sequence[int]) -> None:
        self._exchange, self._sizes, self.rank = exchange, sizes, exchange.rank()
        self._zeros = core.default_zeros(exchange.workers)
        self._last: dict[int, Bits] = {}
        self.counts = np.zeros(len(COUNTS))

    def verdicts(self, deltas: Sequence[Array], votes: Flags, t: int) -> dict[int, Array]:
        """Return by its number the verdict on each tensor that anyone votes on, ±1, float32 of shape (size,).

        Args:
            deltas: this worker's displacements, finite; none if it votes on nothing.
            votes: who votes on what, shape (workers, tensors); the others abstain.
            t: the number of the round.
        """
        places = self._places(votes)
        if not places:
            return {}
        workers, last = self._exchange.workers, max(place.stop for place in places.values())
        masks = np.zeros((workers, workers * shard_bytes(8 * last, workers)), np.uint8)
        ballot = np.zeros((core.planes(self._zeros), masks.shape[1]), np.uint8)
        for k, place in places.items():
            masks[votes[:, k], place] = np.packbits(np.ones(self._sizes[k], np.uint8), bitorder="little")
            if votes[self.rank, k]:
                core.pack(deltas[k], self._zeros, t, self.rank, out=ballot[:, place])
        verdict = self._exchange_bits(ballot, masks, t)
        self._count(ballot, verdict, masks[self.rank], places)
        return {k: core.unpack(verdict[:, place], self._sizes[k]) for k, place in places.items()}

    def add(self, **counts: Any) -> None:
        """Add to `counts`, by name."""
        self.counts += [counts.get(name, 0) for name in COUNTS]

    def _places(self, votes: Flags) -> dict[int, slice]:
        """Return the bytes of each tensor that is voted on; each begins a byte."""
        places, first = {}, 0
        for k in np.flatnonzero(votes.any(axis=0)).tolist():
            places[k] = slice(first, first + -(-self._sizes[k] // 8))
            first = places[k].stop
        return places

    def _exchange_bits(self, ballot: Bits, masks: Bits, t: int) -> Bits:
        """Return the verdict on all coordinates, of the ballot's shape (steps 5 and 6)."""
        (planes, width), workers = ballot.shape, self._exchange.workers
        rows = np.ascontiguousarray(ballot.reshape(planes, workers, -1).swapaxes(0, 1)).reshape(workers, -1)
        owned = self._exchange.up(rows.view(np.int32)).view(np.uint64).reshape(workers, planes, -1)
        ours = np.split(masks, workers, axis=1)[self.rank]
        ballots, voters = [list(planes) for planes in owned], list(np.ascontiguousarray(ours).view(np.uint64))
        shard = np.stack(core.verdict(ballots, self._zeros, t, voters))
        anyone = np.bitwise_or.reduce(voters)
        self.add(tallied=_ones(anyone), ties=_ones(core.majority(ballots, voters)[1] & anyone))
        gathered = self._exchange.gather(shard.reshape(-1).view(np.int32)).view(np.uint8)
        return np.ascontiguousarray(gathered.reshape(workers, planes, -1).swapaxes(0, 1)).reshape(planes, width)

    def _count(self, ballot: Bits, verdict: Bits, mask: Bits, places: dict[int, slice]) -> None:
        """Count where the ballot is not the verdict, and where the verdict is not the one before."""
        self.add(coordinates=_ones(mask), disagreements=_ones(np.bitwise_or.reduce(ballot ^ verdict) & mask))
        for k, place in places.items():
            bits, size = verdict[:, place], self._sizes[k]
            if k in self._last:
                flips = np.count_nonzero(core.unpack(bits, size) != core.unpack(self._last[k], size))
                self.add(compared=size, flips=flips)
            self._last[k] = bits


def _ones(words: Array) -> int:
    """Return how many bits are set."""
    return int(np.bitwise_count(words).sum())
