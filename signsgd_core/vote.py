"""Tally and verdict on packed words: no ballot is ever unpacked to be counted (steps 5 and 6).

All of it is ``& | ^ ~`` over integers, so the same functions run unmodified on NumPy, PyTorch, TensorFlow and JAX
words of any width, and the result is a pure function of the ballots, the zero rule and the step.
"""

from collections.abc import Sequence
from typing import Any

from .ballots import Zeros, planes, zero_bit

Words = Any
"""An array of integer words of any framework, or an int; every bit of it is one coordinate."""


def tally(words: Sequence[Words]) -> list[Words]:
    """Count, in every bit position, how many of the words have that bit set.

    Carry-save adders: three words of one weight become one of that weight and one carry of twice the weight, five
    operations each, until one word a weight is left.

    Args:
        words: at least one word array, all of one shape and integer dtype.

    Returns:
        The counts, bit-sliced: bit k of every count is in word k, least significant first.

    Raises:
        ValueError: if there is no word to count.

    Example:
        >>> tally([0b011, 0b001, 0b101])  # counts 1, 1, 3 read as columns of the words below
        [7, 1]
    """
    if not words:
        raise ValueError("a tally needs at least one ballot, got none")
    counts, column = [], list(words)
    while column:
        carries = []
        while len(column) > 2:
            a, b, c = column.pop(), column.pop(), column.pop()
            differ = a ^ b
            column.append(differ ^ c)
            carries.append((a & b) | (differ & c))
        if len(column) == 2:
            a, b = column
            column = [a ^ b]
            carries.append(a & b)
        counts.append(column[0])
        column = carries
    return counts


def majority(ballots: Sequence[Sequence[Words]], masks: Sequence[Words] | None = None) -> tuple[Words, Words]:
    """Return where more than half of the cast votes are negative, and where exactly half are.

    Args:
        ballots: one a worker, in any order: its sign plane (bit 1 = negative), and where workers may abstain its vote
            plane (bit 1 = votes here).
        masks: one word array a worker, bit 0 where that worker is left out whatever its ballot says.

    Returns:
        `(negative, tied)`, words of the same shape; where nobody votes the tally is tied at 0.

    Raises:
        ValueError: without any ballot, if they differ in planes, or if masks are not one a worker.

    Example:
        >>> negative, tied = majority([[0b11], [0b01]])
        >>> negative & 0b11, tied & 0b11
        (1, 2)
    """
    counts = {len(ballot) for ballot in ballots}
    if counts not in ({1}, {2}):
        raise ValueError(f"ballots must all have one plane or all two, got {[len(ballot) for ballot in ballots]}")
    if masks is not None and len(masks) != len(ballots):
        raise ValueError(f"masks must be one for each of {len(ballots)} workers, got {len(masks)}")
    signs = [ballot[0] for ballot in ballots]
    votes = [ballot[1] for ballot in ballots] if counts == {2} else masks
    if counts == {2} and masks is not None:
        votes = [ballot[1] & mask for ballot, mask in zip(ballots, masks, strict=True)]
    if votes is not None:
        signs = [sign & vote for sign, vote in zip(signs, votes, strict=True)]
    negatives = tally(signs)
    none = signs[0] ^ signs[0]
    voters = tally(votes) if votes is not None else _constant(len(ballots), none)
    return _compare([none, *negatives], voters, none)  # twice the negatives against the voters


def verdict(
    ballots: Sequence[Sequence[Words]], zeros: Zeros, step: int, masks: Sequence[Words] | None = None
) -> list[Words]:
    """Return the majority's ballot: bit 1 where V = −1, and under "abstain" the plane of coordinates where V ≠ 0.

    ``V = −1`` if more than half of the votes say negative, ``+1`` if fewer; exact halves by the zero rule.

    Args:
        ballots: as in `majority`, each of as many planes as the zero rule has.
        zeros: the zero rule.
        step: `t`; where it is known only when a graph runs, a scalar of the words' framework and dtype.
        masks: as in `majority`.

    Returns:
        As many planes as a ballot has.

    Raises:
        ValueError: as `majority`, or if the ballots have not the planes of the zero rule.

    Example:
        >>> verdict([[0b011], [0b001], [0b100]], "positive", step=0)
        [1]
    """
    if any(len(ballot) != planes(zeros) for ballot in ballots):
        raise ValueError(f"a ballot under zeros={zeros!r} has {planes(zeros)} planes, got {[len(b) for b in ballots]}")
    negative, tied = majority(ballots, masks)
    bit = zero_bit(zeros, step)
    if bit is None:
        return [negative, ~tied]
    if isinstance(bit, int):
        return [negative | tied] if bit else [negative]
    none = negative ^ negative
    return [negative | (tied & (none - bit))]  # 0 − 1 sets every bit


def _constant(number: int, none: Words) -> list[Words]:
    """Return the same number in every bit position, bit-sliced."""
    return [~none if number >> k & 1 else none for k in range(number.bit_length())]


def _compare(left: Sequence[Words], right: Sequence[Words], none: Words) -> tuple[Words, Words]:
    """Return where one bit-sliced number is greater than another, and where they are equal."""
    greater, equal = none, ~none
    for k in reversed(range(max(len(left), len(right)))):
        a = left[k] if k < len(left) else none
        b = right[k] if k < len(right) else none
        greater = greater | (equal & a & ~b)
        equal = equal & ~(a ^ b)
    return greater, equal
