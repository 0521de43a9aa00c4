"""The tally and the verdict of cuda.py in Triton, on packed words: no ballot is unpacked to be counted."""

import triton
import triton.language as tl

from .triton_loops import ABSTAIN

BLOCK = tl.constexpr(1024)
"""Words of 32 coordinates that one program counts."""


@triton.jit
def verdict(ballots, masks, out, workers, words, PLANES: tl.constexpr, ZERO: tl.constexpr):
    """Write the majority's ballot (steps 5 and 6).

    `ballots` is of shape (workers, 1 or 2, words), `masks` (workers, words) or None, and a count of all workers has
    PLANES bits. Twice the negatives are compared with the voters, bit by bit of bit-sliced counts.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    negatives, voters = _none(PLANES), _none(PLANES)
    for _ in range(workers):
        no = tl.load(ballots + at, inside, other=0)
        votes = tl.full((BLOCK,), 0xFFFFFFFF, tl.uint32)
        if ZERO == ABSTAIN:
            votes = tl.load(ballots + words + at, inside, other=0)
        if masks is not None:
            votes &= tl.load(masks + at, inside, other=0)
            masks += words
        negatives = _count(negatives, no & votes)
        voters = _count(voters, votes)
        ballots += words * (2 if ZERO == ABSTAIN else 1)
    more, tied = tl.zeros((BLOCK,), tl.uint32), voters[0] ^ ~voters[0]
    for k in tl.static_range(PLANES, -1, -1):
        left = negatives[k - 1] if k > 0 else tl.zeros((BLOCK,), tl.uint32)
        right = voters[k] if k < PLANES else tl.zeros((BLOCK,), tl.uint32)
        more |= tied & left & ~right
        tied &= ~(left ^ right)
    tl.store(out + at, more | tied if ZERO == 1 else more, inside)
    if ZERO == ABSTAIN:
        tl.store(out + words + at, ~tied, inside)


@triton.jit
def _none(PLANES: tl.constexpr):
    counts = ()
    for _ in tl.static_range(PLANES):
        counts += (tl.zeros((BLOCK,), tl.uint32),)
    return counts


@triton.jit
def _count(counts, carry):
    """Return the counts, whose bit k is in counts[k], each with one bit added."""
    added = ()
    for k in tl.static_range(len(counts)):
        added += (counts[k] ^ carry,)
        carry = counts[k] & carry
    return added
