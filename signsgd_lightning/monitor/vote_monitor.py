"""VoteMonitor: what the votes look like, in whatever logger the user has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from signsgd_core.analysis.vote_figures import COUNTS, figures, figures_of_rounds

from .. import _compat
from ..local_steps.rounds import find_local_steps
from ..optimizer import Signum, see_through
from ..vote import Vote, VoteStatistics


class VoteMonitor(Callback):
    """Log how the ranks agree, what they send, and how long they wait, every ``log_every_n_steps`` steps.

    Under local steps a vote is a round: it also logs how far the ranks drift apart, and nothing where no round closed.

    The names and what they mean: see `signsgd_core.analysis.vote_figures`.

    Shares are over all votes since the last time they were logged, of the coordinates on which the rank voted; flips
    count where the vote before was on the same parameters. With several optimizers their votes are added up. A
    coordinate that is exactly zero on every rank counts by the zero rule: under "alternate" with an even number
    of ranks it is a tie, and flips from step to step. Each time it logs it gathers a few numbers from all ranks;
    without the callback nothing is counted.

    Under ``strategy="elastic_vote"`` a worker logs its own figures, and how many workers there are, "vote/workers".

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
        optimizers = list(map(see_through, trainer.optimizers))
        self._local = next(filter(None, map(find_local_steps, optimizers)), None)
        votes = [o.vote for o in optimizers if isinstance(o, Signum) and o.vote is not None]
        votes += [self._local.vote] if self._local else []
        if not votes:
            raise RuntimeError(
                "VoteMonitor has no vote to watch: it needs strategy='majority_vote' and several ranks, or 'local_vote'"
            )
        self._nonfinite, self._steps, self._global_step = 0.0, 0, trainer.global_step
        self._rounds, self._drift = self._rounds_so_far()
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
        if not every or (step + 1) % every or (self._local and self._rounds == self._local.outer.rounds):
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
        rounds, drift = self._rounds_so_far()
        row = [*map(sum, zip(*counts, strict=True)), sent - self._sent, waited - self._waited]
        row += [now - before for now, before in zip(drift, self._drift, strict=True)]
        counted, vote = torch.tensor(row, dtype=torch.float64, device=device), self._watched[0][0]
        comes_and_goes = vote.topology.changes  # then a worker has its own figures alone: it waits for nobody
        rows = (counted.cpu()[None] if comes_and_goes else vote.gather_counts(counted)).numpy()
        self._sent, self._waited = sent, waited
        if self._local is None:
            values = figures(rows, steps, self._nonfinite)
        else:
            values = figures_of_rounds(rows, rounds - self._rounds, self._nonfinite)
        if comes_and_goes:
            values["vote/workers"] = float(vote.topology.workers.world_size)
        self._nonfinite, self._rounds, self._drift = values["vote/nonfinite"], rounds, drift
        return values

    def _rounds_so_far(self) -> tuple[int, tuple[float, ...]]:
        """Return how many rounds of local steps there were, and how far their steps drifted; nothing without any."""
        return (self._local.outer.rounds, self._local.drift) if self._local else (0, ())
