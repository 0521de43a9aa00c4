"""Step 2b on Keras' variables: which of them are matrices, in which layout, and their polar factors."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

import signsgd_core as core
from signsgd_core import Matrices
from signsgd_core.polar import NEGLIGIBLE

from .variables import path

Tensor = Any
Variable = Any
Shape = tuple[int, ...]

_NO_MATRICES = ("alpha", "beta", "bias", "gamma", "scale")
"""Variables of these names are never matrices: attention and recurrent layers have biases of two dimensions."""

_NO_MATRICES_WITHIN = ("depthwise", "transpose")
"""Nor are those with one of these in their path: Keras keeps a transposed convolution's kernel as (h, w, out, in)."""

_PROJECTIONS = ("query", "key", "value", "gate")
"""Layers within an attention layer whose kernel has the shape (dim, heads, size of a head)."""


@dataclass(frozen=True)
class Selection:
    """Which variables of a model are orthogonalized, with the habits of `keras.optimizers.Muon`.

    Attributes:
        orthogonalize: whether any is.
        exclude_layers: regular expressions; a variable in whose path one is found is none.
        exclude_embeddings: whether variables with "embedding" in their path are none.
    """

    orthogonalize: bool
    exclude_layers: tuple[str, ...]
    exclude_embeddings: bool

    def matrices(self, variables: Sequence[Variable]) -> list[Matrices | None]:
        """Return how each variable is a matrix, None where it is not one or is excluded."""
        shapes = {_name(variable): tuple(variable.shape) for variable in variables}
        return [
            None if self._is_excluded(_name(variable)) else _matrix(_name(variable), tuple(variable.shape), shapes)
            for variable in variables
        ]

    def check(self, variables: Sequence[Variable], matrices: Sequence[Matrices | None]) -> None:
        """Make sure that there is something to orthogonalize, and warn of keywords that exclude nothing.

        Raises:
            ValueError: if there is nothing.
        """
        if self.orthogonalize and matrices and not any(matrices):
            raise ValueError(
                f"orthogonalize=True found nothing to orthogonalize: none of the {len(matrices)} variables is a matrix "
                f"or a kernel that is not excluded by exclude_layers={list(self.exclude_layers)} or "
                f"exclude_embeddings={self.exclude_embeddings}: exclude less, or take orthogonalize=False"
            )
        for keyword in self.exclude_layers if self.orthogonalize else ():
            if not any(re.search(keyword, _name(variable)) for variable in variables):
                warnings.warn(
                    f"exclude_layers={[keyword]!r} excludes nothing: no variable's path has it. Name the layer, "
                    'as in Dense(10, name="logits"); optimizer.orthogonalized lists what is orthogonalized',
                    stacklevel=2,
                )

    def _is_excluded(self, name: str) -> bool:
        if not self.orthogonalize or (self.exclude_embeddings and "embedding" in name.lower()):
            return True
        return any(re.search(keyword, name) for keyword in self.exclude_layers)


@dataclass(frozen=True)
class NewtonSchulz:
    """How polar factors are computed.

    Attributes:
        steps: iterations.
        coefficients: of each.
    """

    steps: int
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Polar:
    """The polar factor of one variable's direction.

    Attributes:
        matrix: how the variable is one; in Keras the columns are the first dimensions and the rows the last.
        by: how it is computed.
    """

    matrix: Matrices
    by: NewtonSchulz

    def __call__(self, c: Tensor) -> Tensor:
        """Return the polar factor, near ``U·Vᵀ`` of the singular value decomposition, as `signsgd_core.polar` does.

        Args:
            c: a direction, float32 and finite, of the variable's shape.
        """
        _, rows, fan_in = self.matrix
        if rows * fan_in == 0:
            return c
        x = ops.reshape(c, (fan_in, rows))  # the matrix transposed, whose factor is the factor transposed
        x = _divided(x, ops.max(ops.abs(x)))  # first by the largest: squares neither overflow nor vanish
        x = ops.hard_shrink(_divided(x, ops.sqrt(ops.sum(ops.square(x)))), NEGLIGIBLE)
        tall = fan_in > rows
        x = core.newton_schulz(ops.transpose(x) if tall else x, self.by.steps, self.by.coefficients, ops.transpose)
        return ops.reshape(ops.transpose(x) if tall else x, c.shape)


def _name(variable: Variable) -> str:
    return path(variable).split(":")[0]  # TensorFlow's own names end in ":0"


def _matrix(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> Matrices | None:
    """Return how a variable is a matrix, None where it is none.

    Args:
        name: its path.
        shape: its shape.
        shapes: path -> shape, of all variables.
    """
    *layers, last = name.split("/")
    if not 2 <= len(shape) <= 4 or last in _NO_MATRICES or any(kind in name.lower() for kind in _NO_MATRICES_WITHIN):
        return None
    if len(shape) > 2 and _is_vector_or_table(last, shape):
        return None
    if last == "kernel" and _is_projection(layers, shape, shapes):
        return Matrices(1, math.prod(shape[1:]), shape[0])
    return Matrices(1, shape[-1], math.prod(shape[:-1]))


def _is_vector_or_table(last: str, shape: Shape) -> bool:
    """Tell whether a variable of three or four dimensions is less than a matrix, or a table as an embedding is.

    A kernel may have a first dimension of 1, as those of pointwise convolutions have.
    """
    is_single_filter = shape[-1] == 1  # of depthwise kernels, too, whatever the layer's name
    is_vector = math.prod(shape) == max(shape)  # a class token, or the scale of a layer
    is_table = shape[0] == 1 and not last.endswith("kernel")  # positions, added to a batch
    return is_single_filter or is_vector or is_table


def _is_projection(layers: Sequence[str], shape: Shape, shapes: Mapping[str, Shape]) -> bool:
    """Tell whether a kernel is one of (dim, heads, size), by its own layer alone: others may be frozen.

    The bias of such a layer has the shape (heads, size), that of a convolution of this name one dimension. Where there
    is none, `dim` is at least `heads`; of other kernels, such as (heads, dim, size), the first is mostly less.
    """
    if len(shape) != 3 or not layers or layers[-1] not in _PROJECTIONS:
        return False
    bias = shapes.get("/".join([*layers, "bias"]))
    return shape[0] >= shape[1] if bias is None else bias == shape[1:]


def _divided(x: Tensor, norm: Tensor) -> Tensor:
    return x / ops.where(ops.equal(norm, 0), ops.ones_like(norm), norm)
