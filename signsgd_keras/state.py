"""The optimizers' state as one table: what there is, of which dtype, and whose it is.

Building, saving, the check of a file's origin, verification and the rule for another number of replicas read the table;
none of them names an entry of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

import signsgd_core as core

from .backend import Backend
from .variables import path

Variable = Any
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """One kind of variable that an optimizer keeps.

    Attributes:
        name: the end of the variables' paths.
        private: whether each replica has its own; else it is the same on all.
        dtype: what it is kept in; None is the dtype of the model variable that it belongs to, or what Keras asks for.
        inherit: rows of the old replicas, number of the new ones -> their rows.
        bound: no value is larger than this in magnitude, which tells a foreign array.
    """

    name: str
    private: bool = False
    dtype: str | None = None
    inherit: Callable[[Array, int], Array] = core.redistribute
    bound: float = float("inf")


@dataclass(frozen=True)
class Momentum(Entry):
    """An entry of each model variable that `Signum` makes itself, zeros at first.

    Attributes:
        attribute: of the optimizer, under which `tf.train.Checkpoint` keeps the list of them.
        needed: optimizer -> whether its settings need it.
    """

    attribute: str = ""
    needed: Callable[[Any], bool] = bool


ITERATION, LEARNING_RATE, AVERAGE = Entry("iteration"), Entry("learning_rate"), Entry("average")
"""Of Keras; `average` is the moving average of a model variable."""

GRADIENT_ACCUMULATOR = Entry("gradient_accumulator", private=True)
"""The sum of each replica's gradients since its last vote."""

MOMENTUM = Momentum(
    "momentum",
    private=True,
    dtype="float32",
    attribute="_momentums",
    needed=lambda signum: bool(signum.beta_1 > 0),  # else c = g, and it would never be read
)
"""`m`, each replica's own."""

VERDICT_MOMENTUM = Momentum(
    "verdict_momentum",
    dtype="float32",
    bound=1.0,
    attribute="_verdict_momentums",
    needed=lambda signum: bool(signum.verdict_momentum > 0),
)
"""`u`, the same on all."""

MOMENTA = (MOMENTUM, VERDICT_MOMENTUM)
SIGNUM = (ITERATION, LEARNING_RATE, AVERAGE, GRADIENT_ACCUMULATOR, *MOMENTA)
"""All that a `Signum` may keep."""

LOSS_SCALE = (
    Entry("step_counter", private=True, inherit=np.resize),
    Entry("dynamic_scale", private=True, inherit=np.resize),  # a mean would be no power of two
)
"""All that a `LossScaleOptimizer` keeps of its own: each replica's scale, and steps since it changed."""


def named(name: str | None, entries: Sequence[Entry] = SIGNUM) -> Entry | None:
    """Return the entry of a name, None where the table has none."""
    return next((entry for entry in entries if entry.name == name), None)


def find(path: str) -> Entry | None:
    """Return the entry of a `Signum`'s variable, from its path; None where the table has none.

    Example:
        >>> [entry and entry.name for entry in map(find, ("signum/kernel_verdict_momentum", "nadam/u_product"))]
        ['verdict_momentum', None]
    """
    last = path.rsplit("/", 1)[-1]
    found = [entry for entry in SIGNUM if f"_{last}".endswith(f"_{entry.name}")]
    return max(found, key=lambda entry: len(entry.name), default=None)


def entry_of(variable: Variable) -> Entry | None:
    """Return the entry of an optimizer's variable, None where the table has none.

    One that `create` made says so itself: the path of another, of a weight named "verdict", may end as its name does.
    """
    made: Entry | None = getattr(variable, "entry", None)
    return made or find(variable.path)


def create(backend: Backend, workers: Any, entry: Entry, **options: Any) -> Variable:
    """Return a new variable of an entry.

    Args:
        backend: of Keras.
        workers: among whom it is private, where it is.
        entry: of the table.
        **options: of `keras.Variable`.
    """
    options |= {"trainable": False}
    if entry.private:
        variable = backend.private_variable(workers, entry.inherit, **options)
    else:
        variable = keras.Variable(**options)
    variable.entry = entry
    return variable


def create_like(
    backend: Backend, workers: Any, entry: Entry, reference: Variable, initializer: Any = "zeros"
) -> Variable:
    """Return a new variable of an entry, of a model variable's shape.

    Args:
        backend: of Keras.
        workers: among whom it is private, where it is.
        entry: of the table.
        reference: the model variable.
        initializer: of its value.
    """
    return create(
        backend,
        workers,
        entry,
        initializer=initializer,
        shape=reference.shape,
        dtype=entry.dtype or reference.dtype,
        name=f"{path(reference).replace('/', '_').replace(':', '_')}_{entry.name}",
        layout=getattr(reference, "_layout", None),
    )
