"""The loops of cuda.py in Triton, each once over memory, without a fused multiply-add: bit for bit what native.c's do.

A program takes BLOCK coordinates of one tensor, counted from the tensor's own first, so that its memory is read in
vectors wherever in the ballot they lie. Two tables tell it which: `programs`, int32 rows of a tile's number and a
block of it; and `tiles`, int64 rows of COLUMNS numbers: the addresses of g, m, x and u, 0 for none; the bit of the
tensor's first coordinate, negative where an earlier bucket of the vote has it; and from which coordinate to which.
"""

import triton
import triton.language as tl

WORD = tl.constexpr(32)
WORDS = tl.constexpr(32)
BLOCK = tl.constexpr(1024)
COLUMNS = tl.constexpr(7)
ABSTAIN = tl.constexpr(2)
"""In place of the bit that a zero has."""

_LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def cast(
    tiles, programs, signs, votes, scale, beta1, rest1, beta2, rest2,
    G: tl.constexpr, M: tl.constexpr, SAME: tl.constexpr, BY_GRADIENT: tl.constexpr, DOWN: tl.constexpr,
    ZERO: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Take gradients into momenta and write the ballot (steps 1-4), into zeros; `scale` is on the device, or None."""
    row, start, a, b = _place(tiles, programs)
    factor = _factor(scale, DOWN)
    bit = tl.load(row + 4) + start
    if b - a == BLOCK:
        c = _directions(row, start, factor, beta1, rest1, beta2, rest2, None, G, M, SAME, BY_GRADIENT, ALIGNED)
        _write(signs, votes, bit, c, None, ZERO)
    else:
        inside = (_lanes() >= a) & (_lanes() < b)
        c = _directions(row, start, factor, beta1, rest1, beta2, rest2, inside, G, M, SAME, BY_GRADIENT, ALIGNED)
        _write(signs, votes, bit, c, inside, ZERO)


@triton.jit
def apply(
    tiles, programs, signs, votes, words, lr, decay, gamma, rest, u_scale,
    X: tl.constexpr, AVERAGED: tl.constexpr, DECAYED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move parameters by the verdict (steps 7 and 8); its planes have `words` words, `votes` is None with one plane."""
    row, start, a, b = _place(tiles, programs)
    v = _read(signs, votes, words, tl.load(row + 4) + start)
    if b - a == BLOCK:
        _move(row, start, v, lr, decay, gamma, rest, u_scale, None, X, AVERAGED, DECAYED, ALIGNED)
    else:
        inside = (_lanes() >= a) & (_lanes() < b)
        _move(row, start, v, lr, decay, gamma, rest, u_scale, inside, X, AVERAGED, DECAYED, ALIGNED)


@triton.jit
def alone(
    tiles, programs, scale, beta1, rest1, beta2, rest2, lr, decay, gamma, rest, u_scale,
    G: tl.constexpr, M: tl.constexpr, SAME: tl.constexpr, BY_GRADIENT: tl.constexpr, DOWN: tl.constexpr,
    ZERO: tl.constexpr, X: tl.constexpr, AVERAGED: tl.constexpr, DECAYED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Take all steps of a worker whose verdict is its own ballot."""
    row, start, a, b = _place(tiles, programs)
    factor = _factor(scale, DOWN)
    zero = 0.0 if ZERO == ABSTAIN else 1.0 - 2.0 * ZERO
    if b - a == BLOCK:
        c = _directions(row, start, factor, beta1, rest1, beta2, rest2, None, G, M, SAME, BY_GRADIENT, ALIGNED)
        v = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, zero))
        _move(row, start, v, lr, decay, gamma, rest, u_scale, None, X, AVERAGED, DECAYED, ALIGNED)
    else:
        inside = (_lanes() >= a) & (_lanes() < b)
        c = _directions(row, start, factor, beta1, rest1, beta2, rest2, inside, G, M, SAME, BY_GRADIENT, ALIGNED)
        v = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, zero))
        _move(row, start, v, lr, decay, gamma, rest, u_scale, inside, X, AVERAGED, DECAYED, ALIGNED)


@triton.jit
def _lanes():
    return tl.arange(0, WORDS)[:, None] * WORD + tl.arange(0, WORD)[None, :]


@triton.jit
def _place(tiles, programs):
    """Return this program's tile, the first coordinate of its block, and which lanes of the block are in the tile."""
    mine = programs + 2 * tl.program_id(0).to(tl.int64)
    row = tiles + COLUMNS * tl.load(mine)
    start = tl.load(mine + 1).to(tl.int64) * BLOCK
    a = tl.maximum(tl.load(row + 5) - start, 0).to(tl.int32)
    b = tl.minimum(tl.load(row + 6) - start, BLOCK).to(tl.int32)
    return row, start, a, b


@triton.jit
def _factor(scale, DOWN: tl.constexpr):
    """Return the factor on the gradient: a gradient scaler's, negative to go up."""
    factor = 1.0 if scale is None else tl.load(scale)
    return factor if DOWN else -factor


@triton.jit
def _address(row, column: tl.constexpr, start, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the addresses of a block of one of a tile's tensors; bfloat16's are of uint16."""
    first = tl.load(row + column).to(tl.pointer_type(tl.uint16 if tl.bfloat16 == T else T))
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + start + _lanes()


@triton.jit
def _load(address, inside, T: tl.constexpr):
    """Return numbers as float32; bfloat16 is the upper half of one."""
    values = tl.load(address) if inside is None else tl.load(address, inside, other=0)
    if tl.bfloat16 == T:
        return (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _store(address, values, inside, T: tl.constexpr):
    """Store float32 numbers rounded to the nearest, of two the even one, by bits for bfloat16: the same everywhere."""
    if tl.bfloat16 == T:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        tl.store(address, tl.where(values != values, 0x7FC0, rounded).to(tl.uint16), inside)
    else:
        tl.store(address, values.to(T), inside)


@triton.jit
def _directions(
    row, start, factor, beta1, rest1, beta2, rest2, inside,
    G: tl.constexpr, M: tl.constexpr, SAME: tl.constexpr, BY_GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Take c = β1·m + (1−β1)·g,  m ← β2·m + (1−β2)·g  (steps 1-3); what is not finite is 0."""
    value = _load(_address(row, 0, start, G, ALIGNED), inside, G) * factor
    g = tl.where(tl.abs(value) <= _LARGEST, value, 0.0)
    c = g
    if M is not None:  # an early return would have Triton compile what follows all the same
        address = _address(row, 1, start, M, ALIGNED)
        m = _load(address, inside, M)
        new = beta2 * m + rest2 * g
        _store(address, new, inside, M)
        if not BY_GRADIENT:
            c = new if SAME else beta1 * m + rest1 * g
    return c


@triton.jit
def _move(
    row, start, v, lr, decay, gamma, rest, u_scale, inside,
    X: tl.constexpr, AVERAGED: tl.constexpr, DECAYED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Take u ← γ·u + (1−γ)·V,  x ← x − lr·(s·u + λ·x)  (steps 7 and 8), s the `u_scale`."""
    u = v
    if AVERAGED:
        average = _address(row, 3, start, tl.float32, ALIGNED)
        u = gamma * _load(average, inside, tl.float32) + rest * v
        _store(average, u, inside, tl.float32)
    u = u_scale * u
    address = _address(row, 2, start, X, ALIGNED)
    x = _load(address, inside, X)
    if DECAYED:
        u = u + decay * x
    _store(address, x - lr * u, inside, X)


@triton.jit
def _write(signs, votes, bit, c, inside, ZERO: tl.constexpr):
    """Write the ballot of directions whose first has bit `bit`; lanes outside write nothing."""
    no = c < 0.0 if ZERO != 1 else ~(c > 0.0)
    _put(signs, bit, no if inside is None else no & inside, inside)
    if ZERO == ABSTAIN:
        some = (c < 0.0) | (c > 0.0)
        _put(votes, bit, some if inside is None else some & inside, inside)


@triton.jit
def _put(plane, bit, bits, inside):
    """Or bits into zeros: a word that lies across blocks or tensors has several programs that do."""
    word = tl.sum(bits.to(tl.uint32) << tl.arange(0, WORD)[None, :].to(tl.uint32), axis=1)
    shift = (bit & 31).to(tl.uint32)
    to = plane + (bit >> 5) + tl.arange(0, WORDS)
    if (shift == 0) & (inside is None):
        tl.store(to, word)
    else:
        low, high = word << shift, (word >> 1) >> (31 - shift)
        tl.atomic_or(to, low, low != 0, sem="relaxed")
        tl.atomic_or(to + 1, high, high != 0, sem="relaxed")


@triton.jit
def _read(signs, votes, words, bit):
    """Return V of a block whose first coordinate has bit `bit`: 1 with the sign bit, or 0 where nobody voted."""
    v = tl.where(_get(signs, words, bit) != 0, -1.0, 1.0)
    return v if votes is None else tl.where(_get(votes, words, bit) != 0, v, 0.0)


@triton.jit
def _get(plane, words, bit):
    shift = (bit & 31).to(tl.uint32)
    at = (bit >> 5) + tl.arange(0, WORDS)
    low = tl.load(plane + at, (at >= 0) & (at < words), other=0)
    high = tl.load(plane + at + 1, (at >= -1) & (at + 1 < words), other=0)
    word = (low >> shift) | ((high << 1) << (31 - shift))
    return (word[:, None] >> tl.arange(0, WORD)[None, :].to(tl.uint32)) & 1
