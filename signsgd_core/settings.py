"""What each setting may be: one check for the reference and every front end."""

from typing import Literal, SupportsFloat

from .ballots import Zeros, check_zeros

WarmupSteps = int | Literal["auto"]
"""How many warmup steps, or "auto" for C(β2)."""


def check_betas(betas: object) -> tuple[float, float]:
    """Return `betas` as two floats.

    Raises:
        ValueError: unless it is a pair of numbers in [0, 1).
    """
    try:
        beta1, beta2 = (float(beta) for beta in betas)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"betas must be a pair of numbers such as (0.9, 0.9), got {betas!r}") from None
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must lie in [0, 1), got {betas!r}")
    return beta1, beta2


def check_settings(
    lr: SupportsFloat,
    betas: object,
    weight_decay: float,
    verdict_momentum: float,
    zeros: Zeros | None,
    warmup_steps: WarmupSteps,
) -> None:
    """Make sure that every setting is in its range.

    Raises:
        ValueError: for the first that is not, with its name, its value and what it may be.

    Example:
        >>> check_settings(-1.0, (0.9, 0.9), 0.0, 0.0, None, 0)
        Traceback (most recent call last):
        ValueError: lr must be 0 or more and finite, got -1.0
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= float(value) < float("inf"):
            raise ValueError(f"{name} must be 0 or more and finite, got {value!r}")
    check_betas(betas)
    if not 0 <= verdict_momentum < 1:
        raise ValueError(f"verdict_momentum must lie in [0, 1), got {verdict_momentum!r}")
    if zeros is not None:
        check_zeros(zeros)
    if warmup_steps != "auto" and (
        isinstance(warmup_steps, str) or warmup_steps != int(warmup_steps) or warmup_steps < 0
    ):
        raise ValueError(f"warmup_steps must be 'auto' or a whole number of 0 or more, got {warmup_steps!r}")
