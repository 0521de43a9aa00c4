"""VerifyReplicas: are the replicas still the same, bit for bit? And a name for the one that is not."""

from typing import Any

import keras

from signsgd_core import check_count

from .. import _compat
from ..variables import is_overwritten
from ..vote.verification import verify
from .optimizers import voting_optimizer


class VerifyReplicas(keras.callbacks.Callback):  # type: ignore[misc]
    """Make sure, once in so many optimizer steps, that all replicas hold the same bits.

    A digest of 16 bytes for each replica is compared. Only where these differ are there 16 bytes for each variable
    that is voted on, with its verdict momentum. On several workers all of them need this callback. The scales of float8
    layers are not compared: Keras lets each replica write its own.

    Args:
        every_n_steps: how often, in steps of the optimizer: votes, where gradients are accumulated. With
            ``steps_per_execution`` Keras tells of its last step only, after which replicas are compared.

    Raises:
        ValueError: if `every_n_steps` is no whole number of 1 or more.
        RuntimeError: at the start of `fit`, if no optimizer votes.
        ReplicasDifferError: at the end of a batch, on all workers, if the replicas differ.

    Example:
        >>> callbacks = [VerifyReplicas(every_n_steps=1000)]
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_count("every_n_steps", every_n_steps, 1)
        super().__init__()
        self.every_n_steps = every_n_steps

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Find the optimizer."""
        self._optimizer = voting_optimizer(self.model, "VerifyReplicas has no replicas to compare")
        self._checks = self._steps() // self.every_n_steps

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Compare, where it is time."""
        steps, optimizer = self._steps(), self._optimizer
        if steps // self.every_n_steps == self._checks:
            return
        self._checks = steps // self.every_n_steps
        voted = [variable for variable in _compat.trainable_variables(optimizer) if not is_overwritten(variable)]
        shared = [optimizer.slot(variable).shared for variable in voted]
        verify(optimizer.vote.replicas, optimizer.vote.transport, shared, steps - 1)

    def _steps(self) -> int:
        return int(self._optimizer.iterations.numpy())
