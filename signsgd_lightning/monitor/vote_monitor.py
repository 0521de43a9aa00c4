"""VoteMonitor: what the votes look like, in whatever logger the user has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from signsgd_core.analysis.vote_figures import COUNTS, figures

from .. import _compat
from ..optimizer import Signum, see_through
from ..vote import Vote, VoteStatistics


class VoteMonitor(Callback):
    """Log how the ranks agree, what they send, and how long they wait, every ``log_every_n_steps`` steps.

    The names and what they mean: see `signsgd_core.analysis.vote_figures`.

    Shares are over all votes since the last time they were logged, of the coordinates on which the rank voted; flips
    count where the vote before was on the same parameters. With several optimizers their votes are added up. A
    coordinate that is exactly zero on every rank counts by the zero rule: under "alternate" with an even number
    of ranks it is a tie, and flips from step to step. Each time it logs it gathers a few numbers from all ranks;
    without the callback nothing is counted.

    Raises:
        RuntimeError: at the start of `fit`, if no optimizer votes.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[VoteMonitor()], logger=False)
    """

    _watched: Sequence[tuple[Vote, VoteStatistics]] = ()
    _ends: Sequence[Callable[[], None]] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        optimizers = map(see_through, trainer.optimizers)
        votes = [o.vote for o in optimizers if isinstance(o, Signum) and o.vote is not None]
        if not votes:
            raise RuntimeError("VoteMonitor has no vote to watch: it needs strategy='majority_vote' and several ranks")
        self._nonfinite, self._steps, self._global_step = 0.0, 0, trainer.global_step
        self._watched = [(vote, VoteStatistics()) for vote in votes]
        self._ends = [vote.observe(statistics) for vote, statistics in self._watched]
        self._sent, self._waited = self._traffic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gather and log, at the steps at which Lightning logs."""
        if trainer.global_step == self._global_step:
            return  # gradients accumulate
        self._steps, self._global_step = self._steps + 1, trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = _compat.logged_step(trainer)
        if not every or (step + 1) % every:
            return
        values = self._gather(self._steps, pl_module.device)
        self._steps = 0
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._stop()

    def _stop(self) -> None:
        for end in self._ends:
            end()
        self._watched = self._ends = ()

    def _traffic(self) -> tuple[int, float]:
        sent, waited = zip(*(vote.topology.traffic() for vote, _ in self._watched), strict=True)
        return sum(sent), sum(waited)

    def _gather(self, steps: int, device: torch.device) -> dict[str, float]:
        """Return the figures of all ranks since the last call, and start over."""
        counts = [statistics.take(COUNTS[:-2]) for _, statistics in self._watched]  # bytes and seconds come beside
        sent, waited = self._traffic()
        row = [*map(sum, zip(*counts, strict=True)), sent - self._sent, waited - self._waited]
        rows = self._watched[0][0].gather_counts(torch.tensor(row, dtype=torch.float64, device=device))
        self._sent, self._waited = self._traffic()
        values = figures(rows.numpy(), steps, self._nonfinite)
        self._nonfinite = values["vote/nonfinite"]
        return values
