"""Rounds of local steps, short enough to check on paper: every number is dyadic, so `==` is exact."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core import LocalReference, check_local_steps, magnitude, median_magnitudes, outer_update
from signsgd_core.adversaries import Adversary, invert, send_nan, silent
from signsgd_core.network.traffic import local_steps, majority_vote

NAN, INF = float("nan"), float("inf")


def close(x: Any, *moved: Any, **settings: Any) -> Any:
    """A tensor after one round; each worker's after its own steps."""
    reference = LocalReference([np.array(x, float)], len(moved), **settings)
    reference.close([[np.array(end, float)] for end in moved])
    return reference.parameters[0].tolist()


def numbers(array: Any) -> Any:
    """An array as a list, to be read beside a calculation."""
    return array.tolist()


def test_a_round_on_paper() -> None:
    # Δ = (4, -2), (2, 4), (-1, 3): V = +1, +1; s_i = 3, 3, 2: s = 3
    assert close([0, 0], [-4, 2], [-2, -4], [1, -3]) == [-3, -3]
    assert close([0, 0], [-4, 2], [-2, -4], [1, -3], outer_lr=0.5) == [-1.5, -1.5]


def test_outer_momentum_on_paper() -> None:
    reference = LocalReference([np.array([0.0])], 1, outer_lr=0.5, outer_momentum=0.5)
    # Δ = 4: u = 4, step 4 + 2 = 6, x = -3; from there back to 0, Δ = -3: u = 2 - 3 = -1, step -3 - .5, x = -3 + 1.75
    reference.close([[np.array([-4.0])]])
    assert numbers(reference.parameters[0]) == [-3]
    reference.close([[np.array([0.0])]])
    assert numbers(reference.parameters[0]) == [-1.25]
    assert numbers(reference.momenta[0]) == [-1]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.875])
def test_outer_update_is_that_of_torch(momentum: float) -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    outer = torch.optim.SGD([p], lr=0.5, momentum=momentum, nesterov=momentum > 0)
    x, u = np.array([1.0, -2.0]), np.zeros(2)
    for step in np.array([[1.0, -1.0], [-0.5, -0.5], [2.0, 2.0]]):
        p.grad = torch.tensor(step, dtype=torch.float32)
        outer.step()
        x, u = outer_update(x, u, step, 0.5, momentum)
        assert p.tolist() == x.tolist()


@given(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=9))
def test_one_worker_moves_by_magnitude_times_sign(ends: list[float]) -> None:
    """With M = 1 and η = 1; an entry that did not move stays."""
    x = np.array(ends, np.float32)
    s = np.float32(np.abs(x).mean(dtype=np.float64))
    np.testing.assert_array_equal(np.array(close(np.zeros(len(ends)), ends), np.float32), np.sign(x) * s)


@given(st.integers(-20, 20), st.integers(1, 5), st.integers(0, 99))
def test_scale_equivariance(exponent: int, workers: int, seed: int) -> None:
    """A problem in other units takes the same way in those units: signSGD does not have that, local steps do."""
    moved = np.random.default_rng(seed).integers(-8, 9, (workers, 6)) / 8
    scale = 2.0**exponent
    assert close(np.zeros(6), *(scale * moved)) == (scale * np.array(close(np.zeros(6), *moved))).tolist()


def test_frozen_tensors_stay() -> None:
    """Nobody moves one: whatever the zero rule says, and its momentum rests."""
    reference = LocalReference([np.ones(3), np.zeros(3)], 2, outer_momentum=0.5)
    for _ in range(3):
        reference.close([[np.ones(3), reference.parameters[1] - 1] for _ in range(2)])
    assert reference.verdicts[0] is None
    assert numbers(reference.parameters[0]) == [1, 1, 1]
    assert numbers(reference.parameters[1]) != [0, 0, 0]
    assert numbers(reference.momenta[0]) == [0, 0, 0]


def test_a_worker_that_did_not_move_a_tensor_abstains() -> None:
    """One moved it, two did not: its word counts, and its magnitude."""
    assert close([0, 0], [-2, -2], [0, 0], [0, 0]) == [-2, -2]


def test_a_round_in_which_nobody_moved_is_none() -> None:
    """Under "alternate" the bit of a tie goes by the number of rounds: that of the first is 0, so V = +1."""
    reference = LocalReference([np.zeros(1)], 2)
    reference.close([[np.zeros(1)], [np.zeros(1)]])
    reference.close([[np.array([1.0])], [np.array([-1.0])]])
    assert numbers(reference.parameters[0]) == [-1]


def test_nan_counts_as_zero() -> None:
    # Δ = (0 for NaN, 4), s_i = 2; (1, 1); (1, 1): V = +1, s = 1
    assert close([0, 0], [NAN, -4], [-1, -1], [-1, -1]) == [-1, -1]
    assert close([0, 0], [NAN, INF], [-1, -1]) == [-1, -1]  # nothing finite: an abstention


@pytest.mark.parametrize("attack", [invert, silent, send_nan, lambda d: 1e30 * d, lambda d: -1e30 * d])
def test_a_liar_cannot_shout(attack: Adversary) -> None:
    """With four honest workers of five the magnitude stays among the honest ones'."""
    moved = [np.full(4, -float(k)) for k in range(1, 6)]
    reference = LocalReference([np.zeros(4)], 5, adversaries={0: attack})
    reference.close([[end] for end in moved])
    assert 2 <= reference.magnitudes[0] <= 5
    np.testing.assert_array_equal(reference.parameters[0], -reference.magnitudes[0])


def test_a_lie_has_the_displacements_shape() -> None:
    reference = LocalReference([np.zeros(3)], workers=1, adversaries={0: lambda delta: delta[:1]})
    with pytest.raises(ValueError, match=r"must return a gradient of the shape \(3,\) that it got, not \(1,\)"):
        reference.close([[np.ones(3)]])
    assert not reference.parameters[0].any()


@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=7), st.lists(st.floats(1, 2), min_size=8, max_size=9))
def test_the_median_is_bounded_by_honest_workers(lies: list[float], honest: list[float]) -> None:
    """As long as they are more than half of all."""
    rows = np.array([*lies, *honest], np.float64)[:, None]
    assert 1 <= median_magnitudes(rows)[0] <= 2


def test_magnitude_of_nothing() -> None:
    assert magnitude(np.zeros(0)) == 0
    assert magnitude(np.full(3, 3e38, np.float32)) == np.float32(3e38)  # the sum would be infinite


def test_half_types_round_once() -> None:
    """2048 + 1 is 2048 in float16, 2048 + 3 is 2052."""
    reference = LocalReference([np.array([2048.0], np.float16)], 1)
    reference.close([[np.array([2050.0], np.float16)]])
    assert reference.parameters[0].dtype == np.float16
    assert numbers(reference.parameters[0]) == [2050]


@pytest.mark.parametrize("name", ["outer_lr", "outer_momentum"])
def test_settings_are_named(name: str) -> None:
    settings: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"{name} must .* got -1"):
        LocalReference([np.zeros(1)], 1, **settings)


@pytest.mark.parametrize("sync_every", [0, -1, 1.5, True, None])
def test_sync_every_is_a_whole_number(sync_every: Any) -> None:
    with pytest.raises(ValueError, match=f"sync_every must be a whole number of 1 or more, got {sync_every}"):
        check_local_steps(sync_every, 1.0, 0.0)


def test_traffic() -> None:
    """A vote, and for each peer a float a tensor and one more; all of it once in `H` steps."""
    assert local_steps(10**6, 4, 16, tensors=10) == (majority_vote(10**6, 4) + 3 * 44) / 16


@pytest.mark.parametrize(
    ("moved", "sentence"),
    [
        ([], "tensors must be those of 2 workers, got 0"),
        ([[np.ones(2)], [np.array(5.0)]], "worker 1's tensor 0 must have the shape (2,), got ()"),
        ([[np.ones(2), np.ones(2)], [np.ones(2)]], "worker 0 must have 1 tensors, got 2"),
    ],
)
def test_what_moved_has_the_tensors_shapes(moved: list[list[Any]], sentence: str) -> None:
    reference = LocalReference([np.zeros(2)], workers=2)
    with pytest.raises(ValueError, match="must") as error:
        reference.close(moved)
    assert str(error.value) == sentence
    assert not reference.parameters[0].any()
