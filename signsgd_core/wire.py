"""What both front ends must have in common on the wire: version, sizes, and how ranks find out where they differ."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

WIRE_VERSION = 2
"""Of the messages; ranks of different versions refuse to vote."""

HEADER_BYTES = 32
"""What each rank sends each other ahead of whatever they do together."""

WORD_BITS = 64
"""A shard is whole words of so many coordinates."""

BUCKET_SIZE = 1 << 22
"""Coordinates whose ballots travel together: while they do, the next bucket is cast."""

DIGEST_BYTES = 16
"""What stands for a tensor, or a text, where ranks compare them."""

Digests = npt.NDArray[np.uint8]


def shard_bytes(length: int, workers: int) -> int:
    """Return the bytes of one plane of a shard, one of `workers` equal ones of `length` coordinates.

    ``8·⌈length / (64·M)⌉``: whole words, so that a shard is counted word by word.

    Example:
        >>> shard_bytes(1_000, workers=4)
        32
    """
    return WORD_BITS // 8 * -(-length // (WORD_BITS * workers))


def disagreement(everyone: Sequence[Sequence[str]], worker: str) -> str:
    """Return in words where workers first differ that should all say the same, line by line.

    Args:
        everyone: each worker's lines; not all the same.
        worker: what a worker is called: "rank" or "worker".

    Example:
        >>> disagreement([["a=1", "b=2"], ["a=1", "b=3"]], "rank")
        'rank 0 has «b=2» where rank 1 has «b=3»'
    """
    other = next(k for k, theirs in enumerate(everyone) if list(theirs) != list(everyone[0]))
    pairs = zip_longest(everyone[0], everyone[other], fillvalue="nothing")
    first, second = next((a, b) for a, b in pairs if a != b)
    return f"{worker} 0 has «{first}» where {worker} {other} has «{second}»"


def digest(parts: Iterable[npt.NDArray[Any]]) -> bytes:
    """Return `DIGEST_BYTES` bytes that stand for those of some arrays: two that differ in a bit have not the same.

    Args:
        parts: of any shapes and dtypes.

    Example:
        >>> digest([np.zeros(2), np.ones(1)]) == digest([np.zeros(2), np.ones(1)])
        True
    """
    whole = hashlib.sha256()  # processors have instructions for it
    for part in parts:
        whole.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return whole.digest()[:DIGEST_BYTES]


def first_difference(digests: npt.NDArray[np.uint8]) -> tuple[int, list[int]] | None:
    """Return the first tensor that workers differ in, and who is not of the largest party there.

    Args:
        digests: of every worker's tensors, uint8 of shape (workers, tensors, DIGEST_BYTES).

    Returns:
        The number of the tensor and those of the workers: all of them where no party is larger than another, since
        none can be told to be wrong. None if there is no difference.

    Example:
        >>> rows = np.zeros((3, 2, DIGEST_BYTES), np.uint8)
        >>> rows[2, 1, 0] = 1
        >>> first_difference(rows)
        (1, [2])
    """
    differ = (digests != digests[0]).any(axis=(0, 2))
    if not differ.any():
        return None
    tensor = int(differ.argmax())
    rows = digests[:, tensor]
    alike = (rows[:, None] == rows[None]).all(axis=2).sum(axis=1)  # how many each agrees with, itself included
    workers = [worker for worker, count in enumerate(alike) if count < alike.max()]
    return tensor, workers or list(range(len(rows)))


def find_difference(
    own: Digests, compare: Callable[[Digests], Digests], collect: Callable[[Digests], Digests]
) -> tuple[int, list[int]] | None:
    """Return the first tensor that workers differ in and who differs, in two exchanges; None if all are the same.

    First each worker sends the digest of all its digests; only where these differ does it send each.

    Args:
        own: of the tensors of this process' workers, uint8 of shape (own workers, tensors, DIGEST_BYTES).
        compare: sends one digest a worker, shape (own workers, 1, DIGEST_BYTES), and returns everybody's.
        collect: the same for all of them.
    """
    whole = np.stack([np.frombuffer(digest([row]), np.uint8) for row in own])[:, None]
    return None if first_difference(compare(whole)) is None else first_difference(collect(own))
