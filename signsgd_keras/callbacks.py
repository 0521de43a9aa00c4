"""VoteMonitor: what the votes look like, in Keras' logs."""

import math
from typing import Any

import keras
import numpy as np

from signsgd_core import planes
from signsgd_core.figures import figures, names

from .optimizer import Signum
from .statistics import VoteStatistics


class VoteMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Put into the logs of every epoch how the replicas agree, what they send, and how long they wait.

    The names and what they mean: see `signsgd_core.figures`; a replica is a rank there. Shares are over all votes of
    the epoch; what an epoch has nothing of is NaN, such as flips at the first vote of all. With accumulated gradients
    a step is a vote. A coordinate that is exactly zero on every replica counts as the zero rule has it: under
    "alternate" with an even number of replicas it is a tie, and flips from step to step. A gradient entry counts as not
    finite if it is so where the replica takes it into its direction: after Keras unscaled, accumulated and clipped it.
    The time of an exchange has the tally in it.

    Put it first among the callbacks, so that `CSVLogger`, `TensorBoard` and the others find the figures in their logs.
    On several workers all of them need it. Keras does not tell callbacks of an error: after one that ends `fit` the
    model goes on counting, unseen, until a `fit` with a monitor ends.

    Raises:
        RuntimeError: at the start of `fit`, if no optimizer votes.

    Example:
        >>> callbacks = [VoteMonitor(), keras.callbacks.CSVLogger("log.csv")]
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Start to count: Keras traces its step anew, with counting in it."""
        optimizer = voting_optimizer(self.model, "VoteMonitor has no vote to watch")
        sizes = [int(np.prod(variable.shape)) for variable in self.model.trainable_variables]
        self._optimizer, self._nonfinite = optimizer, 0.0
        optimizer.statistics = VoteStatistics(optimizer._distribution_strategy, sizes, planes(optimizer.zero_rule))
        self.model.make_train_function(force=True)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the figures of the epoch's votes."""
        rows, votes = self._optimizer.statistics.take()
        values = figures(rows, votes, self._nonfinite) if votes else {}
        self._nonfinite = values.get("vote/nonfinite", self._nonfinite)
        if logs is not None:  # CSVLogger keeps the columns of its first epoch
            logs.update({**dict.fromkeys(names(len(rows)), math.nan), "vote/nonfinite": self._nonfinite, **values})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stop counting."""
        self._optimizer.statistics = None
        self.model.make_train_function(force=True)


def voting_optimizer(model: Any, complaint: str) -> Signum:
    """Return the optimizer of a model, built.

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
