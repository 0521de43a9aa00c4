"""VoteMonitor: what the votes look like, in Keras' logs."""

import math
from typing import Any

import keras
import numpy as np

from signsgd_core import planes
from signsgd_core.analysis.vote_figures import figures, names

from ..vote.observers import VoteStatistics
from .optimizers import voting_optimizer


class VoteMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Put into the logs of every epoch how the replicas agree, what they send, and how long they wait.

    Names and meaning: see `signsgd_core.analysis.vote_figures`; a replica is a rank there. Shares are over all votes of
    the epoch; what an epoch has nothing of is NaN, such as flips at the first vote of all. With accumulated gradients
    a step is a vote. A coordinate that is exactly zero on every replica counts by the zero rule: under "alternate"
    with an even number of replicas it is a tie, and flips from step to step. A gradient entry counts as not finite if
    it is so in the replica's direction: after Keras unscaled, accumulated and clipped it.
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
        self._optimizer = voting_optimizer(self.model, "VoteMonitor has no vote to watch")
        vote, self._nonfinite = self._optimizer.vote, 0.0
        vote.forget(VoteStatistics)  # those of a fit that ended in an error
        sizes = [int(np.prod(variable.shape)) for variable in self.model.trainable_variables]
        self._statistics = VoteStatistics(vote.replicas, sizes, planes(self._optimizer.zero_rule))
        vote.observe(self._statistics)
        self.model.make_train_function(force=True)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the figures of the epoch's votes."""
        rows, votes = self._statistics.take()
        values = figures(rows, votes, self._nonfinite) if votes else {}
        self._nonfinite = values.get("vote/nonfinite", self._nonfinite)
        if logs is not None:  # CSVLogger keeps the columns of its first epoch
            logs.update({**dict.fromkeys(names(len(rows)), math.nan), "vote/nonfinite": self._nonfinite, **values})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stop counting."""
        self._optimizer.vote.forget(VoteStatistics)
        self.model.make_train_function(force=True)
