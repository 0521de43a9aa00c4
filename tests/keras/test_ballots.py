"""TensorFlow's pack and unpack are the core's, bit for bit."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

import signsgd_core as core
from signsgd_keras.vote.ballots import pack, unpack, unwords, words
from tests.devices import DEVICES

LENGTHS = (0, 1, 7, 8, 9, 1000)
RULES: tuple[core.Zeros, ...] = get_args(core.Zeros)


def values_of(length: int) -> npt.NDArray[np.float32]:
    """A third zeros of either sign, and the smallest and largest numbers there are."""
    limits = np.finfo(np.float32)
    odd = [0.0, -0.0, 1.0, -1.0, limits.tiny, -limits.tiny, limits.max, limits.min, 0.5]
    return np.random.default_rng(length).choice(np.array(odd, np.float32), length)


def bits_of(zeros: core.Zeros) -> list[Any]:
    """A number known when a graph is made, and a tensor that is known when it runs."""
    bits = {core.zero_bit(zeros, step) for step in (0, 1)}
    return [*bits, *(tf.constant(bit, tf.uint8) for bit in bits if bit is not None)]


def in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function traced; tensors among its arguments are then not known, and numbers are."""
    return tf.function(function)  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrap", [lambda function: function, in_graph], ids=["eager", "graph"])
@pytest.mark.parametrize("zeros", RULES)
def test_every_length(zeros: core.Zeros, wrap: Callable[..., Any]) -> None:
    packs, unpacks = wrap(pack), wrap(unpack)
    for length in LENGTHS:
        values = values_of(length)
        for bit in bits_of(zeros):
            step = 0 if bit is None else int(bit)
            expected = core.pack(values, zeros, step)
            ballot = packs(tf.constant(values), bit)
            np.testing.assert_array_equal(ballot.numpy(), expected, strict=True)
            signs = unpacks(ballot, length).numpy()
            np.testing.assert_array_equal(signs, core.unpack(expected, length), strict=True)


def test_shapes_do_not_matter() -> None:
    values = values_of(24)
    for shape in ((24,), (2, 3, 4), (24, 1)):
        np.testing.assert_array_equal(pack(tf.reshape(values, shape), None), core.pack(values))
    np.testing.assert_array_equal(pack(tf.constant(-2.0), 0), core.pack(np.array(-2.0), "alternate"))


def test_unpack_every_byte_under_every_vote() -> None:
    sign, vote = np.divmod(np.arange(65_536), 256)
    ballot = np.stack([sign, vote]).astype(np.uint8)
    for planes in (ballot, ballot[:1]):
        signs = unpack(tf.constant(planes), 8 * 65_536).numpy()
        np.testing.assert_array_equal(signs, core.unpack(planes, 8 * 65_536), strict=True)


def test_unpack_from_a_longer_ballot() -> None:
    ballot = np.concatenate([core.pack(values_of(20)), np.full((2, 3), 255, np.uint8)], axis=1)
    np.testing.assert_array_equal(unpack(tf.constant(ballot), 20).numpy(), np.sign(values_of(20)), strict=True)


def test_unused_bits_are_zero() -> None:
    for length in range(1, 9):
        for bit in (None, 0, 1, tf.constant(1, tf.uint8)):
            for value in (0.0, -1.0):
                assert (pack(tf.fill([length], value), bit).numpy() >> length == 0).all()


def test_a_graph_holds_them_once() -> None:
    """Of many variables each would else add its operations, which takes Python long."""

    def three(*vectors: tf.Tensor) -> list[tf.Tensor]:
        return [unpack(pack(c, tf.constant(1, tf.uint8)), c.shape[0]) for c in vectors]

    traced = tf.function(three).get_concrete_function(*(tf.TensorSpec([size]) for size in (8, 20, 1000)))
    called = [op.get_attr("f").name for op in traced.graph.get_operations() if op.type == "PartitionedCall"]
    assert len(called) == 6
    assert len(set(called)) == 2
    assert [tuple(output.shape) for output in traced.outputs] == [(8,), (20,), (1000,)]


def test_inside_xla() -> None:
    """Where a step is compiled as a whole."""
    values = values_of(1000)
    for zeros in ("alternate", "abstain"):
        bit = core.zero_bit(zeros, 1)
        there_and_back = tf.function(lambda c, bit=bit: unpack(pack(c, bit), 1000), jit_compile=True)
        expected = core.unpack(core.pack(values, zeros, 1), 1000)
        np.testing.assert_array_equal(there_and_back(tf.constant(values)).numpy(), expected, strict=True)


@pytest.mark.parametrize("wrap", [lambda function: function, in_graph], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64, tf.uint16], ids=lambda dtype: dtype.name)
def test_words_are_the_bytes_in_their_order(dtype: Any, wrap: Callable[..., Any]) -> None:
    for shape in ((1, 16), (2, 24), (3, 2, 8), (1, 0)):
        ballot = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        there = wrap(lambda ballot: words(ballot, dtype))(tf.constant(ballot))
        np.testing.assert_array_equal(there.numpy(), ballot.view(dtype.as_numpy_dtype), strict=True)
        np.testing.assert_array_equal(wrap(unwords)(there).numpy(), ballot, strict=True)


def test_a_vote_on_the_packed_words_is_the_vote_on_the_bytes() -> None:
    """Ballots of several workers, counted as int32 words and as core counts bytes."""
    for zeros in RULES:
        ballots = [core.pack(values_of(1024 + 8 * k)[:1024], zeros, 1, k) for k in range(4)]
        expected = np.stack(core.verdict([list(ballot) for ballot in ballots], zeros, 1))
        packed = [tf.unstack(words(tf.constant(ballot), tf.int32)) for ballot in ballots]
        verdict = unwords(tf.stack(core.verdict(packed, zeros, tf.constant(1, tf.int32))))
        np.testing.assert_array_equal(verdict.numpy(), expected, strict=True)


def test_this_process_has_the_devices_of_the_other_tests() -> None:
    assert len(tf.config.list_logical_devices("CPU")) == DEVICES
