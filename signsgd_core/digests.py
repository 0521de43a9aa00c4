"""Are all workers still the same, bit for bit? A few bytes that stand for a tensor, and who differs from the others."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16


def digest(parts: Iterable[npt.NDArray[Any]]) -> bytes:
    """Return `DIGEST_BYTES` bytes that stand for those of some arrays: two that differ in a bit have not the same.

    Args:
        parts: of any shapes and dtypes.

    Example:
        >>> digest([np.zeros(2), np.ones(1)]) == digest([np.zeros(2), np.ones(1)])
        True
    """
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        whole.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return whole.digest()


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
