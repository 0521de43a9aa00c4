"""The zero rule, and one worker's ballot: 8 coordinates to a byte, little-endian, bit 1 = negative (step 4)."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Zeros = Literal["alternate", "abstain", "positive"]
"""How one bit says zero: see `zero_bit`."""

Ballot = npt.NDArray[np.uint8]
"""Packed bits, shape (planes, ⌈length/8⌉): the sign plane, and under "abstain" the vote plane below it."""

TILE = 131_072
"""Coordinates worked on at a time: few enough that a tile and its temporaries stay in the core's own cache."""

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS = (1 - 2 * _BITS.astype(np.int8)).astype(np.float32)  # byte -> eight of ±1
_VOTES = _BITS.astype(np.float32)  # byte -> eight of 0 or 1


def check_zeros(zeros: object) -> Zeros:
    """Return `zeros` if it names a zero rule.

    Raises:
        ValueError: if it does not.
    """
    if zeros not in get_args(Zeros):
        raise ValueError(f"zeros must be one of {', '.join(map(repr, get_args(Zeros)))}, got {zeros!r}")
    return zeros  # type: ignore[return-value]


def zero_bit(zeros: Zeros, step: Any, worker: int = 0) -> Any:
    """Return the bit by which worker `worker` says "zero" at step `step`; with worker 0, the bit of a tied tally.

    ``(t + i) mod 2`` for "alternate" (abstaining workers cancel out and nothing drifts), 0 for "positive" (as the
    2019 authors' code did), and none for "abstain", where a vote plane says who voted at all.

    Example:
        >>> [zero_bit("alternate", step=7, worker=i) for i in range(4)]
        [1, 0, 1, 0]
    """
    if check_zeros(zeros) == "abstain":
        return None
    return (step + worker) % 2 if zeros == "alternate" else 0


def default_zeros(workers: int) -> Zeros:
    """Return the zero rule where none is chosen: one bit where a vote crosses a wire, exact zeros where none does.

    Example:
        >>> default_zeros(workers=1), default_zeros(workers=4)
        ('abstain', 'alternate')
    """
    return "abstain" if workers == 1 else "alternate"


def planes(zeros: Zeros) -> int:
    """Return the bits that a coordinate takes, each way: 2 where zeros abstain, else 1."""
    return 2 if check_zeros(zeros) == "abstain" else 1


def pack(
    values: npt.NDArray[Any],
    zeros: Zeros = "abstain",
    step: int = 0,
    worker: int = 0,
    out: Ballot | None = None,
) -> Ballot:
    """Pack the signs of `values` into a ballot; ±0 and NaN are zeros, ±Inf and subnormals have their sign.

    Args:
        values: real numbers, any shape, read in C order; NumPy's own dtypes or bfloat16.
        zeros: the zero rule.
        step: `t`.
        worker: `i`, the rank of the worker that votes.
        out: where to write, uint8 of shape (planes, ⌈values.size/8⌉).

    Returns:
        The ballot; the unused bits of its last byte are 0.

    Raises:
        ValueError: if `values` are not real numbers, `zeros` is no zero rule, or `out` has the wrong shape or dtype.

    Example:
        >>> pack(np.array([-2.0, 0.0, 3.0, -0.5]))
        array([[ 9],
               [13]], dtype=uint8)
    """
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise ValueError(f"values must be real numbers, got dtype {values.dtype}")
    flat, bit = values.reshape(-1), zero_bit(zeros, step, worker)
    shape = (planes(zeros), -(-flat.size // 8))
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 of shape {shape}, got {out.dtype} of shape {out.shape}")
    with np.errstate(invalid="ignore"):  # bfloat16 warns of NaN where NumPy's own dtypes do not
        for lo, hi in _tiles(flat.size):
            tile, cut = flat[lo:hi], slice(lo // 8, -(-hi // 8))
            if bit == 1:  # all that is not positive
                np.invert(_packbits(tile > 0), out=out[0, cut])
            else:
                out[0, cut] = _packbits(tile < 0)
            if zeros == "abstain":
                out[1, cut] = out[0, cut] | _packbits(tile > 0)
    if bit == 1 and flat.size % 8:
        out[0, -1] &= (1 << flat.size % 8) - 1
    return out


def unpack(ballot: Ballot, length: int, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """Return the first `length` coordinates of a ballot or verdict as −1, +1, and 0 where nobody voted.

    Args:
        ballot: uint8 of shape (planes, at least ⌈length/8⌉).
        length: how many coordinates.
        out: where to write, float32, contiguous, of shape (8·⌈length/8⌉,); the rest of its last byte is written too.

    Returns:
        float32 of shape (length,).

    Raises:
        ValueError: if the ballot is not uint8, too short for `length`, or has not one or two planes; if `out` is not as
            above.

    Example:
        >>> unpack(np.array([[9], [13]], np.uint8), 4)
        array([-1.,  0.,  1., -1.], dtype=float32)
    """
    width = -(-length // 8)
    if ballot.dtype != np.uint8:
        raise ValueError(f"a ballot is uint8, got {ballot.dtype}")
    if ballot.ndim != 2 or ballot.shape[0] not in (1, 2) or ballot.shape[1] < width:
        raise ValueError(f"a ballot of {length} coordinates has shape (1 or 2, {width}), got {ballot.shape}")
    if out is None:
        out = np.empty(8 * width, np.float32)
    elif out.shape != (8 * width,) or out.dtype != np.float32:
        raise ValueError(f"out must be float32 of shape {(8 * width,)}, got {out.dtype} of shape {out.shape}")
    rows = out.reshape(width, 8)
    np.take(_SIGNS, ballot[0, :width], axis=0, out=rows, mode="clip")
    if ballot.shape[0] == 2:
        for lo, hi in _tiles(width):
            rows[lo:hi] *= np.take(_VOTES, ballot[1, lo:hi], axis=0, mode="clip")
    return out[:length]


def _packbits(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.packbits(bits, bitorder="little")


def _tiles(length: int) -> Iterator[tuple[int, int]]:
    return ((lo, min(lo + TILE, length)) for lo in range(0, length, TILE))
