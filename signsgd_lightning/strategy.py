"""The Lightning strategy: DDP whose ranks vote at the optimizer's step."""

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import _MockOptimizer  # stands for no optimizer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import Adversary

from .checkpoint import gather_state, scatter_state
from .ddp import agree_on_model, enable_majority_vote
from .optimizer import Signum
from .peers import explain

if TYPE_CHECKING:
    from lightning.fabric.strategies.registry import _StrategyRegistry
    from lightning.pytorch import Trainer


class MajorityVoteStrategy(DDPStrategy):
    """DDP that sends one bit per parameter each way: every `Signum` step is a majority vote of all ranks.

    Args:
        verify_every_n_steps: how often all ranks make sure that they hold the same parameters and verdict momenta, bit
            for bit (`RanksDifferError` if not); 0 for never.
        adversaries: rank -> what it makes of its gradients before it votes (`signsgd_core.adversaries`), to try what
            a vote withstands.
        **kwargs: those of `lightning.pytorch.strategies.DDPStrategy`, but for communication hooks. ``timeout`` bounds
            how long a rank waits for a lost one.

    Raises:
        ValueError: for a communication hook.
        TypeError: before the first step, if an optimizer is not a `Signum`.
        RuntimeError: before the first step, if the ranks differ in model or settings.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(accelerator="cpu", devices=2, strategy="majority_vote", logger=False).strategy.__class__.__name__
        'MajorityVoteStrategy'
    """

    strategy_name = "majority_vote"

    def __init__(
        self, verify_every_n_steps: int = 0, adversaries: Mapping[int, Adversary] | None = None, **kwargs: Any
    ) -> None:
        hooks = [name for name in kwargs if name.startswith("ddp_comm_") and kwargs[name] is not None]
        if hooks:
            raise ValueError(f"a majority vote takes the place of a communication hook; leave out {', '.join(hooks)}")
        super().__init__(**kwargs)
        self.verify_every_n_steps, self.adversaries = verify_every_n_steps, adversaries

    def configure_ddp(self) -> None:
        """Wrap the model, once all ranks are sure to have the same: DDP would leave some with a lost connection."""
        assert self.model is not None
        agree_on_model(self.model)
        super().configure_ddp()

    def setup(self, trainer: "Trainer") -> None:
        """Set up DDP and the optimizers, then let them vote."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(self.model, DistributedDataParallel)
            optimizers = [optimizer for optimizer in self.optimizers if not isinstance(optimizer, _MockOptimizer)]
            enable_majority_vote(
                self.model,
                *optimizers,  # type: ignore[arg-type]
                verify_every_n_steps=self.verify_every_n_steps,
                adversaries=self.adversaries,
            )

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state with the momenta of all ranks; Lightning calls it on all and saves rank 0's."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # of a LightningOptimizer
        return gather_state(optimizer) if isinstance(optimizer, Signum) else super().optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its own momentum back, also where there are more ranks now or fewer."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            scatter_state(optimizer, state)  # type: ignore[arg-type]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        """Write a checkpoint so that the file of that name is always a whole one, whenever the run is killed."""
        if not self.is_global_zero or not _is_local_file_protocol(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        part = f"{os.fspath(filepath)}.part"
        super().save_checkpoint(checkpoint, part, storage_options)
        os.replace(part, filepath)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            RuntimeError: if the file is truncated, holds code instead of tensors, or is something else altogether.
        """
        try:
            return super().load_checkpoint(checkpoint_path, weights_only)
        except (EOFError, RuntimeError, UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"{checkpoint_path} is not a whole checkpoint as trainer.save_checkpoint writes it; take an older one, "
                f"nothing was loaded ({reason})"
            ) from error

    def on_exception(self, exception: BaseException) -> None:
        """Name the rank that was lost; let Lightning add its advice, and put this strategy's names into it."""
        super().on_exception(exception)
        lost = explain(exception, dist.group.WORLD) if dist.is_initialized() and dist.group.WORLD else None
        if lost:
            exception.args = (lost,)
        if exception.args and isinstance(exception.args[0], str):
            advice = exception.args[0].replace("'ddp_find", f"'{self.strategy_name}_find")
            exception.args = (advice.replace("=DDPStrategy", f"={type(self).__name__}"), *exception.args[1:])

    @classmethod
    def register_strategies(cls, strategy_registry: "_StrategyRegistry") -> None:
        """Register "majority_vote" with the variants that DDP itself registers."""
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            for unused in (None, False, True):
                name = cls.strategy_name + suffix
                settings: dict[str, Any] = {"start_method": start_method}
                if unused is not None:
                    name += f"_find_unused_parameters_{str(unused).lower()}"
                    settings["find_unused_parameters"] = unused
                description = f"one-bit majority vote over DDP, start_method={start_method!r}"
                strategy_registry.register(name, cls, description=description, override=True, **settings)


MajorityVoteStrategy.register_strategies(StrategyRegistry)
