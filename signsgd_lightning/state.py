"""The optimizer's state of a parameter as one table: what there is, of which dtype, and whose it is.

Views, checkpoints, a vote between nodes and the rule for another number of workers read the table; none of them names
an entry of its own. An entry that is private to a worker is gathered and handed out with the others.
"""

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import signsgd_core as core

from .memory import is_plain, plain

Group = dict[str, Any]
"""A parameter group: its parameters and settings."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the state, of its parameter's shape, zeros at first.

    Attributes:
        name: its key in ``optimizer.state[p]``.
        private: whether each worker has its own; else it is the same on all.
        dtype: parameter group -> what it is kept in.
        needed: parameter group -> whether its settings need it.
        inherit: values of the old workers that a new one replaces, at least float32 -> what it goes on with.
    """

    name: str
    private: bool
    dtype: Callable[[Group], torch.dtype]
    needed: Callable[[Group], bool]
    inherit: Callable[[Tensor], Tensor] = lambda rows: core.inherited(rows, 0, 1)

    def of(self, entries: MutableMapping[str, Tensor], parameter: Tensor, group: Group) -> Tensor:
        """Return a parameter's tensor, row-major; create it where there is none.

        Args:
            entries: the parameter's state.
            parameter: whose shape and device it has.
            group: the parameter's.

        Raises:
            RuntimeError: if it has another shape.
        """
        value, dtype = entries.get(self.name), self.dtype(group)
        if value is None:
            value = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        elif value.shape != parameter.shape:
            raise RuntimeError(
                f"the {self.name} of a parameter of shape {tuple(parameter.shape)} must have its shape, got "
                f"{tuple(value.shape)}: load what gather_state returned, not the state_dict() of one rank of a node"
            )
        elif value.dtype is not dtype or not value.is_contiguous() or not is_plain(value):
            value = plain(value, f"the {self.name} of a parameter").to(dtype).contiguous()
        entries[self.name] = value
        return value

    def inherited(self, rows: Tensor) -> Tensor:
        """Return what a worker goes on with, of the dtype of the values that it replaces, shape (workers, …)."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return self.inherit(wide).to(rows.dtype)  # one that is narrower rounds once


MOMENTUM = Entry(
    "momentum",
    private=True,
    dtype=lambda group: group.get("momentum_dtype") or torch.float32,
    needed=lambda group: bool(group["betas"][0] > 0),  # else c = g, and it would never be read
)
"""`m`, each worker's own."""

VERDICT_MOMENTUM = Entry(
    "verdict_momentum",
    private=False,
    dtype=lambda group: torch.float32,
    needed=lambda group: bool(group["verdict_momentum"]),
)
"""`u`, the same on all."""

OUTER_MOMENTUM = Entry(
    "outer_momentum",
    private=False,
    dtype=lambda group: torch.float32,
    needed=lambda group: bool(group.get("outer_momentum")),  # of rounds of local steps alone
)
"""`u` of local steps, the same on all."""

ENTRIES = [MOMENTUM, VERDICT_MOMENTUM, OUTER_MOMENTUM]


def find(name: str) -> Entry | None:
    """Return the entry of a name, None where the table has none."""
    return next((entry for entry in ENTRIES if entry.name == name), None)


def private(group: Group) -> list[Entry]:
    """Return the entries of a parameter group of which each worker has its own."""
    return [entry for entry in ENTRIES if entry.private and entry.needed(group)]


def any_private(groups: Iterable[Group]) -> bool:
    """Tell whether workers differ in anything."""
    return any(private(group) for group in groups)
