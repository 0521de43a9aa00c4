from typing import Any, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, floating_dtypes

from signsgd_core import TILE, Zeros, check_zeros, pack, planes, unpack, zero_bit

RULES: tuple[Zeros, ...] = get_args(Zeros)
LENGTHS = [0, 1, 7, 8, 9, 997, TILE - 1, TILE, TILE + 1, 2 * TILE + 9]
FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


def naive(values: npt.NDArray[Any], zeros: Zeros, step: int = 0, worker: int = 0) -> npt.NDArray[np.uint8]:
    """Coordinate by coordinate: number n = 8k+j is bit j of byte k."""
    zero = {"alternate": (step + worker) % 2, "abstain": 0, "positive": 0}[zeros]
    width = (values.size + 7) // 8
    sign, vote = bytearray(width), bytearray(width)
    for n, value in enumerate(values.ravel().tolist()):
        k, j = divmod(n, 8)
        sign[k] |= (1 if value < 0 else 0 if value > 0 else zero) << j
        vote[k] |= (value < 0 or value > 0) << j
    rows = [sign, vote] if zeros == "abstain" else [sign]
    return np.array([list(row) for row in rows], np.uint8).reshape(len(rows), width)


def values_of(length: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(length).integers(-2, 3, length).astype(np.float32)


@pytest.mark.parametrize("zeros", RULES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, zeros: Zeros) -> None:
    values = values_of(length)
    for step in (0, 1):
        ballot = pack(values, zeros, step)
        np.testing.assert_array_equal(ballot, naive(values, zeros, step), strict=True)
        signs = unpack(ballot, length)
        zero = 0 if zeros == "abstain" else -1 if zeros == "alternate" and step else 1
        np.testing.assert_array_equal(signs, np.where(values == 0, np.float32(zero), np.sign(values)), strict=True)


def test_a_hundred_million_coordinates() -> None:
    """A pattern of 1000 does not divide the blocks, so each block begins elsewhere in it."""
    pattern, times = values_of(1000).astype(np.float16), 100_000
    ballot = pack(np.tile(pattern, times))
    assert ballot.shape == (2, 12_500_000)
    for row, expected in zip(ballot, naive(pattern, "abstain"), strict=True):
        assert (row.reshape(times, -1) == expected).all()
    assert (unpack(ballot, 1000 * times).reshape(times, -1) == np.sign(pattern)).all()


@pytest.mark.parametrize("zeros", RULES)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.__name__)
def test_odd_floats(dtype: type, zeros: Zeros) -> None:
    """Only a value truly below or above 0 has a sign: the sign bits of -0.0 and of a negative NaN say nothing."""
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    tiny, largest = limits.smallest_subnormal, limits.max
    odd = [0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, tiny, -tiny, largest, -largest, 1.0, -1.0]
    values: npt.NDArray[Any] = np.array(odd, dtype)
    zero = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], bool)
    negative = np.array([0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1], bool)
    assert np.signbit(values[1])
    assert np.signbit(values[3])
    for step, worker in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        bit = zeros == "alternate" and step != worker
        expected = [negative | zero if bit else negative] + [~zero] * (zeros == "abstain")
        packed = np.packbits(np.array(expected), axis=1, bitorder="little")
        np.testing.assert_array_equal(pack(values, zeros, step, worker), packed, strict=True)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_integers(dtype: type[np.integer[Any]]) -> None:
    limits = np.iinfo(dtype)
    values = np.array([0, limits.min, limits.max, 1, limits.min // 2], dtype)
    np.testing.assert_array_equal(pack(values), naive(values, "abstain"), strict=True)


@given(arrays(floating_dtypes(endianness="="), array_shapes(min_dims=0, max_dims=3, min_side=0)))
def test_round_trip(values: npt.NDArray[Any]) -> None:
    signs = np.where(np.isnan(values), 0, np.sign(values)).ravel()
    np.testing.assert_array_equal(unpack(pack(values, "abstain"), values.size), signs)


@given(st.integers(0, 1000), st.integers(0, 300))
def test_zeros_alternate_with_step_and_worker(step: int, worker: int) -> None:
    bit = (step + worker) % 2
    assert zero_bit("alternate", step, worker) == bit
    assert zero_bit("positive", step, worker) == 0
    assert zero_bit("abstain", step, worker) is None
    assert pack(np.zeros(8), "alternate", step, worker).tolist() == [[255 * bit]]
    assert pack(np.zeros(8), "positive", step, worker).tolist() == [[0]]
    assert pack(np.zeros(8), "abstain", step, worker).tolist() == [[0], [0]]


def test_planes() -> None:
    assert [planes(zeros) for zeros in RULES] == [1, 2, 1]


@pytest.mark.parametrize("zeros", RULES)
@pytest.mark.parametrize("length", range(1, 9))
def test_unused_bits_are_zero(length: int, zeros: Zeros) -> None:
    for values in (np.zeros(length), np.full(length, -1.0)):
        ballot = pack(values, zeros, step=1, out=np.full((planes(zeros), 1), 255, np.uint8))
        assert (ballot >> length == 0).all()


def test_memory_order() -> None:
    values = values_of(600).reshape(20, 30)
    for view in (values.T, values[::2, ::3], values[::-1], np.asfortranarray(values), values[:, None, :5]):
        np.testing.assert_array_equal(pack(view), naive(np.ascontiguousarray(view), "abstain"))


def test_values_are_left_as_they_were() -> None:
    values = np.array([np.nan, -0.0, -1.0])
    values.flags.writeable = False
    for zeros in RULES:
        assert pack(values, zeros).shape == (planes(zeros), 1)


def test_out() -> None:
    values = values_of(TILE + 9)
    for zeros in RULES:
        memory = np.full((planes(zeros), 2 * (TILE // 8 + 2)), 170, np.uint8)
        out = memory[:, ::2]
        assert pack(values, zeros, step=1, out=out) is out
        np.testing.assert_array_equal(out, naive(values, zeros, step=1))
        assert (memory[:, 1::2] == 170).all()


def test_unpack_every_byte() -> None:
    """Every sign byte under every vote byte: 0 where the vote bit is 0, whatever the sign bit says."""
    sign, vote = np.divmod(np.arange(65_536), 256)
    bits = np.arange(8)
    negative, voted = sign[:, None] >> bits & 1, vote[:, None] >> bits & 1
    ballot = np.stack([sign, vote]).astype(np.uint8)
    two, one = unpack(ballot, 8 * 65_536), unpack(ballot[:1], 8 * 65_536)
    np.testing.assert_array_equal(two, np.where(voted, np.where(negative, -1, 1), 0).ravel())
    np.testing.assert_array_equal(one, np.where(negative, -1, 1).ravel())


def test_unpack_into_out_and_from_a_longer_ballot() -> None:
    values = values_of(20)
    ballot = np.concatenate([pack(values), np.full((2, 3), 255, np.uint8)], axis=1)
    out = np.full(24, 9, np.float32)
    signs = unpack(ballot, 20, out)
    assert np.shares_memory(signs, out)
    np.testing.assert_array_equal(signs, np.sign(values), strict=True)


@pytest.mark.parametrize("values", [np.ones(3, complex), np.ones(3, bool), np.array(["a"]), np.array([None])])
def test_pack_refuses_what_is_not_real(values: npt.NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"^values must be real numbers, got dtype "):
        pack(values)


@pytest.mark.parametrize("zeros", ["Alternate", "", None, 0])
def test_no_zero_rule(zeros: Any) -> None:
    for function in (check_zeros, lambda rule: pack(np.ones(3), rule)):
        with pytest.raises(ValueError, match="zeros") as error:
            function(zeros)
        assert str(error.value) == f"zeros must be one of 'alternate', 'abstain', 'positive', got {zeros!r}"


@pytest.mark.parametrize("zeros", RULES)
def test_zero_rules_are_accepted(zeros: Zeros) -> None:
    assert check_zeros(zeros) == zeros


@pytest.mark.parametrize(
    "out", [np.empty((1, 2), np.uint8), np.empty((2, 1), np.uint8), np.empty(2, np.uint8), np.empty((2, 2), np.int8)]
)
def test_wrong_out(out: npt.NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"^out must be uint8 of shape \(2, 2\), got u?int8 of shape "):
        pack(np.ones(9), "abstain", out=out)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2,), (0, 2), (3, 2), (1, 1, 2)])
def test_wrong_ballot(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^a ballot of 9 coordinates has shape \(1 or 2, 2\), got \("):
        unpack(np.zeros(shape, np.uint8), 9)


def test_a_ballot_is_bytes() -> None:
    with pytest.raises(ValueError, match="^a ballot is uint8, got int8$"):
        unpack(np.array([[-1]], np.int8), 8)
