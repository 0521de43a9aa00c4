from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from signsgd_core import Reference
from signsgd_core.adversaries import ADVERSARIES, Adversary, Randomize, check_adversaries, invert, send_nan, silent

WORKERS, SIZE = 7, 20


def test_what_is_no_function_is_refused() -> None:
    lying: dict[int, Any] = {0: invert, 1: "invert"}
    with pytest.raises(TypeError, match=r"adversaries must be functions, .* got 'invert' of rank 1"):
        check_adversaries(lying, 2, "rank")
    listed: Any = [invert]
    with pytest.raises(TypeError, match=r"adversaries must map a rank to its function, .* got \[<function invert"):
        check_adversaries(listed, 2, "rank")


def distance(adversaries: Mapping[int, Adversary], betas: tuple[float, float] = (0, 0)) -> float:
    """How far 400 steps of 0.01 end from the minimum of a noisy quadratic, the farthest coordinate; 1 at first."""
    random = np.random.default_rng(0)
    minimum = random.choice([-1.0, 1.0], SIZE)
    reference = Reference([np.zeros(SIZE)], WORKERS, 0.01, betas, adversaries=adversaries)
    for _ in range(400):
        slope = reference.parameters[0] - minimum
        reference.step([[slope + random.normal(0, 0.3, SIZE)] for _ in range(WORKERS)])
    return float(np.abs(reference.parameters[0] - minimum).max())


def same(adversary: Adversary, count: int) -> dict[int, Adversary]:
    return dict.fromkeys(range(count), adversary)


@pytest.mark.parametrize("betas", [(0, 0), (0.5, 0.5), (0.9, 0.9)])
def test_three_inverters_of_seven_lose(betas: tuple[float, float]) -> None:
    assert distance({}, betas) < 0.25
    assert distance(same(invert, 3), betas) < 0.25


@pytest.mark.parametrize("betas", [(0, 0), (0.5, 0.5), (0.9, 0.9)])
def test_four_inverters_of_seven_win(betas: tuple[float, float]) -> None:
    """They own the majority: all coordinates are driven away from the minimum, nearly a learning rate a step."""
    assert distance(same(invert, 4), betas) > 2


@pytest.mark.parametrize("count", [1, 5])
def test_noise_nan_and_silence_do_no_harm(count: int) -> None:
    assert distance(same(silent, count)) < 0.25
    assert distance(same(send_nan, count)) < 0.25
    assert distance({i: Randomize(seed=i) for i in range(count)}) < 0.25


def test_without_any_honest_worker() -> None:
    """All silent: nothing moves. All NaN: every ballot alternates, back and forth."""
    assert distance(same(silent, 7)) == 1.0
    assert distance(same(send_nan, 7)) == pytest.approx(1.0)


def test_invert() -> None:
    np.testing.assert_array_equal(invert(np.array([1, -2], np.float32)), np.array([-1, 2], np.float32), strict=True)
    assert invert(torch.tensor([1.0, -2.0])).tolist() == [-1.0, 2.0]


def test_silent() -> None:
    adversary: Adversary = silent
    assert [adversary(gradient) for gradient in (np.ones(2), torch.ones(2))] == [None, None]


def test_send_nan() -> None:
    gradient = np.ones((2, 3), np.float16)
    sent = send_nan(gradient)
    np.testing.assert_array_equal(sent, np.full((2, 3), np.nan, np.float16), strict=True)
    assert (gradient == 1).all()


def test_randomize() -> None:
    gradient = np.full((100, 100), 5, np.float32)
    noise, again, other = Randomize(seed=0), Randomize(seed=0), Randomize(seed=1)
    first, second = noise(gradient), noise(gradient)
    assert (first.shape, first.dtype) == (gradient.shape, gradient.dtype)
    np.testing.assert_array_equal(again(gradient), first)
    for different in (second, other(gradient)):
        assert 0.45 < (np.sign(different) == np.sign(first)).mean() < 0.55
    assert 0.48 < (first < 0).mean() < 0.52
    assert (gradient == 5).all()


def test_those_that_collude_send_the_same_whatever_their_seeds() -> None:
    gradient = np.ones((10, 10), np.float32)
    sent = [ADVERSARIES["collude"](seed)(gradient) for seed in (1, 2)]
    np.testing.assert_array_equal(sent[0], sent[1])
    assert set(np.unique(sent[0])) == {-1.0, 1.0}
    noise = [ADVERSARIES["random"](seed)(gradient) for seed in (1, 2)]
    assert (noise[0] != noise[1]).any()
