"""The settings of a parameter group: what each may be, and what of them all ranks must have in common."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

import signsgd_core as core

from .sharding import check_whole
from .state import Group

LATER = {"orthogonalize": False, "matrices": 1, "ns_steps": core.NS_STEPS, "ns_coefficients": core.NS_COEFFICIENTS}
"""Settings that states of earlier versions lack, as those versions computed."""

_CHECKED = ("lr", "betas", "weight_decay", "verdict_momentum", "zeros", "warmup_steps", "momentum_dtype", *LATER)


def checked(group: Group) -> dict[str, Any]:
    """Return the settings that `check` looks at, to see whether they were changed: of a tensor its value."""
    values = {name: group.get(name) for name in _CHECKED}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def check(settings: Group) -> None:
    """Make sure that every setting is in its range.

    Raises:
        ValueError: for the first that is not, with its name, its value and what it may be.
    """
    lr = settings["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got a tensor of shape {tuple(lr.shape)}")
    names = ("betas", "weight_decay", "verdict_momentum", "zeros", "warmup_steps")
    core.check_settings(lr, *(settings[name] for name in names))
    if settings.get("momentum_dtype") not in (None, torch.bfloat16):
        raise ValueError(
            f"momentum_dtype must be None, which is float32, or torch.bfloat16, got {settings['momentum_dtype']!r}"
        )
    number = settings["matrices"]
    if not isinstance(number, Integral) or int(number) < 1:
        raise ValueError(f"matrices must be a whole number of 1 or more, got {number!r}")
    core.check_newton_schulz(settings["ns_steps"], settings["ns_coefficients"])


def check_change(before: Group, now: Group) -> None:
    """Make sure that settings that were changed between steps are in their range, and so is the change.

    Raises:
        ValueError: if one is not, or a schedule made a momentum of none.
    """
    check(now)
    if before["betas"][0] == 0 < now["betas"][0] and now["betas"][1] == 0:
        raise ValueError(
            f"betas were {before['betas']} and are {now['betas']} now, by which the last gradient votes "
            "instead of this one: tell a schedule that cycles momentum with the learning rate, as OneCycleLR, "
            "cycle_momentum=False"
        )


def check_matrices(group: Group, number: int) -> None:
    """Make sure that the parameters of a group that is orthogonalized are matrices.

    Args:
        group: with its settings.
        number: of the group, for the error.

    Raises:
        ValueError: for the first that is not, by its name where the group knows it.
    """
    names = group.get("param_names")
    for k, p in enumerate(group["params"] if group["orthogonalize"] else ()):
        name = names[k] if names else f"parameter {k} of group {number}"
        core.matrices(p.shape, group["matrices"], name)
        check_whole(p, name, "orthogonalize=True (SignMuon)", "put it into a group without orthogonalize")


def in_words(groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    """Return what all ranks must have in common for a vote, a line each, but for `zeros`, which may be left open.

    Args:
        groups: of the optimizer.
        names: of the settings.
    """
    lines = []
    for k, group in enumerate(groups):
        for name in (name for name in group if name in names and name != "zeros"):
            value = group[name]
            if name in ("lr", "weight_decay", "verdict_momentum"):  # 0 and 0.0 are one value in several spellings
                value = float(value)
            if name in ("betas", "ns_coefficients"):
                value = tuple(map(float, value))
            lines.append(f"group {k}: {name}={value!r}")
    return lines
