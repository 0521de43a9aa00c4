"""The one check of settings: what is taken, and the sentence for what is not."""

from typing import Any

import numpy as np
import pytest

from signsgd_core import (
    check_betas,
    check_factor,
    check_settings,
    check_share,
    check_size,
    check_warmup_steps,
    warmup_steps,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("betas", [(0, 0), (0.9, 0.99), [0.5, 0.25], np.array([0.0, 0.75])])
def test_good_betas(betas: object) -> None:
    checked = check_betas(betas)
    assert checked == tuple(np.asarray(betas).tolist())
    assert [type(beta) for beta in checked] == [float, float]


@pytest.mark.parametrize("betas", [(1.2, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -1e-9), (float("nan"), 0.9)])
def test_betas_out_of_range(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="betas") as error:
        check_betas(betas)
    assert str(error.value) == f"betas must lie in [0, 1), got {betas}"


@pytest.mark.parametrize("betas", [0.9, None, (0.9,), (0.9, 0.9, 0.9), ("a", "b"), (None, 0.9)])
def test_betas_that_are_no_pair(betas: object) -> None:
    with pytest.raises(ValueError, match=r"^betas must be a pair of numbers such as \(0\.9, 0\.9\), got "):
        check_betas(betas)


@pytest.mark.parametrize("value", [0, 0.0, 1e-300, 3.5, np.float32(2), np.array(0.5), True])
def test_good_size(value: Any) -> None:
    check_size("lr", value)


@pytest.mark.parametrize("value", [-1, -1e-9, NAN, INF, -INF, "1", None, [1.0], 1j])
def test_bad_size(value: Any) -> None:
    with pytest.raises(ValueError, match="lr") as error:
        check_size("lr", value)
    assert str(error.value) == f"lr must be 0 or more and finite, got {value!r}"


@pytest.mark.parametrize("value", [1e-300, 3.5, np.float32(2), True])
def test_good_factor(value: Any) -> None:
    check_factor("scale", value)


@pytest.mark.parametrize("value", [0, 0.0, -1, NAN, INF, "1", None])
def test_bad_factor(value: Any) -> None:
    with pytest.raises(ValueError, match="scale") as error:
        check_factor("scale", value)
    assert str(error.value) == f"scale must be above 0 and finite, got {value!r}"


@pytest.mark.parametrize("value", [0, 0.0, 0.999, np.float32(0.5), np.array(0.5)])
def test_good_share(value: Any) -> None:
    check_share("beta_1", value)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, NAN, INF, "0.5", None, (0.9, 0.9), 0.5j])
def test_bad_share(value: Any) -> None:
    with pytest.raises(ValueError, match="beta_1") as error:
        check_share("beta_1", value)
    assert str(error.value) == f"beta_1 must lie in [0, 1), got {value!r}"


@pytest.mark.parametrize("steps", [0, 1, 894, np.int64(3), True])
def test_warmup_steps_that_are_given(steps: Any) -> None:
    checked = check_warmup_steps(steps, 0.9)
    assert checked == steps
    assert type(checked) is int


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9])
def test_warmup_steps_of_the_theorem(beta2: float) -> None:
    assert check_warmup_steps("auto", beta2) == warmup_steps(beta2)


@pytest.mark.parametrize("steps", [-1, 1.5, 2.0, "long", "", None, [1]])
def test_bad_warmup_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match="warmup_steps") as error:
        check_warmup_steps(steps, 0.9)
    assert str(error.value) == f"warmup_steps must be 'auto' or a whole number of 0 or more, got {steps!r}"


def test_settings_are_checked_in_their_order() -> None:
    """The first that is wrong is named, and all that are right are taken."""
    good: dict[str, Any] = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "betas": (0.9, 0.9),
        "verdict_momentum": 0.0,
        "zeros": None,
        "warmup_steps": "auto",
    }
    bad = {"lr": -1, "weight_decay": -1, "betas": (1, 1), "verdict_momentum": 1, "zeros": "all", "warmup_steps": -1}
    check_settings(**good)
    for k, name in enumerate(good):
        settings = {**good, **dict(list(bad.items())[k:])}
        with pytest.raises(ValueError, match=f"^{name} must "):
            check_settings(**settings)
