"""What each setting may be: one check for the reference and every front end."""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal

from .ballots import Zeros, check_zeros
from .polar import NS_COEFFICIENTS
from .update import warmup_steps as recommended_warmup_steps

WarmupSteps = int | Literal["auto"]
"""How many warmup steps, or "auto" for C(β2)."""


def check_betas(betas: object) -> tuple[float, float]:
    """Return `betas` as two floats.

    Raises:
        ValueError: unless it is a pair of numbers in [0, 1).
    """
    pair = tuple(betas) if isinstance(betas, Iterable) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)):
        raise ValueError(f"betas must be a pair of numbers such as (0.9, 0.9), got {betas!r}")
    if not all(0 <= beta < 1 for beta in pair):
        raise ValueError(f"betas must lie in [0, 1), got {betas!r}")
    return float(pair[0]), float(pair[1])


def check_size(name: str, value: Any) -> None:
    """Make sure that a setting is a finite number of 0 or more.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be 0 or more and finite, got {value!r}")


def check_factor(name: str, value: Any) -> None:
    """Make sure that a setting is a finite number above 0.

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be above 0 and finite, got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Make sure that a setting is a whole number, an int of `least` or more.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, Integral) and not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {value!r}: pass int({value})")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Make sure that a setting is a number in [0, 1).

    Raises:
        ValueError: if it is not.
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def check_warmup_steps(warmup_steps: Any, beta2: float) -> int:
    """Return for how many steps the ballot is the sign of the gradient; for "auto", C(β2).

    Raises:
        ValueError: if it is neither "auto" nor a whole number of 0 or more, or C(β2) would never end.
    """
    if warmup_steps == "auto":
        return recommended_warmup_steps(beta2)
    if not isinstance(warmup_steps, Integral) or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be 'auto' or a whole number of 0 or more, got {warmup_steps!r}")
    return int(warmup_steps)


def check_newton_schulz(ns_steps: Any, ns_coefficients: Any) -> None:
    """Make sure that the settings of Newton–Schulz are in their range.

    Raises:
        ValueError: if not, with the name and the value.
    """
    if not isinstance(ns_steps, Integral) or not 1 <= int(ns_steps) < 100:
        raise ValueError(f"ns_steps must be a whole number of 1 to 99, got {ns_steps!r}")
    triple = tuple(ns_coefficients) if isinstance(ns_coefficients, Iterable) else ()
    if len(triple) != 3 or not all(_is_number(value) and math.isfinite(float(value)) for value in triple):
        raise ValueError(
            f"ns_coefficients must be three finite numbers such as {NS_COEFFICIENTS}, got {ns_coefficients!r}"
        )


def check_settings(
    lr: Any, betas: object, weight_decay: Any, verdict_momentum: Any, zeros: Zeros | None, warmup_steps: Any
) -> None:
    """Make sure that every setting is in its range.

    Raises:
        ValueError: for the first that is not, with its name, its value and what it may be.

    Example:
        >>> check_settings(-1.0, (0.9, 0.9), 0.0, 0.0, None, 0)
        Traceback (most recent call last):
        ValueError: lr must be 0 or more and finite, got -1.0
    """
    check_size("lr", lr)
    check_size("weight_decay", weight_decay)
    _, beta2 = check_betas(betas)
    check_share("verdict_momentum", verdict_momentum)
    if zeros is not None:
        check_zeros(zeros)
    check_warmup_steps(warmup_steps, beta2)


def _is_number(value: object) -> bool:
    """Tell whether it is one; also an array or tensor of a single number, but not text that reads like one."""
    return hasattr(value, "__float__") and not isinstance(value, str)
