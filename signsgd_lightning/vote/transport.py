"""How bytes travel between ranks: rows swapped with all of them, point to point, so that a failure names its rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _compat
from .failures import PeerLostError, lost

_FIRST_TAG = 0x5160
"""Users take small numbers, and 0 where they name none."""


class Message(Enum):
    """What ranks send each other, in words for errors; a new kind goes to the end.

    Each has a tag of its own: ranks that do different things never receive the one for the other, whose size would
    end the process inside Gloo.
    """

    HEADER = "compared notes"
    PRESENT = "said which gradients they have"
    SIZE = "measured what they have to say"
    TEXT = "looked for what they disagree about"
    BALLOTS = "sent ballots"
    VERDICTS = "sent verdicts"
    MEAN = "averaged their gradients"
    NODE_VERDICTS = "gathered the verdicts in their node"
    NODE_STATE = "gathered the momenta of their node"
    HELD = "said which momenta they have"
    STATE = "gathered their momenta"
    DIGESTS = "looked for the first difference"
    FIGURES = "gathered the monitor's figures"
    PLACES = "looked for their nodes"
    NUMBER = "counted their models"
    MAGNITUDES = "sent the magnitudes of a round"
    BUFFERS = "averaged their buffers"
    INNER_SIZE = "measured their inner states"
    INNER_STATE = "gathered their inner states"
    ROLL = "called the roll of a round"

    @property
    def tag(self) -> int:
        """The number that keeps it apart on the wire, from other kinds and from a user's own messages."""
        return _FIRST_TAG + list(Message).index(self)


class PointToPoint:
    """Swaps bytes with every other rank of a process group, over its sends and receives.

    Args:
        group: the process group.
        whole: the group of which it is a part, if it is: where a lost rank is asked for, and by whose number it is
            named.

    Attributes:
        rank: this rank in the group.
        world_size: how many ranks it has.
        sent_bytes: payload sent so far.
        waited_seconds: time spent waiting so far.
    """

    def __init__(self, group: dist.ProcessGroup, whole: dist.ProcessGroup | None = None) -> None:
        self.group, self.whole = group, whole or group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes, self.waited_seconds = 0, 0.0

    def wire(self, device: torch.device) -> torch.device:
        """Return where the backend wants the bytes of tensors on `device`: Gloo sends from the host's memory alone."""
        return device if _compat.backend(self.group, device.type) not in (None, "gloo") else torch.device("cpu")

    def swap(self, outgoing: Tensor, incoming: Tensor, message: Message) -> Callable[[], None]:
        """Start to send row `j` of `outgoing` to rank `j` and to receive row `i` of `incoming` from rank `i`.

        Args:
            outgoing: shape (world_size, …), each row contiguous.
            incoming: the same shape and dtype.
            message: what the rows are.

        Returns:
            A function that waits until all rows are there, and raises `PeerLostError` if one never comes.
        """
        incoming[self.rank].copy_(outgoing[self.rank])
        others = [(self.rank + k) % self.world_size for k in range(1, self.world_size)]
        self.sent_bytes += sum(outgoing[j].nbytes for j in others)
        works: list[tuple[int | None, dist.Work]] = []
        if others and outgoing.numel():
            try:
                started = self._start(outgoing, incoming, others, message)
            except RuntimeError as error:
                raise self._lost(None, message, error) from error
            except ValueError as error:  # torch knows the group no longer
                raise RuntimeError(
                    f"the vote's process group was destroyed: enable the vote again ({error})"
                ) from error
            named = [*others, *others] if len(started) == 2 * len(others) else [None] * len(started)
            works = list(zip(named, started, strict=True))

        def wait() -> None:
            begin = time.perf_counter()
            for rank, work in works:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._lost(rank, message, error) from error
            self.waited_seconds += time.perf_counter() - begin

        return wait

    def _start(self, outgoing: Tensor, incoming: Tensor, others: list[int], message: Message) -> list[dist.Work]:
        group, tag = self.group, message.tag
        operations = [dist.P2POp(dist.irecv, incoming[j], None, group, tag, j) for j in others]
        operations += [dist.P2POp(dist.isend, outgoing[j], None, group, tag, j) for j in others]
        return dist.batch_isend_irecv(operations)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what is sent meanwhile, a monitor's own messages, out of `sent_bytes` and `waited_seconds`."""
        before = self.sent_bytes, self.waited_seconds
        yield
        self.sent_bytes, self.waited_seconds = before

    def gather(self, row: Tensor, message: Message) -> Tensor:
        """Return every rank's row, shape (world_size, *row.shape)."""
        rows = row.new_empty(self.world_size, *row.shape)
        self.swap(row.expand_as(rows), rows, message)()
        return rows

    def collect(self, row: Tensor, message: Message) -> Tensor | None:
        """Return every rank's row on rank 0, shape (world_size, *row.shape), and None on the others."""
        rows = row.new_empty(self.world_size, *row.shape) if self.rank == 0 else None
        works: list[tuple[int, dist.Work | None]] = []
        if rows is None:
            works.append((0, dist.isend(row.contiguous(), None, self.group, message.tag, 0)))
        else:
            rows[0].copy_(row)
            others = range(1, self.world_size)
            works += [(j, dist.irecv(rows[j], None, self.group, message.tag, j)) for j in others]
        for rank, work in works:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError as error:
                raise self._lost(rank, message, error) from error
        return rows

    def _lost(self, suspect: int | None, message: Message, error: Exception) -> PeerLostError:
        if suspect is not None:
            suspect = dist.get_group_rank(self.whole, dist.get_global_rank(self.group, suspect))
        return lost(self.whole, suspect, message.value, error)
