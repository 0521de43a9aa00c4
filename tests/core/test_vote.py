from itertools import permutations, product
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core import Zeros, majority, planes, tally, verdict
from tests.tiers import nightly_where

from .frameworks import FRAMEWORKS, KINDS, Kind

Signs = npt.NDArray[np.int64]  # (workers, coordinates) of -1, 0, +1
Masks = npt.NDArray[np.bool_]

RULES: tuple[Zeros, ...] = get_args(Zeros)
WORKERS = [*range(1, 18), 31, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257]
LENGTH = 320  # whole words of every width, and more than 257 workers can count to
BYTES = Kind("numpy", "uint8")


def takes_long(case: tuple[Kind, int]) -> bool:
    """Whether a vote of so many takes a second, where NumPy's is the same code and 257 workers have as many planes."""
    kind, workers = case
    return kind.framework in ("tensorflow", "jax") and 65 < workers < 257


def naive(signs: Signs, zeros: Zeros, step: int, masks: Masks | None = None) -> Signs:
    """Count plain numbers: -1 where over half of the cast votes are negative, +1 where under, a tie by the rule."""
    cast = np.where(masks, signs, 0) if masks is not None else signs
    negative, positive = (cast < 0).sum(axis=0), (cast > 0).sum(axis=0)
    tie = {"alternate": -1 if step % 2 else 1, "abstain": 0, "positive": 1}[zeros]
    return np.where(negative > positive, -1, np.where(negative < positive, 1, tie))


def close_votes(workers: int, abstain: bool) -> Signs:
    """Every count of negatives from 0 to M; where workers abstain, as many positives, one less or one more."""
    random = np.random.default_rng(workers)
    negative = np.arange(LENGTH) % (workers + 1)
    positive = workers - negative
    if abstain:
        positive = np.clip(negative + random.integers(-1, 2, LENGTH), 0, positive)
    worker = np.arange(workers)[:, None]
    signs = np.where(worker < negative, -1, np.where(worker < negative + positive, 1, 0))
    return random.permuted(signs, axis=0)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_framework_counts(kind: Kind, workers: int) -> None:
    signs = close_votes(workers, abstain=False)
    sliced = tally([kind.words(row < 0) for row in signs])
    counts = sum(kind.bits(word, LENGTH).astype(int) << k for k, word in enumerate(sliced))
    np.testing.assert_array_equal(counts, (signs < 0).sum(axis=0))


@pytest.mark.parametrize(("kind", "workers"), nightly_where(takes_long, product(KINDS, WORKERS)), ids=str)
def test_every_framework_votes(kind: Kind, workers: int) -> None:
    for zeros, step in product(RULES, (0, 1)):
        signs = close_votes(workers, abstain=zeros == "abstain")
        result = verdict(kind.ballots(signs, planes(zeros)), zeros, step)
        assert len(result) == planes(zeros)
        np.testing.assert_array_equal(kind.verdict(result, LENGTH), naive(signs, zeros, step))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_framework_masks(kind: Kind) -> None:
    masks = np.random.default_rng(0).random((6, LENGTH)) < 0.5
    for zeros in RULES:
        signs = close_votes(6, abstain=zeros == "abstain")
        result = verdict(kind.ballots(signs, planes(zeros)), zeros, 1, [kind.words(mask) for mask in masks])
        np.testing.assert_array_equal(kind.verdict(result, LENGTH), naive(signs, zeros, 1, masks))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.framework != "python"], ids=str)
def test_a_step_that_is_known_when_the_graph_runs(kind: Kind) -> None:
    """A scalar of the words' framework and dtype; compiled once for all steps where the framework compiles."""
    for zeros, workers in product(RULES, (4, 5)):
        signs = close_votes(workers, abstain=zeros == "abstain")
        ballots = kind.ballots(signs, planes(zeros))
        vote = COMPILE.get(kind.framework, lambda f: f)(lambda ballots, step, rule=zeros: verdict(ballots, rule, step))
        for step in (0, 1, 2, 7):
            known_late = FRAMEWORKS[kind.framework](np.array(step, kind.dtype))
            result = vote(ballots, known_late)
            assert len(result) == planes(zeros)
            np.testing.assert_array_equal(kind.verdict(result, LENGTH), naive(signs, zeros, step))


def _jit(function: Any) -> Any:
    import jax

    return jax.jit(function)


def _graph(function: Any) -> Any:
    import tensorflow as tf

    return tf.function(function)


COMPILE = {"jax": _jit, "tensorflow": _graph}


@given(st.integers(1, 257), st.integers(0, 2**32), st.integers(0, 9), st.sampled_from(RULES), st.booleans())
def test_any_vote(workers: int, seed: int, step: int, zeros: Zeros, masked: bool) -> None:
    random = np.random.default_rng(seed)
    signs = random.integers(-1, 2, (workers, 64)) if zeros == "abstain" else random.choice([-1, 1], (workers, 64))
    masks = random.random((workers, 64)) < 0.7 if masked else None
    words = None if masks is None else [BYTES.words(mask) for mask in masks]
    ballots = BYTES.ballots(signs, planes(zeros))
    np.testing.assert_array_equal(
        BYTES.verdict(verdict(ballots, zeros, step, words), 64), naive(signs, zeros, step, masks)
    )
    negative, tied = (BYTES.bits(word, 64) for word in majority(ballots, words))
    exact = naive(signs, "abstain", step, masks)
    np.testing.assert_array_equal(negative, exact < 0)
    np.testing.assert_array_equal(tied, exact == 0)


@pytest.mark.parametrize(
    ("zeros", "even_step", "odd_step"), [("alternate", 0, 0b1111), ("positive", 0, 0), ("abstain", 0, 0)]
)
def test_ties(zeros: Zeros, even_step: int, odd_step: int) -> None:
    """Two workers against two in all four coordinates."""
    vote = [0b1111] * (planes(zeros) - 1)
    ballots = [[sign, *vote] for sign in (0b1010, 0b0101, 0b1100, 0b0011)]
    for step, sign in [(0, even_step), (1, odd_step), (2, even_step), (3, odd_step)]:
        negative, *voted = verdict(ballots, zeros, step)
        assert negative & 0b1111 == sign
        assert [word & 0b1111 for word in voted] == [0] * (planes(zeros) - 1)


def test_the_sign_of_an_abstention_is_not_read() -> None:
    """In each coordinate one of three workers votes; the sign bits of the other two are set against it."""
    ballots = [[0b011, 0b001], [0b101, 0b010], [0b111, 0b100]]
    negative, voted = verdict(ballots, "abstain", 0)
    assert negative & 0b111 == 0b101
    assert voted & 0b111 == 0b111


@pytest.mark.parametrize("zeros", RULES)
def test_nobody_votes(zeros: Zeros) -> None:
    """A tie at none against none."""
    ballots = [[0b11] * planes(zeros)] * 3
    for step in (0, 1):
        result = [word & 0b11 for word in verdict(ballots, zeros, step, masks=[0, 0, 0])]
        assert result == ([0, 0] if zeros == "abstain" else [0b11 if zeros == "alternate" and step else 0])


@pytest.mark.parametrize("zeros", RULES)
def test_one_worker_gets_its_own_ballot_back(zeros: Zeros) -> None:
    signs = close_votes(1, abstain=zeros == "abstain")
    for step in (0, 1):
        result = verdict(BYTES.ballots(signs, planes(zeros)), zeros, step)
        np.testing.assert_array_equal(BYTES.verdict(result, LENGTH), signs[0])


@pytest.mark.parametrize("zeros", RULES)
def test_order_of_workers_does_not_matter(zeros: Zeros) -> None:
    signs = close_votes(4, abstain=zeros == "abstain")
    for order in permutations(range(4)):
        result = verdict(BYTES.ballots(signs[list(order)], planes(zeros)), zeros, 1)
        np.testing.assert_array_equal(BYTES.verdict(result, LENGTH), naive(signs, zeros, 1))


@pytest.mark.parametrize("zeros", RULES)
@pytest.mark.parametrize("shard", [1, 3, 7, 40])
def test_shards_do_not_matter(zeros: Zeros, shard: int) -> None:
    ballots = BYTES.ballots(close_votes(6, abstain=zeros == "abstain"), planes(zeros))
    whole = verdict(ballots, zeros, 1)
    parts = [
        verdict([[plane[lo : lo + shard] for plane in ballot] for ballot in ballots], zeros, 1)
        for lo in range(0, LENGTH // 8, shard)
    ]
    for plane, joined in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(joined), plane, strict=True)


def test_ballots_are_left_as_they_were() -> None:
    ballots = BYTES.ballots(close_votes(5, abstain=True), 2)
    before = [[plane.copy() for plane in ballot] for ballot in ballots]
    masks = [np.full(LENGTH // 8, 15, np.uint8) for _ in ballots]
    verdict(ballots, "abstain", 0, masks)
    np.testing.assert_array_equal(ballots, before)
    assert all((mask == 15).all() for mask in masks)


def test_tally_of_none() -> None:
    with pytest.raises(ValueError, match="^a tally needs at least one ballot, got none$"):
        tally([])


@pytest.mark.parametrize("ballots", [[], [[1], [1, 1]], [[1, 1, 1]], [[], []]])
def test_ballots_of_wrong_planes(ballots: Any) -> None:
    with pytest.raises(ValueError, match="^ballots must all have one plane or all two, got "):
        majority(ballots)


@pytest.mark.parametrize(("zeros", "given_planes"), [("alternate", 2), ("positive", 2), ("abstain", 1)])
def test_planes_of_another_zero_rule(zeros: Zeros, given_planes: int) -> None:
    with pytest.raises(ValueError, match=f"^a ballot under zeros='{zeros}' has {planes(zeros)} planes, got "):
        verdict([[1] * given_planes] * 3, zeros, 0)


def test_no_ballots() -> None:
    with pytest.raises(ValueError, match=r"^ballots must all have one plane or all two, got \[\]$"):
        verdict([], "alternate", 0)


@pytest.mark.parametrize("masks", [[], [1], [1, 1, 1]])
def test_masks_of_other_workers(masks: list[int]) -> None:
    with pytest.raises(ValueError, match=f"^masks must be one for each of 2 workers, got {len(masks)}$"):
        majority([[1], [1]], masks)
