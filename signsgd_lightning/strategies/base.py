"""What the strategies over DDP share: whole checkpoints with every rank's own state."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from ..checkpoint.gathered import gather_state, scatter_state
from ..checkpoint.inner import own_state
from ..checkpoint.sharded import load_shards, save_shards
from ..local_steps.rounds import find_local_steps
from ..optimizer import see_through
from . import registration
from .common import CommonStrategy
from .files import check_directory, has_own_state, naming, whole_file, writes_by_torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

StateDictType = Literal["full", "sharded"]


class WorkerStateStrategy(CommonStrategy, DDPStrategy):
    """Run DDP's ranks, each with state of its own that checkpoints keep.

    Args:
        state_dict_type: "full" for checkpoints that are one file with the states of all ranks, gathered on rank 0;
            "sharded" for directories, which all ranks must see, where each rank writes its own state and holds no
            other's. Either resumes from both.
        **kwargs: those of `lightning.pytorch.strategies.DDPStrategy`, but for communication hooks.

    Raises:
        ValueError: for a communication hook or another `state_dict_type`; at the start of `fit` for a sharded
            checkpoint beside a CheckpointIO plugin.
    """

    strategy_name: ClassVar[str]

    def __init__(self, state_dict_type: StateDictType = "full", **kwargs: Any) -> None:
        hooks = [name for name in kwargs if name.startswith("ddp_comm_") and kwargs[name] is not None]
        if hooks:
            raise ValueError(f"a majority vote takes the place of a communication hook; leave out {', '.join(hooks)}")
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(
                f"state_dict_type must be 'full' (one file) or 'sharded' (one directory), got {state_dict_type!r}"
            )
        super().__init__(**kwargs)
        self.state_dict_type = state_dict_type

    @property
    def _ranks_per_worker(self) -> int:
        return 1

    def setup(self, trainer: "Trainer") -> None:
        """Set up model and optimizers."""
        if self.state_dict_type == "sharded" and not writes_by_torch(self):
            raise ValueError(
                f"state_dict_type='sharded' would pass over {type(self.checkpoint_io).__name__}: leave that plugin "
                "out, or take state_dict_type='full'"
            )
        super().setup(trainer)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state with what all ranks have of it, or this rank's where each saves its own."""
        inner = see_through(optimizer)
        if self.state_dict_type == "full" and not self._interrupted and has_own_state(inner):
            return gather_state(inner)
        local = find_local_steps(inner)
        return super().optimizer_state(optimizer) if local is None else own_state(local, inner)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its own state back, also where there are more ranks now or fewer.

        Raises:
            ValueError: if there are not as many states as optimizers. None at all is fine: `on_load_checkpoint` may
                have thrown them away.
        """
        states = checkpoint["optimizer_states"]
        if states and len(states) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has the states of {len(states)} optimizers, and {len(self.optimizers)} are to go on: "
                "return as many from configure_optimizers, or set checkpoint['optimizer_states'] = [] in "
                "on_load_checkpoint to start their momentum anew"
            )
        for optimizer, state in zip(self.optimizers, states, strict=False):
            scatter_state(optimizer, state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint so that what has that name is always a whole one, whenever the run is killed.

        With a CheckpointIO plugin it is that plugin's affair.

        Raises:
            IsADirectoryError: if something else than a checkpoint has that name.
            ValueError: for a sharded checkpoint that is not to be on a local or mounted file system.
        """
        if self.state_dict_type == "sharded" and not self._interrupted:
            check_directory(filepath, storage_options, "take such a path, or state_dict_type='full'")
            save_shards(checkpoint, self.broadcast(os.fspath(filepath)))
        else:
            with whole_file(self, filepath) as target:
                super().save_checkpoint(checkpoint, target, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, a file or a directory.

        Raises:
            RuntimeError: if a file is truncated or missing in a directory, holds code instead of tensors, or is
                something else altogether; of a directory on all ranks, also if only one saw it. If it holds more than
                tensors and plain values, as hyperparameters may be, and is not said to be trusted.
        """

        def read(path: str | Path) -> dict[str, Any]:
            return super(WorkerStateStrategy, self).load_checkpoint(path, weights_only)

        with naming(checkpoint_path, "trainer.save_checkpoint", "trainer.fit"):
            if not os.path.isdir(checkpoint_path):
                return read(checkpoint_path)
            assert self.lightning_module is not None
            fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
            worker, workers = self.global_rank // self._ranks_per_worker, self.world_size // self._ranks_per_worker
            return load_shards(os.fspath(checkpoint_path), read, worker, workers, momenta=fitting)

    def on_exception(self, exception: BaseException) -> None:
        """Name the rank that was lost, and put this strategy's names into the advice of DDP."""
        super().on_exception(exception)
        if exception.args and isinstance(exception.args[0], str):
            advice = exception.args[0].replace("'ddp_find", f"'{self.strategy_name}_find")
            exception.args = (advice.replace("=DDPStrategy", f"={type(self).__name__}"), *exception.args[1:])

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy by its name, with the variants that DDP itself registers."""
        registration.register(strategy_registry, cls.strategy_name, cls)
