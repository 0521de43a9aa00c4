"""Sharded parameters: where a DTensor's memory is on this rank, and its state, placed as the parameter is.

A rank reads and writes its local shard alone, so an elementwise step needs nothing of the other ranks of the mesh.
"""

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from . import _compat
from .memory import check_memory
from .views import FlatView

State = MutableMapping[Tensor, Any]


def local(tensor: Tensor) -> Tensor:
    """Return the memory that a tensor has on this rank: the local shard of a DTensor, any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return _compat.arrived(tensor.to_local())


def view(parameter: Tensor, group: dict[str, Any], state: State, inverse_scale: Tensor | None = None) -> FlatView:
    """Return what this rank holds of a parameter, as a flat view.

    Args:
        parameter: a DTensor, or any other tensor, which a rank holds as a whole.
        group: the parameter group that it belongs to.
        state: the optimizer's.
        inverse_scale: factor on the gradient, where a gradient scaler asks for one.
    """
    gradient = parameter.grad
    if not isinstance(parameter, DTensor):
        return FlatView(parameter, group, state, gradient is not None, inverse_scale)
    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # a sum still to be taken
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    shard, sent = local(parameter), None if gradient is None else local(gradient)
    entries = {shard: _LocalEntries(state, parameter)}
    return FlatView(shard, group, entries, sent is not None, inverse_scale, sent=sent, owner=parameter)


def check_parameter(parameter: Tensor, name: str) -> None:
    """Make sure that a parameter has memory on this rank that holds its values, or a shard of them.

    Raises:
        TypeError: if not.
    """
    if isinstance(parameter, DTensor) and any(placement.is_partial() for placement in parameter.placements):
        raise TypeError(
            f"{name} is a DTensor placed as {_words(parameter)}, of which no rank has the values: redistribute it as "
            "Shard or Replicate"
        )
    check_memory(local(parameter), name)


def check_whole(parameter: Tensor, name: str, who: str, remedy: str) -> None:
    """Make sure that this rank holds a parameter as a whole.

    Args:
        parameter: any.
        name: of it.
        who: needs it whole, for the error.
        remedy: what to do otherwise.

    Raises:
        ValueError: if it is cut among ranks.
    """
    if isinstance(parameter, DTensor) and not all(placement.is_replicate() for placement in parameter.placements):
        raise ValueError(f"{who} needs whole tensors, and {name} is cut among ranks as {_words(parameter)}: {remedy}")


def refuse_sharded(optimizer: Optimizer, who: str, remedy: str) -> None:
    """Make sure that an optimizer has no DTensor.

    Args:
        optimizer: any.
        who: cannot take one, for the error.
        remedy: what to do otherwise.

    Raises:
        TypeError: if it has.
    """
    for k, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(p, DTensor):
            raise TypeError(
                f"{who} takes ordinary tensors, and parameter {k} is a DTensor placed as {_words(p)}: {remedy}"
            )


def refuse_sharded_model(model: nn.Module, who: str, remedy: str) -> None:
    """Make sure that a model that is to be wrapped in DDP has no DTensor, at which DDP ends with words of its own.

    Args:
        model: any.
        who: wraps it, for the error.
        remedy: what to do otherwise.

    Raises:
        TypeError: if it has.
    """
    for name, p in sharded_by_name(model)[:1]:
        raise TypeError(f"{who} takes ordinary models, and {name} is a DTensor placed as {_words(p)}: {remedy}")


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def sharded(parameters: Iterable[Tensor]) -> list[DTensor]:
    """Return those parameters that are DTensors."""
    return [p for p in parameters if isinstance(p, DTensor)]


def sharded_by_name(model: nn.Module) -> list[tuple[str, DTensor]]:
    """Return a model's DTensors with their names."""
    return [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]


def placement(parameter: Tensor) -> str:
    """Return how a parameter is placed, in words; nothing for an ordinary tensor."""
    return f", {_words(parameter)}" if isinstance(parameter, DTensor) else ""


def _words(parameter: DTensor) -> str:
    names = parameter.device_mesh.mesh_dim_names or range(parameter.device_mesh.ndim)
    return ", ".join(f"{p} over {name!r}" for name, p in zip(names, parameter.placements, strict=True))


class _LocalEntries(MutableMapping[str, Tensor]):
    """The state of a DTensor as this rank's shards. The optimizer keeps DTensors, placed as the parameter is."""

    def __init__(self, state: State, parameter: DTensor) -> None:
        self._state, self._parameter = state, parameter

    def __getitem__(self, name: str) -> Tensor:
        return local(self._state.get(self._parameter, {})[name])

    def __setitem__(self, name: str, value: Tensor) -> None:
        p, kept = self._parameter, self._state[self._parameter]
        if name not in kept or local(kept[name]) is not value:
            kept[name] = DTensor.from_local(
                value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )

    def __delitem__(self, name: str) -> None:
        del self._state[self._parameter][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.get(self._parameter, {}))

    def __len__(self) -> int:
        return len(self._state.get(self._parameter, {}))
