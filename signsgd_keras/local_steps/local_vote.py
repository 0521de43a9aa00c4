"""LocalVote: workers take steps of their own in `model.fit`, and vote on where they went."""

import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import keras
import tensorflow as tf

from signsgd_core import check_count, check_local_steps
from signsgd_core.adversaries import Adversary, check_adversaries
from signsgd_core.analysis.vote_figures import figures, names

from ..strategy import patient, warn_if_alone
from .exchange import Exchange
from .rounds import Rounds

ROUND, EPOCH, END = range(3)
"""Where a worker is when a round closes: in an epoch, at its end, at the end of `fit`."""


class LocalVote(keras.callbacks.Callback):  # type: ignore[misc]
    """Train with local steps: each worker takes `sync_every` of its own, then all vote on where they went.

    Each process calls `fit` on a model of its own, outside of any strategy's scope, with its own data and any Keras
    optimizer. With ``Δ_i = x_0 − x_i`` worker `i` of `M` sends ``sign(Δ_i)`` and ``s_i = mean |Δ_i|``, one bit a
    coordinate and one number a variable, and all take ``x = x_0 − η·median_i(s_i)·V`` (`signsgd_core.local_steps`).
    That is ``2·(M−1)/M·d`` bits a round.

    A round closes after `sync_every` optimizer steps; those that a `LossScaleOptimizer` skips count. It closes early
    before validation, at the end of each epoch and at the end of `fit`: what is measured and saved is the same on all.
    Put this callback first: those that look at the model at the end of an epoch must come after it.
    Workers may have different numbers of batches and epochs. One that has no more abstains until all have none.

    Floating-point variables that are not trained, such as batch statistics, become the mean of those workers that
    moved them. Frozen ones cost nothing. The optimizer's variables, integers and seeds are each worker's own.
    The logs of an epoch get the figures of its rounds (`signsgd_core.analysis.vote_figures`); a step there is a round.

    Make it before the model: TensorFlow wants its connections before anything else.

    Args:
        sync_every: H, optimizer steps in a round.
        outer_lr: η.
        outer_momentum: μ, Nesterov's, of the outer update.
        verify_every_n_rounds: how often the bits of all variables are compared between workers; 0 is never.
        adversaries: worker -> what it makes of its displacements before it votes (`signsgd_core.adversaries`).
        state_file: where worker 0 writes the outer momentum and the number of rounds at the end of each epoch. `fit`
            goes on from it if the model's parameters are those that it was written with.
        strategy: a `tf.distribute.MultiWorkerMirroredStrategy`, of which only the connections are used; one of
            ``TF_CONFIG`` where left out, which waits 30 minutes for others; ``timeout_seconds`` of its options says so.

    Raises:
        TypeError: if `strategy` is another one.
        ValueError: if a setting is out of its range, or the folder of `state_file` is not there; at the start of `fit`,
            on all workers, if they differ in settings or variables, or the model is not built; when a round closes, if
            there are trainable variables since then.
        RuntimeError: if TensorFlow was used before; if a worker is lost, on all others: then the variables are those
            of the round's beginning.
        ReplicasDifferError: if the workers' variables differ after a round.

    Example:
        >>> vote = LocalVote(sync_every=16)  # doctest: +SKIP
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])  # doctest: +SKIP
        >>> model.compile(keras.optimizers.AdamW(1e-3), "mse")  # doctest: +SKIP
        >>> model.fit(x, y, callbacks=[vote, keras.callbacks.ModelCheckpoint("model.keras")])  # doctest: +SKIP
    """

    def __init__(
        self,
        sync_every: int = 16,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        verify_every_n_rounds: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        state_file: str | None = None,
        strategy: Any = None,
    ) -> None:
        check_local_steps(sync_every, outer_lr, outer_momentum)
        check_count("verify_every_n_rounds", verify_every_n_rounds, 0)
        super().__init__()
        self.sync_every, self.outer_lr, self.outer_momentum = sync_every, outer_lr, outer_momentum
        self.verify_every_n_rounds, self.adversaries = verify_every_n_rounds, adversaries or {}
        folder = os.path.dirname(os.path.abspath(os.fspath(state_file))) if state_file else None
        if folder and not os.path.isdir(folder):
            raise ValueError(f"state_file must be in a folder that there is, got {state_file!r}: make {folder}")
        self.state_file = state_file
        if strategy is not None and not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise TypeError(
                f"strategy must be a tf.distribute.MultiWorkerMirroredStrategy, got {strategy!r}: leave it out, and "
                "TF_CONFIG names the workers"
            )
        if strategy is None:
            warn_if_alone()
        self._exchange = Exchange(strategy or _connections())
        check_adversaries(self.adversaries, self._exchange.workers)
        self._rounds: Rounds | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Forget a `fit` that ended in an error; callbacks after this one may load variables yet."""
        self._rounds, self._batches, self._closed_at = None, 0, 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Before the first epoch start from worker 0's variables."""
        self._begin()
        self._batch, self._epoch_is_closed = -1, False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Close a round, where it is time."""
        self._batches += batch - self._batch
        self._batch = batch
        if self._batches // self._accumulated - self._closed_at // self._accumulated >= self.sync_every:
            self._close(ROUND)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Close the epoch's last round before validation."""
        if self._rounds is not None:
            self._close_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Close the epoch's last round, unless validation came before, and add its figures to the logs."""
        self._close_epoch()
        if logs is not None:  # CSVLogger keeps the columns of its first epoch
            logs.update(self._figures())
        self._save()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Abstain until all workers are at their end."""
        self._begin()
        self._close(END)
        self._save()
        self._rounds = None

    def _begin(self) -> None:
        """At the start of training meet the others, unless it was done."""
        if self._rounds is not None:
            return
        if self.model.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError("LocalVote needs a model of this process alone: make it outside of any strategy's scope")
        optimizers = list(_within(self.model.optimizer))
        if any(optimizer.use_ema for optimizer in optimizers):
            raise ValueError(
                "use_ema=True would end fit() with each worker's own averages, not the same on all: take use_ema=False"
            )
        self._accumulated = math.prod(optimizer.gradient_accumulation_steps or 1 for optimizer in optimizers)
        rounds = Rounds(self.model, self._exchange, self.outer_lr, self.outer_momentum, self.adversaries)
        if rounds.is_first_worker and self.state_file and os.path.exists(self.state_file):
            rounds.load(self.state_file)
        shared = ("sync_every", "outer_lr", "outer_momentum", "verify_every_n_rounds")
        rounds.begin({name: getattr(self, name) for name in shared})
        self._rounds, self._nonfinite = rounds, 0.0
        self._logged: tuple[int, Any] = rounds.t, 0.0

    def _close(self, stage: int) -> None:
        """Close a round; at the end of an epoch or of `fit` go on until all are there and nobody moved any more."""
        assert self._rounds is not None
        while True:
            before = self._rounds.t
            seen = self._rounds.close(stage, stepped=self._batches > self._closed_at)
            self._closed_at = self._batches
            verified = self.verify_every_n_rounds
            if verified and self._rounds.t // verified > before // verified:
                self._rounds.verify()
            if stage == ROUND or (seen.stages.min() >= stage and not seen.moved):
                break
        self._counts = seen.counts

    def _close_epoch(self) -> None:
        if not self._epoch_is_closed:
            self._close(EPOCH)
            self._epoch_is_closed = True

    def _figures(self) -> dict[str, float]:
        """Return the figures of the rounds since the last call."""
        assert self._rounds is not None
        rounds, counts = self._logged
        new, self._logged = self._rounds.t - rounds, (self._rounds.t, self._counts)
        values = figures(self._counts - counts, new, self._nonfinite) if new else {}
        self._nonfinite = values.get("vote/nonfinite", self._nonfinite)
        return {**dict.fromkeys(names(len(self._counts)), math.nan), "vote/nonfinite": self._nonfinite, **values}

    def _save(self) -> None:
        assert self._rounds is not None
        if self.state_file and self._rounds.is_first_worker:
            self._rounds.save(self.state_file)


@cache
def _connections() -> Any:
    """Return the strategy of ``TF_CONFIG``; a process can have one for its whole life."""
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=patient())
    except RuntimeError as error:
        raise RuntimeError("make LocalVote before the model, and before anything else of TensorFlow") from error


def _within(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those within it, such as a `LossScaleOptimizer`'s."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)
