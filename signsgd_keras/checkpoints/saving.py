"""The state of a `Signum` into and out of Keras' stores and lists of arrays, with the rows of all replicas."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import signsgd_core as core

from .. import _compat, state
from ..backend import current
from . import origin

Variable = Any
Array = npt.NDArray[Any]
Optimizer = origin.Optimizer


def save(optimizer: Optimizer, store: Any) -> None:
    """Write the state; on several workers all of them must call it, since each has rows of its own.

    Args:
        optimizer: built.
        store: where Keras wants it, number of the variable -> array.
    """
    for i, variable in enumerate(optimizer.variables):
        store[str(i)] = current().read(variable)
    store[origin.MARK] = origin.mark(optimizer)


def load(optimizer: Optimizer, store: Any) -> None:
    """Read the state, also of another number of replicas, by the rule of each entry of the table.

    Args:
        optimizer: that has as many variables as were saved; else nothing is loaded, with a warning, as Keras does.
        store: what `save` wrote, or an earlier version, which left no mark.

    Raises:
        ValueError: if it is another optimizer's state, a Signum's of other settings, or of a variable with another
            shape; then nothing was loaded.
    """
    try:
        is_known = origin.check_store(optimizer, store)
    except ValueError as error:
        if _holds(optimizer, store):
            raise ValueError(
                f"{error}. But Keras' LossScaleOptimizer copies before it asks: make a new optimizer"
            ) from error
        raise
    saved = len(store.keys()) - (origin.MARK in store.keys())  # noqa: SIM118  Keras' stores are no dicts
    if saved != len(optimizer.variables):
        warn_of_skipping(optimizer, saved)
        return
    take(optimizer, [np.asarray(store[str(i)]) for i in range(saved)])
    if not is_known:
        origin.warn_of_unknown(optimizer, _compat.saved_name(store))


def warn_of_skipping(optimizer: Any, saved: int) -> None:
    """Warn that nothing is loaded into an optimizer, and why.

    Args:
        optimizer: a `Signum`, or a `LossScaleOptimizer`.
        saved: how many variables the file has of it.
    """
    why = (
        f"it has {len(optimizer.variables)} variables whereas the saved optimizer has {saved} variables: "
        "the saved one was built for other variables, or only one of the two has a LossScaleOptimizer around it"
    )
    if saved == 0:
        why = "the file has no optimizer state, as that of a model without compile()"
    elif not optimizer.built:
        why = "it is not built yet: call optimizer.build(model.trainable_variables) before you load"
    warnings.warn(f"Skipping variable loading for optimizer '{optimizer.name}', because {why}", stacklevel=4)


def take(optimizer: Optimizer, values: Sequence[Array]) -> None:
    """Go on from the values of all variables, in their order.

    Args:
        optimizer: built.
        values: of private variables also rows of any number of replicas.

    Raises:
        ValueError: if one does not fit; then nothing was changed.
    """
    origin.check_values(optimizer, values)
    variables = optimizer.variables
    rows = [_rows(i, variable, value) for i, (variable, value) in enumerate(zip(variables, values, strict=True))]
    for variable, row in zip(variables, rows, strict=True):
        entry = state.entry_of(variable)
        current().inherit(variable, row, core.redistribute if entry is None else entry.inherit)


def set_weights(optimizer: Optimizer, weights: Sequence[Array]) -> None:
    """Set all variables, and warn where momenta of other replicas may be missing.

    Args:
        optimizer: built.
        weights: of all variables, in their order; of private ones also rows of all replicas.

    Raises:
        ValueError: if there are not as many as variables, or one does not fit; then nothing was changed.
    """
    if len(weights) != len(optimizer.variables):
        raise ValueError(f"{optimizer.name!r} has {len(optimizer.variables)} variables, got {len(weights)} weights")
    pairs = zip(optimizer.variables, weights, strict=True) if optimizer.replicas > 1 else ()
    single = [v.path for v, w in pairs if w.shape == v.shape and _is_private(v)]
    take(optimizer, weights)
    if single:
        warnings.warn(
            f"set_weights() gives all replicas the one value that it got for {single[0]}: if numpy() read it where "
            "there were several, it is replica 0's, and the momenta of the others are lost. Files that end in .keras "
            "or .weights.h5, and tf.train.Checkpoint, keep them",
            stacklevel=3,
        )


def _is_private(variable: Variable) -> bool:
    entry = state.entry_of(variable)
    return entry is not None and entry.private


def _rows(i: int, variable: Variable, saved: Array) -> Array:
    """Return what was saved of a variable as rows of the replicas that saved it, one where it is the same on all."""
    rows = saved if saved.ndim > len(variable.shape) else saved[None]
    if rows.shape[1:] != tuple(variable.shape):
        raise ValueError(
            f"optimizer variable {i}, {variable.path}, has shape {tuple(variable.shape)} and the saved one "
            f"{saved.shape}: build the model that was saved; nothing was loaded into the optimizer"
        )
    return rows


def _holds(optimizer: Optimizer, store: Any) -> bool:
    """Tell whether an optimizer around this one has set the variables to the stored values, which Keras' own does."""
    values = {str(i): variable.numpy() for i, variable in enumerate(optimizer.variables)}
    return values.keys() == set(store.keys()) and all(np.array_equal(v, store[key]) for key, v in values.items())
