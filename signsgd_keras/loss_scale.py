"""LossScaleOptimizer: under float16 every replica scales its loss by itself, and none waits for another."""

from typing import Any

import keras
import numpy as np
from keras import ops

from signsgd_core import check_count, check_factor

from . import _compat, backend, state
from .checkpoints import origin, saving
from .optimizer import Signum
from .variables import is_overwritten

Tensor = Any
Variable = Any

_NO_SCALE = (
    "the saved optimizer had no LossScaleOptimizer around it: load its state into what is within this one; nothing was "
    "loaded into the optimizer"
)


@keras.saving.register_keras_serializable(package="signsgd")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):  # type: ignore[misc]
    """Scale the loss of a `Signum` dynamically: each replica has its own scale, and no step is skipped.

    Keras' own ``LossScaleOptimizer`` takes gradients to be the same on all replicas and drops the step of all where the
    first replica's overflow. Gradients that are voted on differ: here an overflow halves the scale of the replica that
    had it, whose entries that are not finite count as 0 in its vote, and everybody takes the step. After
    `dynamic_growth_steps` steps in a row without an overflow a replica's scale is doubled. Gradients are divided by the
    scale before they are accumulated, clipped or taken into a momentum.

    No scale falls below 1, or below `initial_scale` where that is less: a replica that sees NaN for a while, whatever
    its scale, would else be left with one at which every later gradient is 0.

    Args:
        inner_optimizer: a `Signum`.
        initial_scale: Float. The scale to begin with.
        dynamic_growth_steps: Int. After how many steps without an overflow the scale is doubled.
        name: String. The name of the optimizer.

    Attributes:
        dynamic_scale: float32 scalar, each replica's own.
        step_counter: integer scalar, each replica's own: steps since its scale last changed.

    Raises:
        TypeError: if `inner_optimizer` is no `Signum`.
        ValueError: if `initial_scale` is not above 0, or `dynamic_growth_steps` no whole number of 1 or more.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
        >>> model.compile(optimizer=LossScaleOptimizer(Signum(learning_rate=1e-3)), loss="mse")
    """

    def __init__(
        self,
        inner_optimizer: Signum,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(inner_optimizer, Signum):
            raise TypeError(
                f"signsgd_keras.LossScaleOptimizer scales the loss of a Signum, got {type(inner_optimizer).__name__}: "
                "take keras.optimizers.LossScaleOptimizer for it"
            )
        check_factor("initial_scale", initial_scale)
        check_count("dynamic_growth_steps", dynamic_growth_steps, 1)
        super().__init__(inner_optimizer, initial_scale, dynamic_growth_steps, name, **kwargs)

    def build(self, var_list: list[Variable]) -> None:
        """Create each replica's scale, and what the inner optimizer needs.

        Args:
            var_list: the model's trainable variables.
        """
        if not self.built:
            super().build(var_list)

    def add_variable(
        self,
        shape: Any,
        initializer: Any = "zeros",
        dtype: Any = None,
        aggregation: str = "none",
        layout: Any = None,
        name: str | None = None,
    ) -> Variable:
        """Add a variable, private to each replica where the table of the state says so; arguments as in Keras."""
        entry = state.named(name, state.LOSS_SCALE)
        if entry is None:
            return super().add_variable(shape, initializer, dtype, aggregation, layout, name)
        with keras.name_scope(self.name, caller=self):
            variable = state.create(
                backend.current(),
                self.inner_optimizer.workers,
                entry,
                initializer=keras.initializers.get(initializer),
                shape=shape,
                dtype=dtype,
                layout=layout,
                name=name,
            )
        self._track_variable(variable)
        return variable

    def apply(self, grads: list[Tensor], trainable_variables: list[Variable] | None = None) -> None:
        """Take one step with this replica's gradients of its scaled loss, and adapt its scale.

        Args:
            grads: of the scaled loss, None where a variable has none.
            trainable_variables: theirs; where left out, those that the optimizer was built with.
        """
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables or ()))
        finite, scale = self.check_finite(grads), ops.convert_to_tensor(self.dynamic_scale)
        variables = _compat.trainable_variables(self) if trainable_variables is None else trainable_variables
        values = {k for k, variable in enumerate(variables) if is_overwritten(variable)}  # what has no scale
        unscaled = [g if g is None or k in values else ops.divide(g, scale) for k, g in enumerate(grads)]
        self.inner_optimizer.apply(unscaled, trainable_variables)
        self._adapt(finite, scale)

    def stateless_apply(
        self, optimizer_variables: list[Tensor], grads: list[Tensor], trainable_variables: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return variables and optimizer variables after a step, as JAX needs it."""
        return keras.optimizers.Optimizer.stateless_apply(  # type: ignore[no-any-return]
            self, optimizer_variables, grads, trainable_variables
        )

    def _checkpoint_adapter(self, path: str) -> Any:
        """Make sure, before `tf.train.Checkpoint` restores anything, that it is the state of such a pair."""
        origin.check_checkpoint(self.inner_optimizer, path)
        if not origin.has_loss_scale(path):
            raise ValueError(_NO_SCALE)
        return super()._checkpoint_adapter(path)

    def _adapt(self, finite: Tensor, scale: Tensor) -> None:
        grown = ops.logical_and(finite, ops.greater_equal(self.step_counter, self.dynamic_growth_steps - 1))
        lowest, highest = min(1.0, self.initial_scale), 2.0**127
        raised = ops.where(grown, ops.minimum(2.0 * scale, highest), scale)
        self.dynamic_scale.assign(ops.where(finite, raised, ops.maximum(0.5 * scale, lowest)))
        counting = ops.logical_and(finite, ops.logical_not(grown))
        counter = ops.convert_to_tensor(self.step_counter)
        self.step_counter.assign(ops.where(counting, counter + 1, ops.zeros_like(counter)))

    def save_own_variables(self, store: Any) -> None:
        """Write the scale and its counter, as rows of all replicas; the inner optimizer writes its own state."""
        for entry in state.LOSS_SCALE:
            store[entry.name] = backend.current().read(getattr(self, entry.name))

    def load_own_variables(self, store: Any) -> None:
        """Read them, also of another number of replicas, or from a file of Keras' own `LossScaleOptimizer`.

        Before this is built, nothing is loaded, with a warning, as Keras does.

        Raises:
            ValueError: if the file is another optimizer's, or has another's within.
        """
        for child in ("", "inner_optimizer"):
            origin.check_name(self.inner_optimizer, _compat.saved_name(store, child))
        names = [entry.name for entry in state.LOSS_SCALE]
        if not self.built:
            saving.warn_of_skipping(self, len(store.keys()))
            return
        if set(store.keys()) == set(names):
            saved = dict(zip(names, names, strict=True))
        elif len(store.keys()) == len(self.variables):
            places = [id(variable) for variable in self._variables]
            saved = {name: str(places.index(id(getattr(self, name)))) for name in names}
            if any(np.ndim(store[key]) for key in saved.values()):
                raise ValueError(_NO_SCALE)
        else:
            saving.warn_of_skipping(self, len(store.keys()))
            return
        for entry in state.LOSS_SCALE:
            rows = np.atleast_1d(np.asarray(store[saved[entry.name]]))
            backend.current().inherit(getattr(self, entry.name), rows, entry.inherit)
