"""What our strategies for the Trainer share, whichever of Lightning's they extend: scalers, and ranks that are lost."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from .. import _compat
from ..checkpoint.atomic import remove_directory
from ..optimizer import Signum, see_through
from ..vote.failures import explain
from .files import warn_of_restarts

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def stepping(strategy: Strategy) -> list[Any]:
    """Return a strategy's optimizers, without those that Lightning puts where a module has none."""
    return [optimizer for optimizer in strategy.optimizers if not _compat.stands_for_no_optimizer(optimizer)]


def callbacks(trainer: "Trainer") -> list[Callback]:
    """Return a Trainer's callbacks, the list itself."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def averaging(trainer: "Trainer") -> list[Callback]:
    """Return those of a Trainer's callbacks that average weights."""
    return [one for one in callbacks(trainer) if isinstance(one, (StochasticWeightAveraging, WeightAveraging))]


def scales(strategy: Strategy) -> bool:
    """Tell whether a strategy's precision scales the loss, and so gradients until the step."""
    return getattr(strategy.precision_plugin, "scaler", None) is not None


class CommonStrategy(ParallelStrategy):
    """Let `Signum` take a gradient scaler's factor out, and after an exception wait for no other rank."""

    def setup_environment(self) -> None:
        """Connect the ranks; warn where torchrun could not connect them again."""
        warn_of_restarts()
        super().setup_environment()

    def setup(self, trainer: "Trainer") -> None:
        """Set up model and optimizers."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:  # where a step unscales, Lightning clips nothing
            self._unscale_at_step(scales(self))

    def teardown(self) -> None:
        """Let other loops have the optimizers."""
        self._unscale_at_step(True)
        super().teardown()

    @property
    def _stepping(self) -> list[Any]:
        return stepping(self)

    def _unscale_at_step(self, does: bool) -> None:
        for optimizer in map(see_through, self.optimizers):
            if isinstance(optimizer, Signum):
                optimizer.unscale_at_step(does)

    def _refuse_clipping_of_scaled(self, trainer: "Trainer") -> None:
        """Make sure that Lightning is not to clip gradients that are scaled until the step."""
        if trainer.gradient_clip_val and scales(self):
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val} cannot clip under precision='16-mixed', which scales "
                "gradients until the step: take precision='bf16-mixed', or clip in on_before_optimizer_step at the "
                "threshold times trainer.precision_plugin.scaler.get_scale()"
            )

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint so that a half removed directory never has its name."""
        if self.is_global_zero and os.path.isdir(filepath):
            remove_directory(os.fspath(filepath))
        else:
            super().remove_checkpoint(filepath)

    @property
    def _interrupted(self) -> bool:
        """Whether an exception ended the training on this rank: the others may be alive, and elsewhere."""
        module = self.lightning_module
        trainer = None if module is None else _compat.trainer_of(module)
        return trainer is not None and trainer.interrupted

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; after an exception for none."""
        if not self._interrupted:
            super().barrier(*args, **kwargs)  # type: ignore[safe-super]

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what rank `src` has; after an exception what this one has."""
        return obj if self._interrupted else super().broadcast(obj, src)  # type: ignore[safe-super]

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over all ranks; after an exception over this one."""
        return tensor if self._interrupted else super().reduce(tensor, *args, **kwargs)  # type: ignore[safe-super]

    def on_exception(self, exception: BaseException) -> None:
        """Name the rank that was lost."""
        super().on_exception(exception)
        lost = explain(exception, dist.group.WORLD) if dist.is_initialized() and dist.group.WORLD else None
        if lost:
            exception.args = (lost,)
