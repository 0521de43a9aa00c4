"""What a backend may do its own way, and how it is done by `keras.ops` where it does not."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

Tensor = Any
Variable = Any
Array = npt.NDArray[Any]
Inherit = Callable[[Array, int], Array]
"""Takes rows of the old replicas and the number of the new ones, and returns their rows."""

Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""Takes a tensor for each variable and returns the Hessian's product with them, None where it is zeros."""


class Workers(Protocol):
    """Those that an optimizer steps with: `OneWorker`, or `signsgd_keras.replicas.Replicas`.

    Attributes:
        count: of them.
    """

    count: int

    def check_build(self, label: str) -> None:
        """Make sure, when the optimizer of that name is built, that it can step; ValueError if not."""

    def check_step(self) -> None:
        """Make sure, before each step, that it can be taken; ValueError if not."""

    def check_condition(self) -> None:
        """Make sure that a step of one worker may be taken under a condition; ValueError if not."""


class OneWorker:
    """The only worker, on a backend that has no vote."""

    count = 1

    def check_build(self, label: str) -> None:
        """Warn where the optimizer's devices have one gradient, the mean of theirs.

        Args:
            label: the optimizer's name.
        """
        shared = keras.distribution.distribution()
        if shared is not None and shared.device_mesh.devices.size > 1:
            warnings.warn(
                f"{label!r} is one worker under keras.distribution.{type(shared).__name__}, whose "
                f"{shared.device_mesh.devices.size} devices take the sign of one mean gradient: nobody votes. A vote "
                "needs KERAS_BACKEND=tensorflow and tf.distribute",
                stacklevel=3,
            )

    def check_step(self) -> None:
        """Do nothing: it can step anywhere."""

    def check_condition(self) -> None:
        """Do nothing: it can step under any condition."""


class Backend:
    """Keras' backend, by `keras.ops`.

    Args:
        name: as `keras.backend.backend()` returns it.

    Attributes:
        can_vote: whether it has several replicas.
    """

    can_vote = False

    def __init__(self, name: str) -> None:
        self.name = name

    def workers(self, optimizer: Any) -> Workers:
        """Return those that an optimizer steps with."""
        return OneWorker()

    def private_variable(self, workers: Workers, inherit: Inherit, **options: Any) -> Variable:
        """Return a new variable of which each worker has its own.

        Args:
            workers: that have it.
            inherit: what new workers go on with.
            **options: of `keras.Variable`.
        """
        return keras.Variable(**options)

    def read(self, variable: Variable) -> Array:
        """Return a variable's value, or the rows of all workers where several have their own."""
        return variable.numpy()  # type: ignore[no-any-return]

    def inherit(self, variable: Variable, rows: Array, inherit: Inherit) -> None:
        """Go on from the rows of any number of workers."""
        variable.assign(inherit(rows, 1)[0])

    def dense(self, gradient: Tensor, variable: Variable) -> Tensor:
        """Return a gradient with an entry for every coordinate; an embedding's has some rows only."""
        return ops.convert_to_tensor(gradient, sparse=False)

    def tiles(self, *arrays: Any, whole: bool = False) -> Iterator[tuple[Any, ...]]:
        """Yield corresponding tiles of variables and tensors of one shape, each worked on by itself; None stays None.

        The compiler or the device does best with the whole; `whole` asks for it where a backend would rather cut.
        """
        yield arrays

    def is_compiled(self) -> bool:
        """Tell whether a compiler sees the step as a whole."""
        return False

    def finite(self, gradient: Tensor) -> Tensor:
        """Return a gradient with every NaN and ±Inf replaced by 0 (step 1)."""

        def replaced() -> Tensor:
            return ops.where(ops.isfinite(gradient), gradient, ops.zeros_like(gradient))

        if self.is_compiled():
            return replaced()  # the compiler makes it part of what follows
        return ops.cond(ops.isfinite(ops.sum(gradient)), lambda: gradient, replaced)  # reads once where all is well

    def write(self, target: Variable, value: Tensor) -> None:
        """Set a variable, or a tile of one."""
        target.assign(value)

    def descend(self, target: Variable, direction: Tensor, rate: Tensor) -> None:
        """Take ``rate·direction`` from a variable, or from a tile of one."""
        target.assign_sub(rate * direction)

    def indices(self, chosen: npt.NDArray[np.int32]) -> Any:
        """Return indices of coordinates in the form that `keras.ops.take` is fastest with."""
        return chosen  # a constant, for faster code of compilers

    def gradient_rows(self, model: Any, samples: int, coordinates: int) -> "GradientRows":
        """Return an empty store of `samples` rows of a model's gradients, each of so many coordinates."""
        return GradientRows(samples)

    def hessian_product(self, loss: Callable[[Any], Tensor], model: Any, variables: Sequence[Variable]) -> Product:
        """Return the product with the Hessian of a model's loss by these variables, at their values now.

        Raises:
            NotImplementedError: on a backend without derivatives.
        """
        raise NotImplementedError(f"Keras' {self.name!r} backend has no derivatives")


class GradientRows:
    """Rows of gradients, kept on their device until a monitor takes them.

    Args:
        samples: at most so many rows between one `take` and the next.

    Attributes:
        replicas: whose gradients there are, on all workers.
        is_first_worker: whether this worker is the one that writes.
    """

    replicas, is_first_worker = 1, True

    def __init__(self, samples: int) -> None:
        self._samples, self._kept = samples, list[Any]()

    def put(self, row: Callable[[], Tensor]) -> None:
        """Keep what `row` returns, if there is still room; called where the optimizer applies gradients."""
        if len(self._kept) < self._samples:
            self._kept.append(row())

    def take(self) -> list[Array]:
        """Return the rows of each replica of this worker, and make room."""
        rows, self._kept = self._kept, []
        return [np.stack([ops.convert_to_numpy(row) for row in rows])] if rows else [np.zeros((0, 1))]

    def gather(self, values: list[Array]) -> Array:
        """Return the values of the replicas of all workers, given one for each replica of this worker."""
        return np.stack(values)
