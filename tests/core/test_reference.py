"""Trajectories short enough to check on paper: every number is dyadic, so `==` is exact."""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signsgd_core import Reference, Zeros, pack, unpack, verdict
from signsgd_core.adversaries import invert

RULES: tuple[Zeros, ...] = get_args(Zeros)
NAN, INF = float("nan"), float("inf")


def run(reference: Reference, *steps: Sequence[float | None]) -> list[float]:
    """The one parameter after each step; a step is the gradient of each worker."""
    trajectory = []
    for gradients in steps:
        reference.step([[None if g is None else np.array([g])] for g in gradients])
        trajectory.append(float(reference.parameters[0][0]))
    return trajectory


def at(x: float, workers: int, lr: float = 1.0, **settings: Any) -> Reference:
    return Reference([np.array([float(x)])], workers, lr, **settings)


def numbers(arrays: Any) -> Any:
    """Arrays as lists of floats, to be read beside a calculation."""
    return np.array(arrays).tolist()


def test_signsgd_counts_heads_not_magnitudes() -> None:
    # V = +1 (two against one, though the mean is negative), then -1: x = 1 - .5, then .5 + .5
    assert run(at(1, 3, lr=0.5, betas=(0, 0)), [1, 2, -5], [-0.5, -0.25, 8]) == [0.5, 1.0]


def test_signum() -> None:
    reference = at(0, 1, betas=(0.5, 0.5))
    # c = m: 4/2 = 2, 2/2 - 1/2 = .5, .5/2 - 1/2 = -.25, so V = +1, +1, -1
    assert run(reference, [4], [-1], [-1]) == [-1, -2, -1]
    assert numbers(reference.momenta[0][0]) == [-0.25]


def test_lion() -> None:
    reference = at(0, 1, betas=(0.5, 0.75))
    # c: 0/2 + 4/2 = 2     m: 0 + 4/4 = 1         V = +1
    # c: 1/2 - 2/2 = -.5   m: 3/4 - 2/4 = .25     V = -1
    # c: .25/2 - .25/2 = 0 m: .75/4 - .25/4 = .125, V = 0 as zeros abstain with one worker
    assert run(reference, [4], [-2], [-0.25]) == [-1, 0, 0]
    assert numbers(reference.momenta[0][0]) == [0.125]


def test_every_worker_has_its_own_momentum() -> None:
    reference = at(0, 3, betas=(0.5, 0.5))
    # momenta 4, -1, -1: V = -1; then 2 + .5, -.5 + .5 = 0, -.5 + 1 = .5: V = +1, whatever worker 1's zero says
    assert run(reference, [8, -2, -2], [1, 1, 2]) == [1, 0]
    assert numbers([m[0] for m in reference.momenta]) == [[2.5], [0.0], [0.5]]


def test_verdict_momentum() -> None:
    reference = at(0, 3, betas=(0, 0), verdict_momentum=0.5)
    # V = +1, +1, -1: u = .5, .25 + .5 = .75, .375 - .5 = -.125; x = -u added up
    assert run(reference, [1, 1, -1], [1, -1, 1], [-1, -1, -1]) == [-0.5, -1.25, -1.125]
    assert numbers(reference.verdict_momenta[0]) == [-0.125]


def test_weight_decay() -> None:
    # x = 4 - (1 + 2)/2 = 2.5; x = 2.5 - (-1 + 1.25)/2 = 2.375
    assert run(at(4, 1, lr=0.5, betas=(0, 0), weight_decay=0.5), [3], [-3]) == [2.5, 2.375]


def test_weight_decay_stays_out_of_the_verdict_momentum() -> None:
    reference = at(4, 1, lr=0.5, betas=(0, 0), weight_decay=0.5, verdict_momentum=0.5)
    # u = .5: x = 4 - (.5 + 2)/2 = 2.75; u = .25 - .5 = -.25: x = 2.75 - (-.25 + 1.375)/2 = 2.1875
    assert run(reference, [3], [-3]) == [2.75, 2.1875]


def test_warmup() -> None:
    # two ballots are signs of gradients, +1 and -1, while m = 2, .5; the third is c = .25 - .125, +1
    assert run(at(0, 1, betas=(0.5, 0.5), warmup_steps=2), [4], [-1], [-0.25]) == [-1, 0, -1]
    # without it the second ballot is c = .5 > 0
    assert run(at(0, 1, betas=(0.5, 0.5)), [4], [-1], [-0.25]) == [-1, -2, -3]


def test_lr_may_change() -> None:
    reference = at(0, 1, lr=1)
    run(reference, [1])
    reference.lr = 0.25
    assert run(reference, [1]) == [-1.25]
    assert reference.t == 2


@pytest.mark.parametrize(
    ("zeros", "trajectory"), [("alternate", [-1, 0, -1]), ("abstain", [0, 0, 0]), ("positive", [-1, -2, -3])]
)
def test_ties(zeros: Zeros, trajectory: list[float]) -> None:
    """One against one: the bit of step t is t mod 2, nobody's, or 0."""
    assert run(at(0, 2, betas=(0, 0), zeros=zeros), [1, -1], [-1, 1], [1, -1]) == trajectory


@pytest.mark.parametrize(
    ("zeros", "trajectory"), [("alternate", [1, 2, 3]), ("abstain", [1, 2, 3]), ("positive", [-1, -2, -3])]
)
def test_one_vote_among_zeros(zeros: Zeros, trajectory: list[float]) -> None:
    """Two zeros and a negative: the zeros' bits are 0 and 1, so they cancel out; or none; or 0 and 0, which win."""
    assert run(at(0, 3, betas=(0, 0), zeros=zeros), [0, 0, -1], [0, -0.0, -1], [-0.0, 0, -1]) == trajectory


@pytest.mark.parametrize(("zeros", "trajectory"), [("alternate", [-1, 0]), ("abstain", [0, 0]), ("positive", [-1, -2])])
def test_zeros_only(zeros: Zeros, trajectory: list[float]) -> None:
    """Three workers: under "alternate" the bits are 0 1 0 at step 0 and 1 0 1 at step 1."""
    assert run(at(0, 3, betas=(0, 0), zeros=zeros), [0, 0, 0], [0, 0, 0]) == trajectory


@pytest.mark.parametrize("workers", range(1, 9))
def test_an_untouched_weight(workers: int) -> None:
    """Under "alternate" it goes one way and back, under "positive" it drifts for ever, under "abstain" it stays."""
    steps = [[0.0] * workers] * 6
    assert run(at(3, workers, zeros="alternate"), *steps) == [2, 3, 2, 3, 2, 3]
    assert run(at(3, workers, zeros="positive"), *steps) == [2, 1, 0, -1, -2, -3]
    assert run(at(3, workers, zeros="abstain"), *steps) == [3] * 6


def test_the_default_zero_rule() -> None:
    assert [at(0, workers).zeros for workers in (1, 2, 3)] == ["abstain", "alternate", "alternate"]
    assert at(0, 1, zeros="alternate").zeros == "alternate"
    assert at(0, 2, zeros="abstain").zeros == "abstain"


def test_absent_gradients_cast_no_vote() -> None:
    reference = at(0, 3, betas=(0.5, 0.5))
    # step 0: 2 against -1, tied at an even step, V = +1; step 1: worker 0 alone has m = 1 + 0, V = +1;
    # step 2: workers 1 and 2 have -.5 + .25 = -.25 and 0 + 4 = 4, tied at an even step, V = +1
    assert run(reference, [4, -2, None], [0, None, None], [None, 0.5, 8]) == [-1, -2, -3]
    assert numbers([m[0] for m in reference.momenta]) == [[1.0], [-0.25], [4.0]]


def test_absent_workers_keep_their_numbers() -> None:
    """Worker 1 is the only one there: its zero at step 0 is bit (0 + 1) mod 2."""
    assert run(at(0, 3, betas=(0, 0)), [None, 0, None]) == [1]


def test_a_tensor_without_any_gradient_stays_untouched() -> None:
    parameters = [np.array([4.0, 4.0]), np.array(4.0)]
    settings: dict[str, Any] = {"betas": (0, 0), "weight_decay": 0.5, "verdict_momentum": 0.5}
    reference = Reference(parameters, 2, 1.0, **settings)
    g = np.array([1.0, -1.0])
    reference.step([[g, np.array(1.0)], [g, np.array(2.0)]])
    reference.step([[g, None], [g, None]])
    # the second tensor: u = .5, x = 4 - (.5 + 2) = 1.5 and there it stays
    assert numbers([reference.parameters[1], reference.verdict_momenta[1]]) == [1.5, 0.5]
    assert reference.verdicts[1] is None
    # the first: u = ±.5, x = 4 - (±.5 + 2) = 1.5 and 2.5; u = ±.75, x = 1.5 - (.75 + .75), 2.5 - (-.75 + 1.25)
    assert numbers(reference.parameters[0]) == [0.0, 2.0]
    assert numbers(reference.verdicts[0]) == [1.0, -1.0]


def test_steps_without_gradients_are_steps_of_the_zero_rule() -> None:
    assert run(at(0, 2, betas=(0, 0)), [None, None], [1, -1]) == [0, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_entries_count_as_zero(bad: float) -> None:
    reference = at(0, 1, betas=(0.5, 0.5))
    # m = 2, 1, -1: the second ballot is momentum alone
    assert run(reference, [4], [bad], [-3]) == [-1, -2, -1]
    assert numbers(reference.momenta[0][0]) == [-1.0]
    # and without momentum it is a zero: bits 1 at step 1 of worker 0, and of worker 1 at step 0
    assert run(at(0, 3, betas=(0, 0)), [1, bad, -1], [bad, 1, -1]) == [1, 2]


def test_parameters_are_copied() -> None:
    mine = np.zeros(2)
    reference = Reference([mine], 1, 1.0)
    mine += 5
    assert numbers(reference.parameters[0]) == [0.0, 0.0]


def test_each_adversary_is_its_own_worker() -> None:
    adversaries = {1: lambda g: None, 2: lambda g: -g}
    reference = at(0, 4, betas=(0.5, 0.5), adversaries=adversaries)
    # ballots +, none, -, -: V = -1
    assert run(reference, [1, 1, 1, -1]) == [1]
    assert numbers([m[0] for m in reference.momenta]) == [[0.5], [0.0], [-0.5], [-0.5]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_and_shapes(dtype: type[np.floating[Any]]) -> None:
    parameters = [np.ones((2, 3), dtype), np.ones((), dtype), np.ones((0,), dtype)]
    reference = Reference(parameters, 2, 0.5, betas=(0.5, 0.5), weight_decay=0.5, verdict_momentum=0.5)
    reference.step([[np.ones_like(x) for x in parameters]] * 2)
    for x, start, u, m in zip(
        reference.parameters, parameters, reference.verdict_momenta, reference.momenta[1], strict=True
    ):
        np.testing.assert_array_equal(x, np.full(start.shape, 0.5, dtype), strict=True)  # 1 - (.5 + .5)/2
        for momentum in (u, m):  # ½·1 of each, in fp32 whatever the parameter's
            np.testing.assert_array_equal(momentum, np.full(start.shape, 0.5, np.float32), strict=True)
        assert (start == 1).all()


@given(
    st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 3), st.sampled_from(RULES), st.sampled_from([0.0, 0.75])
)
def test_packed_vote_agrees(workers: int, seed: int, step: int, zeros: Zeros, beta: float) -> None:
    """It counts plain numbers, `verdict` counts packed words; both must elect the same."""
    random = np.random.default_rng(seed)
    reference = Reference([np.zeros(50)], workers, 1.0, betas=(0, beta), zeros=zeros)
    for t in range(step + 1):
        gradients = random.choice([0.0, -0.0, NAN, INF, 1.0, -1.0, -2.0], (workers, 1, 50))
        reference.step(list(gradients))
        honest = np.where(np.isfinite(gradients[:, 0]), gradients[:, 0], 0)
        elected = verdict([list(pack(c, zeros, t, i)) for i, c in enumerate(honest)], zeros, t)
        np.testing.assert_array_equal(unpack(np.array(elected), 50), reference.verdicts[0])


_MAP = "orthogonalize must map numbers of the 1 tensors to how many matrices each holds, such as {0: 1}, got"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"workers": 0}, "workers must be a whole number of 1 or more, got 0"),
        ({"betas": (1.0, 0.9)}, "betas must lie in [0, 1), got (1.0, 0.9)"),
        ({"lr": -1.0}, "lr must be 0 or more and finite, got -1.0"),
        ({"lr": float("nan")}, "lr must be 0 or more and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more and finite, got -1.0"),
        ({"verdict_momentum": 1.5}, "verdict_momentum must lie in [0, 1), got 1.5"),
        ({"warmup_steps": -1}, "warmup_steps must be 'auto' or a whole number of 0 or more, got -1"),
        ({"warmup_steps": "all"}, "warmup_steps must be 'auto' or a whole number of 0 or more, got 'all'"),
        ({"workers": np.int64(2)}, "workers must be an int, got np.int64(2): pass int(2)"),
        ({"workers": True}, "workers must be a whole number of 1 or more, got True"),
        ({"adversaries": {2: invert}}, "adversaries must be workers 0 to 1, got [2]"),
        ({"adversaries": {"a": invert, 9: invert}}, "adversaries must be workers 0 to 1, got ['a', 9]"),
        ({"orthogonalize": {5: 1}}, f"{_MAP} {{5: 1}}"),
        ({"orthogonalize": True}, f"{_MAP} True"),
        ({"parameters": [np.zeros((2, 2))], "orthogonalize": {0: 0}}, "tensor 0 must hold 1 matrix or more, got 0"),
        ({"parameters": [np.zeros(1, int)]}, "parameters must be floating point, got ['int64']"),
        ({"zeros": "random"}, "zeros must be one of 'alternate', 'abstain', 'positive', got 'random'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="must") as error:
        Reference(**{"parameters": [np.zeros(1)], "workers": 2, "lr": 0.1, **settings})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("gradients", "sentence"),
    [
        ([[np.ones(1)]], "gradients must be those of 2 workers, got 1"),
        ([[np.ones(1)], []], "worker 1 must have 1 gradients, got 0"),
        ([[None], [np.ones(3)]], "worker 1's gradient 0 must have the shape (1,), got (3,)"),
    ],
)
def test_wrong_gradients_change_nothing(gradients: list[list[Any]], sentence: str) -> None:
    reference = Reference([np.zeros(1)], workers=2, lr=0.1)
    with pytest.raises(ValueError, match="must") as error:
        reference.step(gradients)
    assert str(error.value) == sentence
    assert reference.parameters[0] == 0


def test_a_lie_has_the_gradients_shape() -> None:
    reference = Reference([np.zeros(3)], workers=1, lr=0.1, adversaries={0: lambda g: g[:1]})
    with pytest.raises(ValueError, match=r"must return a gradient of the shape \(3,\) that it got, not \(1,\)"):
        reference.step([[np.ones(3)]])
    assert not reference.parameters[0].any()
