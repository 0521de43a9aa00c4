"""JAX: one worker, whose step is compiled as a whole."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy.typing as npt

from .base import Backend, GradientRows, Product

Tensor = Any
Variable = Any
Array = npt.NDArray[Any]


class Jax(Backend):
    """The JAX backend."""

    def is_compiled(self) -> bool:
        """Return True: Keras compiles every step."""
        return True

    def gradient_rows(self, model: Any, samples: int, coordinates: int) -> GradientRows:
        """Return rows that a compiled step hands out."""
        return _Rows(samples)

    def hessian_product(self, loss: Callable[[Any], Tensor], model: Any, variables: Sequence[Variable]) -> Product:
        """Return the linearized gradient."""

        def stateless(values: Sequence[Tensor]) -> Tensor:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return loss(model)

        product: Product = jax.linearize(jax.grad(stateless), [v.value for v in variables])[1]
        return product


class _Rows(GradientRows):
    """Handed out of the compiled step, which goes on."""

    def put(self, row: Callable[[], Tensor]) -> None:
        def arrived(found: Tensor) -> None:
            GradientRows.put(self, lambda: found)

        jax.debug.callback(arrived, row())

    def take(self) -> list[Array]:
        jax.effects_barrier()  # type: ignore[no-untyped-call]
        return super().take()
