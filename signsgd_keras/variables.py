"""Model variables and their gradients, whichever backend made them: names, and what they must be."""

from collections.abc import Sequence
from typing import Any

import keras

Tensor = Any
Variable = Any


def path(variable: Variable) -> str:
    """Return the path of a Keras variable, the name of a native one."""
    return str(variable.path if isinstance(variable, keras.Variable) else variable.name)


def native(variable: Variable) -> Any:
    """Return the backend's variable of a Keras variable; itself, if it is one already."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def is_overwritten(variable: Variable) -> bool:
    """Tell whether a variable's "gradient" is its next value, which Keras writes into it: a scale of float8 layers."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def check_real(variables: Sequence[Variable]) -> None:
    """Make sure that all variables are real: a complex number has no sign.

    Raises:
        ValueError: if not.
    """
    for variable in variables:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if dtype.startswith("complex"):
            raise ValueError(
                f"{path(variable)} is {dtype}, and a complex number has no sign: make two "
                "variables of its real and its imaginary part"
            )


def check_shapes(gradients: Sequence[Tensor], variables: Sequence[Variable]) -> None:
    """Make sure that gradients have the shapes of their variables, as far as these are known.

    Raises:
        ValueError: if not: a ballot has one bit for each coordinate of the variable.
    """
    for gradient, variable in zip(gradients, variables, strict=True):
        found, shape = gradient.shape, variable.shape
        if not (found.is_compatible_with(shape) if hasattr(found, "is_compatible_with") else tuple(found) == shape):
            raise ValueError(
                f"the gradient of {path(variable)} has shape {tuple(found)} and the variable "
                f"{tuple(shape)}: hand apply() gradients in the order of their variables, and let a custom gradient "
                "return what it is a gradient of"
            )
