"""The Lightning strategy for slow links: ranks take steps of their own, and vote on where they went."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from signsgd_core.adversaries import Adversary

from .. import _compat
from ..local_steps import LocalSteps
from ..local_steps.enable import let_step
from ..local_steps.options import LocalStepOptions
from .base import StateDictType, WorkerStateStrategy
from .common import averaging, callbacks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class LocalVoteStrategy(WorkerStateStrategy):
    """Let every rank take steps of its own with any optimizer, and vote on where they went after `sync_every`.

    The model is not wrapped in DDP. Validation, testing, a checkpoint and the end of `fit` close the round first, so
    that what is measured and saved is the same on all ranks; so does every epoch where a callback averages weights. See
    `enable_local_steps` for the mathematics.

    Args:
        sync_every: `H`, steps of the last optimizer between votes; one that a gradient scaler skips counts.
        outer_lr: η.
        outer_momentum: μ, Nesterov's.
        verify_every_n_rounds: how often all ranks make sure that they hold the same parameters and outer momenta, bit
            for bit (`RanksDifferError` if not); 0 for never.
        adversaries: rank -> what it makes of its displacements before it votes (`signsgd_core.adversaries`).
        state_dict_type: "full" for checkpoints that are one file with the optimizer states of all ranks, gathered on
            rank 0; "sharded" for directories, which all ranks must see, where each rank writes its own.
        **kwargs: those of `lightning.pytorch.strategies.DDPStrategy` that concern processes; ``timeout`` bounds how
            long a rank waits for a lost one.

    Attributes:
        local_steps: the rounds, while a model is fitted.

    Raises:
        ValueError: for settings outside their range, or a communication hook; at the start of `fit` beside
            `EMAWeightAveraging` or `WeightAveraging`, whose averages of each step would be each rank's own.
        TypeError: for an argument that neither this class nor `DistributedDataParallel` has.
        RuntimeError: before the first step, if the ranks differ in model or settings.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(accelerator="cpu", devices=2, strategy="local_vote", logger=False).strategy.__class__.__name__
        'LocalVoteStrategy'
    """

    strategy_name = "local_vote"

    def __init__(
        self,
        sync_every: int = 16,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        verify_every_n_rounds: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        state_dict_type: StateDictType = "full",
        **kwargs: Any,
    ) -> None:
        self.options = LocalStepOptions(sync_every, outer_lr, outer_momentum, verify_every_n_rounds, adversaries)
        super().__init__(state_dict_type, **kwargs)
        _compat.check_ddp_options(self)
        self.local_steps: LocalSteps | None = None
        self._first = _Closing(self._close_round)

    def configure_ddp(self) -> None:
        """Leave the model as it is: every rank keeps its own gradients."""

    def setup(self, trainer: "Trainer") -> None:
        """Set up the optimizers, then let them take steps of their own."""
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits and (steps := [one for one in averaging(trainer) if _averages_steps(one)]):
            raise ValueError(
                f"{type(steps[0]).__name__} averages after every step, when parameters are each rank's own: take "
                "StochasticWeightAveraging, which averages epochs, or strategy='majority_vote'"
            )
        super().setup(trainer)
        if fits:
            assert self.model is not None
            self.local_steps = let_step(self.model, self._stepping, self.options)
            callbacks(trainer).insert(0, self._first)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Take a step; count one that a gradient scaler skips, too: so ranks close rounds at the same batch."""
        local = self.local_steps
        before = 0 if local is None else local.counted
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        if local is not None and optimizer is self.optimizers[-1] and local.counted == before:
            local.count()
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights that are the same on all ranks."""
        self._close_round()
        return super().lightning_module_state_dict()

    def teardown(self) -> None:
        """Let the optimizers go."""
        if self.local_steps is not None:
            assert self.lightning_module is not None
            there = callbacks(self.lightning_module.trainer)
            there[:] = [callback for callback in there if callback is not self._first]
            self.local_steps.end()
            self.local_steps = None
        super().teardown()

    def _close_round(self) -> None:
        if self.local_steps is not None and not self._interrupted:
            self.local_steps.close_round()


def _averages_steps(callback: Callback) -> bool:
    """Whether a callback averages weights after steps, as `WeightAveraging` does where no other class says when."""
    own = getattr(type(callback), "should_update", None)
    return own in (WeightAveraging.should_update, EMAWeightAveraging.should_update)


class _Closing(Callback):
    """Closes rounds before what other callbacks and the module do: the strategy's own hooks come behind theirs."""

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close

    def on_validation_start(self, *_: Any) -> None:
        self._close()

    def on_train_epoch_end(self, trainer: "Trainer", _: Any) -> None:
        if averaging(trainer):
            self._close()

    def on_train_end(self, *_: Any) -> None:
        self._close()
