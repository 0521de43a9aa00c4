"""The other ranks of a process group: rows swapped with all of them, and a name for the one that stops answering."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # torch has no public name for it

_GRACE = timedelta(seconds=2)
"""How long a suspect gets to say that it is alive and only saw somebody else fail."""

_STORE_HOST = 0
"""The rank on whose machine the store is."""

_GLOO = ("/gloo/", "Application timeout caused pair closure")
"""What its plain RuntimeErrors are known by."""

_PROBE = 9041
"""A tag that nobody receives."""


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
    NODE_MOMENTA = "gathered the momenta of their node"
    HELD = "said which momenta they have"
    MOMENTA = "gathered their momenta"
    DIGESTS = "looked for the first difference"
    FIGURES = "gathered the monitor's figures"
    PLACES = "looked for their nodes"

    @property
    def tag(self) -> int:
        """The number that keeps it apart on the wire."""
        return list(Message).index(self)


class PeerLostError(RuntimeError):
    """A rank died, hung or was cut off while the others waited for it, or does something else than they do.

    Attributes:
        rank: its rank in the process group, or None where the backend does not tell.
    """

    def __init__(self, rank: int | None, doing: str, reason: str, alive: str = "") -> None:
        who = "a rank" if rank is None else f"rank {rank}"
        why = "it died, hung for longer than the process group's timeout, or was cut off. Look into its log, then"
        if alive:
            why = f"all ranks are alive ({alive}): they do different things, or the network between them is cut. Then"
        super().__init__(
            f"{who} stopped answering while the ranks {doing}: {why} restart all ranks from the last checkpoint. "
            f"({reason})"
        )
        self.rank = rank


class Peers:
    """Swaps bytes with every other rank, point to point, so that a failure names its peer.

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
        return torch.device("cpu") if dist.get_backend(self.group) == "gloo" else device

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
        operations = [dist.P2POp(dist.irecv, incoming[j], None, self.group, message.tag, j) for j in others]
        operations += [dist.P2POp(dist.isend, outgoing[j], None, self.group, message.tag, j) for j in others]
        self.sent_bytes += sum(outgoing[j].nbytes for j in others)
        works: list[tuple[int | None, dist.Work]] = []
        if operations and outgoing.numel():
            try:
                started = dist.batch_isend_irecv(operations)
            except RuntimeError as error:
                raise self._lost(None, message, error) from error
            named = [*others, *others] if len(started) == len(operations) else [None] * len(started)
            works = list(zip(named, started, strict=True))

        def wait() -> None:
            begin = time.perf_counter()
            for peer, work in works:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._lost(peer, message, error) from error
            self.waited_seconds += time.perf_counter() - begin

        return wait

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
        for peer, work in works:
            try:
                if work is not None:
                    work.wait()
            except RuntimeError as error:
                raise self._lost(peer, message, error) from error
        return rows

    def _lost(self, suspect: int | None, message: Message, error: Exception) -> PeerLostError:
        if suspect is not None:
            suspect = dist.get_group_rank(self.whole, dist.get_global_rank(self.group, suspect))
        return _lost(self.whole, suspect, message.value, error)


def explain(error: BaseException, group: dist.ProcessGroup) -> str | None:
    """Return in words which rank was lost, where torch's own collectives failed and named none.

    Args:
        error: any exception; None is returned where it tells of no lost connection, or has a rank already.
        group: the process group. Every rank that is still there is expected to ask, or to have met the loss in a vote.
    """
    connection = isinstance(error, dist.DistError) or any(words in _first_line(error) for words in _GLOO)
    if isinstance(error, PeerLostError) or not connection:
        return None
    return str(_lost(group, None, "worked together", error))


def _lost(group: dist.ProcessGroup, suspect: int | None, doing: str, error: BaseException) -> PeerLostError:
    rank, alive = first_lost(group, suspect, doing)
    return PeerLostError(rank, doing, _first_line(error), alive)


def _first_line(error: BaseException) -> str:
    return (str(error) or " ").splitlines()[0]


def first_lost(group: dist.ProcessGroup, suspect: int | None, doing: str = "") -> tuple[int | None, str]:
    """Return the rank that failed first, None where nobody can tell.

    A rank that fails closes its connections, or no longer sends to the others, and they notice that before they notice
    the one it blames. So each leaves word in the store, and who left word was alive: a suspect that did is replaced by
    the one it blames. A store that is silent went with its host.

    Args:
        group: the process group.
        suspect: the rank with which a connection failed, None if that is not known.
        doing: what this rank waited for.

    Returns:
        The rank, and what each rank waited for where all left word and it is not the same.
    """
    found: list[tuple[int | None, str]] = []

    def inquire() -> None:
        with suppress(RuntimeError, ValueError):  # the store is lost
            found.append(_inquire(group, suspect, doing))

    inquiry = threading.Thread(target=inquire, daemon=True)
    inquiry.start()
    inquiry.join(1.5 * _GRACE.total_seconds())  # a store whose host is stopped never answers
    if found:
        return found[0]
    ranks = dist.get_process_group_ranks(group)
    return (ranks.index(_STORE_HOST) if _STORE_HOST in ranks else suspect), ""


def _inquire(group: dist.ProcessGroup, suspect: int | None, doing: str) -> tuple[int | None, str]:
    """Leave word, read that of the others, and follow the blame from rank to rank to one that left none."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    store = PrefixStore(f"signsgd/{group.group_name}", _get_default_store())
    store.set(f"blamed by {rank}", f"{suspect} {doing}")
    others = [other for other in range(size) if other != rank]
    with suppress(dist.DistStoreError):  # the lost one leaves no word
        store.wait([f"blamed by {other}" for other in others], _GRACE)
    left = [other for other in others if store.check([f"blamed by {other}"])]
    words = {other: store.get(f"blamed by {other}").decode().partition(" ") for other in left}
    blames = {other: None if said[0] == "None" else int(said[0]) for other, said in words.items()}
    silent = [other for other in others if other not in words]
    followed: list[int | None] = []
    while suspect in blames and suspect not in followed:
        followed.append(suspect)
        suspect = blames[suspect]
    if suspect in silent or not silent:
        waits = {rank: doing, **{other: said[2] for other, said in words.items()}}
        alive = "; ".join(f"rank {r} waited while it {waits[r]}" for r in sorted(waits)) if not silent else ""
        return (
            suspect if suspect != rank else next(iter(followed), None),
            alive if len(set(waits.values())) > 1 else "",
        )
    blamed = [other for other in silent if other in blames.values()]
    return (blamed or [other for other in silent if not _reachable(group, other)] or silent)[0], ""


def _reachable(group: dist.ProcessGroup, rank: int) -> bool:
    """Whether the connection still stands, as far as Gloo knows; after a timeout it has closed them all."""
    if dist.get_backend(group) != "gloo":
        return False
    try:
        dist.isend(torch.zeros(1, dtype=torch.uint8), group=group, group_dst=rank, tag=_PROBE)
    except RuntimeError:
        return False
    return True
