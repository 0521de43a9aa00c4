"""What the settings of a `Signum` may be, those that it makes of what was left out, and those that workers share."""

import re
from collections.abc import Iterable
from typing import Any

import signsgd_core as core

AGREED = (
    "beta_1",
    "beta_2",
    "verdict_momentum",
    "zero_rule",
    "warmup_steps",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "orthogonalize",
    "other_lr_ratio",
    "ns_steps",
    "ns_coefficients",
)
"""The settings that all workers must have in common, in the order of error messages."""

_OTHER_LR_RATIO = 1 / 64
"""An orthogonal update is divided by the root of its columns, others are not."""


def check_flag(name: str, value: Any) -> None:
    """Make sure that a setting is True or False.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_factors(**given: Any) -> None:
    """Make sure that settings are finite numbers above 0, where they are given.

    Raises:
        ValueError: if one is not.
    """
    for name, value in given.items():
        if value is not None:
            core.check_factor(name, value)


def check_keywords(exclude_layers: Any) -> tuple[str, ...]:
    """Return the keywords of layers that are excluded.

    Raises:
        ValueError: unless it is None or a list of regular expressions.
    """
    keywords = () if exclude_layers is None else exclude_layers
    texts = tuple(keywords) if isinstance(keywords, Iterable) and not isinstance(keywords, str) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f'exclude_layers must be a list of keywords such as ["output"], got {exclude_layers!r}')
    for text in texts:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(
                f"exclude_layers must be regular expressions, and {text!r} is none ({error}): re.escape() makes one"
            ) from error
    return texts


def lr_ratio(orthogonalize: bool, learning_rate: Any, other_learning_rate: Any, ratio: Any) -> float:
    """Return the learning rate of the variables that are no matrices, divided by that of the matrices.

    Args:
        orthogonalize: whether there are matrices.
        learning_rate: as it was given.
        other_learning_rate: as it was given.
        ratio: as it was given.

    Raises:
        ValueError: if it cannot be told.
    """
    given = {"other_learning_rate": other_learning_rate, "other_lr_ratio": ratio}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        core.check_size(name, value)
        if not orthogonalize:
            raise ValueError(
                f"{name}={value!r} is of the variables that are not orthogonalized: it needs orthogonalize=True"
            )
    if len(given) == 2:
        raise ValueError(
            f"give other_learning_rate or other_lr_ratio, not both, got {other_learning_rate!r}, {ratio!r}"
        )
    if other_learning_rate is None:
        return (_OTHER_LR_RATIO if orthogonalize else 1.0) if ratio is None else float(ratio)
    if not isinstance(learning_rate, float) or learning_rate == 0:
        raise ValueError(
            f"other_learning_rate={other_learning_rate!r} needs a learning_rate above 0 to be in proportion to, got "
            f"{learning_rate!r}: with a schedule give other_lr_ratio, the other rate divided by learning_rate"
        )
    return float(other_learning_rate / learning_rate)
