"""The optimizer's state: what is the same on all replicas, and what each has its own; in memory and in a file."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

import signsgd_core as core

from . import blocks, internals, origin

if TYPE_CHECKING:
    from .optimizer import Signum

Variable = Any
Array = npt.NDArray[Any]

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
    options = {
        "initializer": initializer,
        "shape": reference.shape,
        "dtype": reference.dtype if name == "gradient_accumulator" else "float32",
        "trainable": False,
        "name": f"{blocks.path(reference).replace('/', '_').replace(':', '_')}_{name}",
        "layout": getattr(reference, "_layout", None),
    }
    return keras.Variable(**options) if name == "verdict_momentum" else own(optimizer.replicas, **options)


def own(replicas: int, inherit: Any = core.redistribute, **options: Any) -> Variable:
    """Return a new variable of which each replica has its own.

    Args:
        replicas: how many there are.
        inherit: rows of the old replicas, number of the new ones -> their rows.
        **options: of `keras.Variable`.
    """
    if keras.backend.backend() != "tensorflow":
        return keras.Variable(**options)
    from .own import Own

    if replicas > 1:
        options |= {"aggregation": "only_first_replica", "synchronization": "on_read"}
    return Own(inherit, **options)


def save(optimizer: "Signum", store: Any) -> None:
    """Write the state; on several workers all of them must call it, since each has rows of its own.

    Args:
        optimizer: built.
        store: where Keras wants it, number of the variable -> array.
    """
    for i, variable in enumerate(optimizer.variables):
        store[str(i)] = read(variable)
    store[origin.MARK] = origin.mark(optimizer)


def load(optimizer: "Signum", store: Any) -> None:
    """Read the state, also of another number of replicas, by the rule of `signsgd_core.redistribute`.

    Args:
        optimizer: that has as many variables as were saved; else nothing is loaded, as Keras has it.
        store: what `save` wrote, or an earlier version, which left no mark.

    Raises:
        ValueError: if it is another optimizer's state, a Signum's of other settings, or of a variable with another
            shape; then nothing was loaded.
    """
    try:
        told = origin.check_store(optimizer, store)
    except ValueError as error:
        if _holds(optimizer, store):
            raise ValueError(
                f"{error}. But Keras' LossScaleOptimizer copies before it asks: make a new optimizer"
            ) from error
        raise
    saved = len(store.keys()) - (origin.MARK in store.keys())  # noqa: SIM118  Keras' stores are no dicts
    if saved != len(optimizer.variables):
        why = (
            "the saved one was built for other variables, or only one of the two has a LossScaleOptimizer around it"
            if optimizer.built
            else "it is not built yet: call optimizer.build(model.trainable_variables) before you load"
        )
        warnings.warn(
            f"Skipping variable loading for optimizer '{optimizer.name}', because it has {len(optimizer.variables)} "
            f"variables whereas the saved optimizer has {saved} variables: {why}",
            stacklevel=3,
        )
        return
    take(optimizer, [np.asarray(store[str(i)]) for i in range(saved)])
    if not told:
        origin.doubt(optimizer, internals.saved_name(store))


def take(optimizer: "Signum", values: Sequence[Array]) -> None:
    """Go on from the values of all variables, in their order.

    Args:
        optimizer: built.
        values: of what each replica has its own also rows of any number of replicas.

    Raises:
        ValueError: if one does not fit; then nothing was changed.
    """
    origin.check_values(optimizer, values)
    variables = optimizer.variables
    rows = [_rows(i, variable, value) for i, (variable, value) in enumerate(zip(variables, values, strict=True))]
    for variable, row in zip(variables, rows, strict=True):
        write(variable, row)


def set_weights(optimizer: "Signum", weights: Sequence[Array]) -> None:
    """Set all variables, and warn where momenta of other replicas may be missing.

    Args:
        optimizer: built.
        weights: of all variables, in their order; of what each replica has its own also rows of all.

    Raises:
        ValueError: if there are not as many as variables, or one does not fit; then nothing was changed.
    """
    if len(weights) != len(optimizer.variables):
        raise ValueError(f"{optimizer.name!r} has {len(optimizer.variables)} variables, got {len(weights)} weights")
    alone = [v.path for v, w in zip(optimizer.variables, weights, strict=True) if _is_private(v) and w.shape == v.shape]
    take(optimizer, weights)
    if alone:
        warnings.warn(
            f"set_weights() gives all replicas the one value that it got for {alone[0]}: if numpy() read it where "
            "there were several, it is replica 0's, and the momenta of the others are lost. Files that end in .keras "
            "or .weights.h5, and tf.train.Checkpoint, keep them",
            stacklevel=3,
        )


def read(variable: Variable) -> Array:
    """Return a variable's value, or the rows of all replicas where each has its own; all workers must call it."""
    return variable.rows() if _is_private(variable) else variable.numpy()  # type: ignore[no-any-return]


def write(variable: Variable, rows: Array) -> None:
    """Set a variable to the first row, or where each replica has its own, each to the replica's row."""
    if hasattr(variable, "take"):
        variable.take(rows)
    else:
        variable.assign(core.redistribute(rows, 1)[0])


def _rows(i: int, variable: Variable, saved: Array) -> Array:
    """Return what was saved of a variable as rows of the replicas that saved it, one where it is the same on all."""
    rows = saved if saved.ndim > len(variable.shape) else saved[None]
    if rows.shape[1:] != tuple(variable.shape):
        raise ValueError(
            f"optimizer variable {i}, {variable.path}, has shape {tuple(variable.shape)} and the saved one "
            f"{saved.shape}: build the model that was saved; nothing was loaded into the optimizer"
        )
    return rows


def _holds(optimizer: "Signum", store: Any) -> bool:
    """Tell whether an optimizer around this one has set the variables to what is stored, which Keras' own does."""
    own = {str(i): variable.numpy() for i, variable in enumerate(optimizer.variables)}
    return own.keys() == set(store.keys()) and all(np.array_equal(value, store[key]) for key, value in own.items())


def _is_private(variable: Variable) -> bool:
    return bool(variable.synchronization == "on_read")
