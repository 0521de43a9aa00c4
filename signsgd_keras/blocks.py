"""What is done with variables and blocks of them: where a framework runs operation by operation, block by block."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from signsgd_core import BLOCK

Tensor = Any
Variable = Any


def split(*arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Yield corresponding blocks of variables and tensors of one size; None stays None.

    On the torch backend and a CPU these are flat views of a size that stays in the core's own cache; elsewhere the
    compiler or the device does better with the whole.

    Args:
        *arrays: variables or tensors of one shape, or None.
    """
    if keras.backend.backend() != "torch":
        yield arrays
        return
    tensors = [array.value if isinstance(array, keras.Variable) else array for array in arrays]
    tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in given):
        yield tuple(tensors)
        return
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for lo in range(0, given[0].numel(), BLOCK):
        yield tuple(None if tensor is None else tensor[lo : lo + BLOCK] for tensor in flat)


def path(variable: Variable) -> str:
    """Return the path of a Keras variable, the name of TensorFlow's."""
    return str(variable.path if isinstance(variable, keras.Variable) else variable.name)


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


def warn_of_means(name: str) -> None:
    """Warn where an optimizer's devices have one gradient, the mean of theirs.

    Args:
        name: of the optimizer.
    """
    shared = keras.distribution.distribution()
    if shared is not None and shared.device_mesh.devices.size > 1:
        warnings.warn(
            f"{name!r} is one worker under keras.distribution.{type(shared).__name__}, whose "
            f"{shared.device_mesh.devices.size} devices take the sign of one mean gradient: nobody votes. A vote needs "
            "KERAS_BACKEND=tensorflow and tf.distribute",
            stacklevel=3,
        )


def check_shapes(gradients: Sequence[Tensor], variables: Sequence[Variable]) -> None:
    """Make sure that gradients have their variables' shapes, as far as these are known: ballots go by coordinates.

    Raises:
        ValueError: if not.
    """
    for gradient, variable in zip(gradients, variables, strict=True):
        found, shape = gradient.shape, variable.shape
        if not (found.is_compatible_with(shape) if hasattr(found, "is_compatible_with") else tuple(found) == shape):
            raise ValueError(
                f"the gradient of {path(variable)} has shape {tuple(found)} and the variable "
                f"{tuple(shape)}: hand apply() gradients in the order of their variables, and let a custom gradient "
                "return what it is a gradient of"
            )


def dense(gradient: Tensor, variable: Variable) -> Tensor:
    """Return a gradient with an entry for every coordinate; an embedding's has some rows only."""
    if not hasattr(gradient, "dense_shape"):  # TensorFlow's IndexedSlices
        tensor = ops.convert_to_tensor(gradient, sparse=False)
        known = getattr(tensor.shape, "is_fully_defined", lambda: True)()  # TensorFlow learns some when it runs
        return tensor if known else ops.reshape(tensor, variable.shape)
    return ops.scatter(ops.expand_dims(gradient.indices, -1), gradient.values, variable.shape)


def finite(gradient: Tensor) -> Tensor:
    """Return the gradient with every NaN and ±Inf replaced by 0 (step 1)."""

    def replaced() -> Tensor:
        return ops.where(ops.isfinite(gradient), gradient, ops.zeros_like(gradient))

    if _compiled():
        return replaced()  # the compiler makes it part of what follows
    return ops.cond(ops.isfinite(ops.sum(gradient)), lambda: gradient, replaced)  # reads once where all is well


def write(target: Variable, value: Tensor) -> None:
    """Set a variable, or a block that `split` made of one."""
    if hasattr(target, "assign"):
        target.assign(value)
    else:
        target.copy_(value)


def descend(target: Variable, direction: Tensor, rate: Tensor) -> None:
    """Take ``rate·direction`` from a variable, or from a block that `split` made of one."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variable = target.value if isinstance(target, keras.Variable) else target
        # One pass over memory, where a product and a subtraction are two.
        tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=rate, delta=direction)
    elif hasattr(target, "assign_sub"):
        target.assign_sub(rate * direction)
    else:
        target.sub_(rate * direction)


def _compiled() -> bool:
    """Tell whether a compiler sees the step as a whole."""
    if keras.backend.backend() != "tensorflow":
        return bool(keras.backend.backend() == "jax")
    from .internals import in_xla

    return in_xla()
