"""Torch: one worker, whose step runs operation by operation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import torch
from keras import ops

from signsgd_core import TILE

from .base import Backend, Product

Tensor = Any
Variable = Any


class Torch(Backend):
    """The torch backend."""

    def tiles(self, *arrays: Any, whole: bool = False) -> Iterator[tuple[Any, ...]]:
        """Yield corresponding tiles: on a CPU flat views of a size that stays in the core's own cache, or the whole."""
        tensors = [array.value if isinstance(array, keras.Variable) else array for array in arrays]
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
        given = [tensor for tensor in tensors if tensor is not None]
        if whole or given[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in given):
            yield tuple(tensors)
            return
        flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
        for lo in range(0, given[0].numel(), TILE):
            yield tuple(None if tensor is None else tensor[lo : lo + TILE] for tensor in flat)

    def write(self, target: Tensor, value: Tensor) -> None:
        """Set a tile in place."""
        target.copy_(value)

    def descend(self, target: Tensor, direction: Tensor, rate: Tensor) -> None:
        """Take ``rate·direction`` from a tile in place."""
        target.sub_(rate * direction)

    def indices(self, chosen: npt.NDArray[np.int32]) -> Any:
        """Return indices as a tensor."""
        return ops.convert_to_tensor(chosen)

    def hessian_product(self, loss: Callable[[Any], Tensor], model: Any, variables: Sequence[Variable]) -> Product:
        """Return the derivative of the gradient, along a vector."""
        values = [v.value for v in variables]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model), values, create_graph=True, materialize_grads=True)
        bent = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]
        if not bent:
            return lambda z: [None] * len(z)
        return lambda z: torch.autograd.grad(
            [gradients[k] for k in bent], values, [z[k] for k in bent], retain_graph=True, materialize_grads=True
        )
