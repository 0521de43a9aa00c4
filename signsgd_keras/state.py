"""The optimizer's state: what is the same on all replicas, and what each has its own; in memory and in a file."""

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

import signsgd_core as core

if TYPE_CHECKING:
    from .optimizer import Signum

Variable = Any

NAMES = ("momentum", "gradient_accumulator", "verdict_momentum")
"""Of what there is of each model variable; the last is the same on all replicas."""


def create(optimizer: "Signum", reference: Variable, name: str, initializer: Any) -> Variable:
    """Return a new variable of the optimizer, of a model variable's shape; momenta are float32 whatever its dtype.

    Args:
        optimizer: under construction.
        reference: the model variable.
        name: one of `NAMES`.
        initializer: of its value.
    """
    private = optimizer.replicas > 1 and name != "verdict_momentum"
    return keras.Variable(
        initializer=initializer,
        shape=reference.shape,
        dtype=reference.dtype if name == "gradient_accumulator" else "float32",
        trainable=False,
        **placement(private),
        name=f"{getattr(reference, 'path', reference.name).replace('/', '_')}_{name}",
        layout=getattr(reference, "_layout", None),
    )


def placement(private: bool) -> dict[str, str]:
    """Return the arguments of a `keras.Variable` of which each replica has its own, or all the same."""
    if private:
        return {"aggregation": "only_first_replica", "synchronization": "on_read"}
    return {"aggregation": "none", "synchronization": "auto"}


def save(optimizer: "Signum", store: Any) -> None:
    """Write the state; on several workers all of them must call it, since each has rows of its own.

    Args:
        optimizer: built.
        store: where Keras wants it, number of the variable -> array.
    """
    for i, variable in enumerate(optimizer.variables):
        store[str(i)] = read(optimizer, variable)


def load(optimizer: "Signum", store: Any) -> None:
    """Read the state, also of another number of replicas, by the rule of `signsgd_core.redistribute`.

    Args:
        optimizer: built, with as many variables as were saved.
        store: what `save` wrote.

    Raises:
        ValueError: if a variable has another shape than was saved; then nothing was loaded.
    """
    fitting = [
        _fit(optimizer, i, variable, np.asarray(store[str(i)])) for i, variable in enumerate(optimizer.variables)
    ]
    for variable, rows in zip(optimizer.variables, fitting, strict=True):
        write(optimizer, variable, rows)


def read(optimizer: "Signum", variable: Variable) -> npt.NDArray[Any]:
    """Return a variable's value, or the rows of all replicas where each has its own; all workers must call it."""
    return optimizer.voter.gather(variable) if _is_private(variable) else variable.numpy()  # type: ignore[no-any-return]


def write(optimizer: "Signum", variable: Variable, rows: npt.NDArray[Any]) -> None:
    """Set a variable to the first row, or where each replica has its own, each to the replica's row."""
    if _is_private(variable):
        optimizer.voter.scatter(variable, rows)
    else:
        variable.assign(rows[0])


def _fit(optimizer: "Signum", i: int, variable: Variable, saved: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return what was saved of a variable as one row for each replica that has its own."""
    rows = saved if saved.ndim > len(variable.shape) else saved[None]
    if rows.shape[1:] != tuple(variable.shape):
        raise ValueError(
            f"optimizer variable {i}, {variable.path}, has shape {tuple(variable.shape)} and the saved one "
            f"{saved.shape}: build the model that was saved; nothing was loaded into the optimizer"
        )
    return core.redistribute(rows, optimizer.replicas if _is_private(variable) else 1)


def _is_private(variable: Variable) -> bool:
    return bool(variable.synchronization == "on_read")
