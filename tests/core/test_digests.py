"""Digests tell every bit, and the rule of the largest party names who differs."""

import ml_dtypes
import numpy as np
import pytest

from signsgd_core.wire import DIGEST_BYTES, digest, first_difference

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def _flipped(bit: int) -> np.ndarray:
    bits = X.copy()
    bits.view(np.uint32).flat[5] ^= np.uint32(1 << bit)
    return bits


def test_every_bit_counts() -> None:
    found = {digest([X, X]), digest([X]), *(digest([_flipped(bit)]) for bit in range(32))}
    assert len(found) == 34
    assert {len(one) for one in found} == {DIGEST_BYTES}


def test_memory_layout_does_not_count() -> None:
    assert digest([np.asfortranarray(X)]) == digest([X])
    assert digest([np.zeros((2, 0))]) == digest([])
    assert digest([np.ones(1, np.float32)]) == digest([np.ones((), np.float32)])
    assert digest([X.astype(ml_dtypes.bfloat16)]) != digest([X])


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        (["aa", "aa", "aa"], None),
        (["ab", "aa", "aa"], (1, [0])),
        (["aa", "ba", "ac"], (0, [1])),  # the first tensor counts, whoever differs in the second
        (["a", "b"], (0, [0, 1])),
        (["a", "b", "c"], (0, [0, 1, 2])),
        (["a", "b", "a", "b"], (0, [0, 1, 2, 3])),
        (["a", "b", "c", "a"], (0, [1, 2])),
        (["a"], None),
    ],
)
def test_who_differs(tensors: list[str], found: tuple[int, list[int]] | None) -> None:
    rows = np.array([[np.frombuffer(digest([np.array(ord(x))]), np.uint8) for x in worker] for worker in tensors])
    assert first_difference(rows) == found
