"""Which rank was lost: a name for the one that stopped answering, from what the others saw."""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import _compat

_GRACE = timedelta(seconds=2)
"""How long a suspect gets to say that it is alive and only saw another fail."""

_STORE_HOST = 0
"""The rank on whose machine the store is."""

_GLOO = ("/gloo/", "Application timeout caused pair closure")
"""What its plain RuntimeErrors are known by."""

_PROBE = 9041
"""A tag that nobody receives."""

_Words = dict[int, tuple[int | None, str]]
"""Rank -> the rank it blames, None for none; what it waited for."""


class PeerLostError(RuntimeError):
    """A rank died, hung or was cut off while the others waited for it, or does something else than they do.

    Attributes:
        rank: its global rank, or None where the backend does not tell.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def lost(group: dist.ProcessGroup, suspect: int | None, doing: str, error: BaseException) -> PeerLostError:
    """Return the error for a connection that failed, with the name of the rank that was lost first.

    Args:
        group: of all ranks that may have failed.
        suspect: the rank with which the connection failed, None if that is not known.
        doing: what the ranks did.
        error: what the backend raised.
    """
    rank, alive = first_lost(group, suspect, doing)
    everywhere = None if rank is None else dist.get_global_rank(group, rank)
    who = "a rank" if everywhere is None else f"rank {everywhere}"
    why = "it died, hung for longer than the process group's timeout, or was cut off. Look into its log, then"
    if alive:
        why = f"all ranks are alive ({alive}): they do different things, or the network between them is cut. Then"
    return PeerLostError(
        f"{who} stopped answering while the ranks {doing}: {why} restart all ranks from the last checkpoint. "
        f"({_first_line(error)})",
        everywhere,
    )


def explain(error: BaseException, group: dist.ProcessGroup) -> str | None:
    """Return in words which rank was lost, where torch's own collectives failed and named none.

    Args:
        error: any exception; None is returned where it tells of no lost connection, or has a rank already.
        group: the process group. Every rank that is still there must ask, or have met the loss in a vote.
    """
    connection = isinstance(error, dist.DistError) or any(words in _first_line(error) for words in _GLOO)
    if isinstance(error, PeerLostError) or not connection:
        return None
    return str(lost(group, None, "worked together", error))


def first_lost(group: dist.ProcessGroup, suspect: int | None, doing: str = "") -> tuple[int | None, str]:
    """Return the rank that failed first, None where nobody can tell.

    A rank that fails closes its connections, or no longer sends, and the others notice that before they notice the one
    it blames. So each leaves word in the store, and one that left word was alive: such a suspect is replaced by the one
    it blames. A store that is silent went with its host.

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
    rank = dist.get_rank(group)
    words = _exchange_words(group, (suspect, doing))
    silent = [other for other in range(dist.get_world_size(group)) if other not in words]
    followed: list[int | None] = []
    while suspect in words and suspect != rank and suspect not in followed:
        followed.append(suspect)
        suspect = words[suspect][0]
    if silent and suspect not in silent:
        blames = [blamed for blamed, _ in words.values()]
        blamed = [other for other in silent if other in blames]
        return (blamed or [other for other in silent if not _reachable(group, other)] or silent)[0], ""
    if suspect == rank:
        suspect = next(iter(followed), None)
    waits = {rank: waited for rank, (_, waited) in sorted(words.items())}
    if silent or len(set(waits.values())) == 1:
        return suspect, ""
    return suspect, "; ".join(f"rank {rank} waited while it {waited}" for rank, waited in waits.items())


def _exchange_words(group: dist.ProcessGroup, own: tuple[int | None, str]) -> _Words:
    """Leave word in the store; return the words of all ranks that left theirs within the grace, this one included."""
    rank, others = dist.get_rank(group), range(dist.get_world_size(group))
    store = _compat.prefix_store(f"signsgd/{group.group_name}")
    store.set(f"blamed by {rank}", f"{own[0]} {own[1]}")
    keys = {other: f"blamed by {other}" for other in others}
    deadline = time.monotonic() + _GRACE.total_seconds()
    while time.monotonic() < deadline and not store.check(list(keys.values())):  # the lost one leaves no word
        time.sleep(0.01)
    words: _Words = {}
    for other, key in keys.items():
        if store.check([key]):
            blamed, _, waited = store.get(key).decode().partition(" ")
            words[other] = None if blamed == "None" else int(blamed), waited
    return words


def _reachable(group: dist.ProcessGroup, rank: int) -> bool:
    """Tell whether the connection still stands, as far as Gloo knows; after a timeout it has closed them all."""
    if _compat.backend(group, "cpu") != "gloo":
        return False
    try:
        dist.isend(torch.zeros(1, dtype=torch.uint8, device="cpu"), group=group, group_dst=rank, tag=_PROBE)
    except RuntimeError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error) or " ").splitlines()[0]
