"""The optimizer that a callback watches, within those that are around it; and its gradients."""

from collections.abc import Callable, Sequence
from typing import Any

from .. import _compat
from ..optimizer import Signum

Tensor = Any
Variable = Any


def voting_optimizer(model: Any, complaint: str) -> Signum:
    """Return the optimizer of a model that votes, built.

    Args:
        model: compiled.
        complaint: what is wrong where no optimizer votes.

    Raises:
        RuntimeError: if none does.
    """
    optimizer = model.optimizer
    while optimizer is not None and not isinstance(optimizer, Signum):  # a LossScaleOptimizer, or another one around it
        optimizer = getattr(optimizer, "inner_optimizer", getattr(optimizer, "optimizer", None))
    if not isinstance(optimizer, Signum) or optimizer.replicas == 1:
        raise RuntimeError(f"{complaint}: it needs Signum and several replicas")
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    return optimizer


class GradientTap:
    """Shows a function the gradients of any optimizer of Keras, each time that it applies them.

    Keras has no hook between gradients and optimizer. So an attribute of the instance hides its method `apply` until
    `remove` is called. Those of one `fit` see the same gradients; one that an earlier `fit` left behind, which ended in
    an error, is replaced.

    Args:
        optimizer: whose gradients are shown.
        show: takes a list of gradients and of their variables.
        fit: any object that all callbacks of one `fit` share, and no other; None where there is none.
    """

    def __init__(self, optimizer: Any, show: Callable[[Sequence[Tensor], Sequence[Variable]], None], fit: Any) -> None:
        self._optimizer = optimizer
        found = vars(optimizer).get("apply")
        self._hidden = getattr(found, "hidden", found)  # what the user put there
        beside = fit is not None and getattr(found, "fit", None) is fit
        apply = found if beside else self._hidden or type(optimizer).apply.__get__(optimizer)

        def tapped(grads: Sequence[Tensor], trainable_variables: Sequence[Variable] | None = None) -> None:
            variables = trainable_variables
            show(grads, _compat.trainable_variables(optimizer) if variables is None else variables)
            apply(grads, variables)

        tapped.hidden, tapped.fit = self._hidden, fit  # type: ignore[attr-defined]
        optimizer.apply = tapped

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        vars(self._optimizer).pop("apply", None)
        if self._hidden is not None:
            self._optimizer.apply = self._hidden
