"""Loading an optimizer's state bit for bit, and what it may hold beside this rank's own."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .segments import momentum_dtype

OTHERS = "momenta_of_other_ranks"
"""Where a gathered state has them: parameter -> of shape (world_size − 1, *parameter.shape), rank 1 first."""

SHARDS = "ranks_with_momentum_shards"
"""Where the state of a sharded checkpoint has how many ranks wrote their momenta beside it."""

_ONLY_FIRST = (
    "this state holds the momenta of several ranks, of which rank 0's was loaded: to give every rank its own, load it "
    "with signsgd_lightning.scatter_state, or in Lightning under strategy='majority_vote'"
)
_NO_MOMENTA = (
    "this state is of a sharded checkpoint and its momenta start from zero: to give every rank its own, resume from "
    "the directory under strategy='majority_vote'"
)


def warn_of_others(state_dict: dict[str, Any]) -> None:
    """Say so where the caller of the caller loads a state of several ranks as if it were of one."""
    for entry, warning in ((OTHERS, _ONLY_FIRST), (SHARDS, _NO_MOMENTA)):
        if entry in state_dict:
            warnings.warn(warning, stacklevel=3)


@contextmanager
def uncast(optimizer: Optimizer) -> Iterator[None]:
    """While torch loads a state, which it casts to the parameters' dtypes, put back what was cast.

    Args:
        optimizer: whose ``state["momentum"]`` has a dtype of its own, and all other state float32.
    """
    loaded: dict[str, Any] = {}

    def keep(_: Optimizer, final: dict[str, Any]) -> None:
        loaded.update(final)

    def undo_cast(_: Optimizer) -> None:
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        for key, (p, group) in zip(keys, parameters, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = momentum_dtype(group) if name == "momentum" else torch.float32
                    optimizer.state[p][name] = value.detach().to(p.device, dtype, copy=True).contiguous()

    handles = [  # after the user's own hooks have changed what is loaded, before they see what was
        optimizer.register_load_state_dict_pre_hook(keep),
        optimizer.register_load_state_dict_post_hook(undo_cast, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
