"""The Lightning strategy for workers that come and go: one Trainer on one device is one worker."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from signsgd_core.adversaries import Adversary

from .. import _compat
from ..checks import check_vote
from ..elastic import ElasticLocalSteps, ElasticVote
from ..elastic.membership import find_place
from ..elastic.state import Stateful
from ..local_steps.enable import check as check_local_steps
from ..local_steps.options import LocalStepOptions
from ..optimizer import find_signum, see_through
from ..vote import VoteOptions
from .common import averaging, scales, stepping
from .files import naming, whole_file

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


_VOTE = "elastic_vote"
"""In a checkpoint: what the vote needs besides model and optimizer."""


class ElasticVoteStrategy(SingleDeviceStrategy):
    """Let every step of the Trainer, or every round of its local steps, be a vote of the workers that are there.

    A worker is one Trainer with one device, started by itself; workers find each other through ``torchft_lighthouse``
    (see `enable_elastic_vote`). One that comes takes over the model, ``trainer.global_step`` and the schedulers from
    the others. The worker that has number 0 in the quorum writes logs, checkpoints and the progress bar; another one
    does when that is lost. Training ends by ``max_steps``, which all workers count alike. Where something else ends it
    within a round of local steps, that round is given up.

    Args:
        min_workers: with fewer of them training waits.
        lighthouse: its address, "http://host:port". None is the environment's ``TORCHFT_LIGHTHOUSE``.
        timeout: how long a worker that does not answer is waited for. Make it longer than validation and a copy of the
            state take.
        sync_every: None votes at every step, with `Signum`; a number is `H` of local steps with any optimizer.
        outer_lr: η of local steps.
        outer_momentum: μ of local steps.
        hostname: by which the other workers reach this machine. None is `socket.gethostname`.
        verify_every_n_steps: how often all workers make sure that they hold the same bits, in votes; 0 for never.
        adversaries: number in the quorum -> what that worker makes of what it votes with.

    Attributes:
        vote: while a model is fitted, what draws batches (`ElasticBatches`), and how many workers there are.

    Raises:
        ValueError: for settings outside their range; at the start of `fit` without a lighthouse, for several devices,
            several optimizers, a gradient scaler, schedulers that do not step with the optimizer, a callback that
            averages weights, or without `max_steps`.
        TypeError: at the start of `fit`, if the optimizer of a vote at every step is not a `Signum`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(accelerator="cpu", devices=1, strategy="elastic_vote", logger=False).strategy.__class__.__name__
        'ElasticVoteStrategy'
    """

    strategy_name = "elastic_vote"

    def __init__(
        self,
        min_workers: int = 2,
        lighthouse: str | None = None,
        timeout: timedelta = timedelta(seconds=30),
        sync_every: int | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        hostname: str | None = None,
        verify_every_n_steps: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
    ) -> None:
        super().__init__()
        self.parallel_devices: list[torch.device] = []  # Lightning fills it
        self.vote: ElasticVote | ElasticLocalSteps | None = None
        self._saved: dict[str, Any] | None = None
        self._place = min_workers, timeout, hostname
        self._lighthouse = lighthouse
        self.options: VoteOptions | LocalStepOptions = VoteOptions(verify_every_n_steps, adversaries)
        if sync_every is not None:
            self.options = LocalStepOptions(sync_every, outer_lr, outer_momentum, verify_every_n_steps, adversaries)

    @property
    def root_device(self) -> torch.device:
        """The worker's device."""
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    @property
    def is_global_zero(self) -> bool:
        """Whether this worker writes logs and files now."""
        return self.global_rank == 0

    def setup(self, trainer: "Trainer") -> None:
        """Set up model and optimizer, then let it vote."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._refuse(trainer)
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.vote = self._enable(trainer)

    def on_train_start(self) -> None:
        """Meet the others, and go on from where they are, or from a checkpoint that is further."""
        assert self.vote is not None
        if self._saved is not None:
            self.vote.load_state_dict(self._saved)
        self.vote.begin()
        self._take_turns()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Take a step with whoever is there."""
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._take_turns()
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights that are the same on all workers; within a round those with which it began."""
        if isinstance(self.vote, ElasticLocalSteps) and self.vote.is_open:
            return self.vote.local.model_state()
        return super().lightning_module_state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, on one worker, so that what has that name is always a whole one."""
        if self.vote is not None:
            checkpoint = {**checkpoint, _VOTE: self.vote.state_dict()}
        with whole_file(self, filepath) as target:
            super().save_checkpoint(checkpoint, target, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            RuntimeError: if the file is truncated or something else altogether.
        """
        with naming(checkpoint_path, "trainer.save_checkpoint", "trainer.fit"):
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._saved = checkpoint.get(_VOTE)
        return checkpoint

    def on_train_end(self) -> None:
        """Leave the others."""
        if self.vote is not None:
            self.vote.close()

    def teardown(self) -> None:
        """Leave the others, also after an error."""
        if self.vote is not None:
            self.vote.close()
            self.vote = self._saved = None
        rank_zero_only.rank = self.global_rank = 0  # type: ignore[attr-defined]
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Leave it to `registration`."""

    def _refuse(self, trainer: "Trainer") -> None:
        if len(self.parallel_devices) > 1:
            raise ValueError(
                f"an elastic worker has one device, got devices={len(self.parallel_devices)}: pass devices=1, and "
                "start a process for each"
            )
        if scales(self):
            raise ValueError(
                "precision='16-mixed' scales the loss, and an elastic step that is taken again would scale it twice: "
                "take precision='bf16-mixed'"
            )
        if trainer.max_steps < 1:
            raise ValueError(
                f"workers that come and go count steps in common, and epochs each for itself, got max_steps="
                f"{trainer.max_steps}: pass Trainer(max_steps=…)"
            )
        for callback in averaging(trainer):
            raise ValueError(
                f"{type(callback).__name__} keeps an average that a new worker does not take over, so that each would "
                "end with its own: average the checkpoints afterwards"
            )
        if isinstance(self.options, LocalStepOptions) and trainer.max_steps % self.options.sync_every:
            raise ValueError(
                f"max_steps={trainer.max_steps} would end within a round of sync_every={self.options.sync_every} "
                "steps: take a multiple of it"
            )

    def _enable(self, trainer: "Trainer") -> ElasticVote | ElasticLocalSteps:
        assert self.model is not None
        assert self.lightning_module is not None
        optimizers = [see_through(optimizer) for optimizer in stepping(self)]
        if len(optimizers) != 1:
            raise ValueError(
                f"an elastic vote needs one optimizer, got {len(optimizers)}: return one from configure_optimizers, "
                "with parameter groups"
            )
        for config in self.lr_scheduler_configs:
            if config.interval != "step" or config.reduce_on_plateau:
                raise ValueError(
                    f"workers that come and go count epochs and measure losses each for itself, got a "
                    f"{type(config.scheduler).__name__} with interval={config.interval!r}: return schedulers of steps "
                    "alone from configure_optimizers, as {'scheduler': …, 'interval': 'step'}"
                )
        place = find_place(self._lighthouse, *self._place)
        others: dict[str, Stateful] = {f"scheduler {k}": c.scheduler for k, c in enumerate(self.lr_scheduler_configs)}
        others["progress"] = _Progress(trainer)
        if isinstance(self.options, LocalStepOptions):
            check_local_steps(self.model, optimizers)
            return ElasticLocalSteps(self.model, optimizers, self.options, place, others)
        signum = find_signum(optimizers[0])
        signum.unscale_at_step(False)  # else Lightning clips nothing
        check_vote(self.model, [signum])
        again = self.lightning_module.automatic_optimization and trainer.accumulate_grad_batches == 1
        return ElasticVote(self.model, signum, place, others, self.options, recompute=again)

    def _take_turns(self) -> None:
        """Let the first worker write."""
        assert self.vote is not None
        assert self.lightning_module is not None
        if self.vote.number == self.global_rank:
            return
        rank_zero_only.rank = self.global_rank = self.vote.number  # type: ignore[attr-defined]
        bar = self.lightning_module.trainer.progress_bar_callback
        if bar is not None:
            (bar.enable if self.is_global_zero else bar.disable)()


class _Progress:
    """How many steps the Trainer has taken."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the count, and that by which Lightning logs."""
        return {"global_step": self._trainer.global_step, "logged_step": _compat.logged_step(self._trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        _compat.set_steps(self._trainer, state_dict["global_step"], state_dict["logged_step"])
